"""TAK: what a task vector would do to other tasks, as a quadratic form of Kronecker factors, and training against it.

``T`` reference tasks, ``P`` pairs of factors of a parameter (1 or T), ``o`` outputs and ``d`` inputs of a layer, with
one more for its bias, ``N`` samples of all reference tasks, ``n_t`` of one.

The form is ``sum_p tr(B_p D A_p D^T)`` for the change D = [dW, db] of a layer. A parameter vector has a dense matrix
instead, which is the same with D a row and B = 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from neurocl.errors import UserError
from neurocl.merging.statistics import Statistics

Mode = Literal["accumulated", "per-task"]


class Factors(NamedTuple):
    """Pairs of Kronecker factors of one parameter: ``a`` [P, d, d] and ``b`` [P, o, o], symmetric."""

    a: Tensor
    b: Tensor


class QuadraticPenalty(torch.autograd.Function):
    """``sum_p tr(B_p D A_p D^T)``; its gradient ``2 sum_p B_p D A_p`` falls off on the way and costs nothing."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, a: Tensor, b: Tensor) -> Tensor:
        product = (b @ change @ a).sum(dim=0)
        ctx.save_for_backward(product)
        return (product * change).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (product,) = ctx.saved_tensors
        return 2 * grad * product, None, None


def quadratic_penalty(change: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``sum_p tr(B_p D A_p D^T)``, differentiable once with respect to D.

    Args:
        change: D, [o, d].
        a: [P, d, d], symmetric.
        b: [P, o, o], symmetric.
    Returns: scalar.
    Reference: Porrello et al., "Dataless Weight Disentanglement in Task Arithmetic via Kronecker-Factored Approximate
    Curvature", ICLR 2026, arXiv 2602.17385, eq. 7 (P = T) and 8 (P = 1).
    """
    result: Tensor = QuadraticPenalty.apply(change, a, b)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class Curvature:
    """Quadratic forms of all tracked parameters.

    Attributes:
        matrices: factors of linear layers by the name of their weight; the bias is the last column of the change.
        vectors: [d, d] of LayerNorm weights and biases and of single tokens by name.
    """

    matrices: dict[str, Factors]
    vectors: dict[str, Tensor]

    def to(self, device: torch.device, dtype: torch.dtype) -> Curvature:
        """The same on another device, in another floating dtype."""
        matrices = {
            name: Factors(pair.a.to(device, dtype), pair.b.to(device, dtype)) for name, pair in self.matrices.items()
        }
        return Curvature(matrices, {name: value.to(device, dtype) for name, value in self.vectors.items()})

    def tracked(self) -> set[str]:
        """Names of all parameters that the forms speak about, biases included."""
        return {*self.matrices, *self.vectors, *map(bias_name, self.matrices)}

    def nbytes(self) -> int:
        """Memory of the factors."""
        tensors = [*(value for pair in self.matrices.values() for value in pair), *self.vectors.values()]
        return sum(value.numel() * value.element_size() for value in tensors)

    def penalties(self, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The form of every tracked parameter at its change, unscaled, by name; biases count with their weight.

        Args:
            deltas: differences from the base by parameter name; what is absent counts as zero.
        """
        found = {}
        for name, (a, b) in self.matrices.items():
            if name in deltas:
                found[name] = quadratic_penalty(_with_bias(deltas, name, a.shape[-1]), a, b)
        for name, dense in self.vectors.items():
            if name in deltas:
                one = torch.ones(1, 1, 1, dtype=dense.dtype, device=dense.device)
                found[name] = quadratic_penalty(deltas[name].reshape(1, -1), dense.unsqueeze(0), one)
        return found


def bias_name(weight: str) -> str:
    """Name of the bias that belongs to a weight."""
    return weight.removesuffix("weight") + "bias"


def _with_bias(deltas: Mapping[str, Tensor], name: str, width: int) -> Tensor:
    """D = [dW, db], [o, d]; without a bias where the factor has no room for it."""
    weight = deltas[name].flatten(1)
    if weight.shape[1] == width:
        return weight
    bias = deltas.get(bias_name(name))
    column = weight.new_zeros(len(weight), 1) if bias is None else bias.reshape(-1, 1)
    return torch.cat([weight, column], dim=1)


def aggregate(statistics: Iterable[Statistics], mode: Mode = "accumulated") -> Curvature:
    """One quadratic form for several reference tasks.

    ``per-task`` keeps T pairs: ``sum_t (n_t / N) B_t (x) A_t`` with means over samples A_t, B_t. ``accumulated`` keeps
    one pair of the size of a single task, ``(sum_t B_t) (x) (sum_t (n_t / N) A_t)``, and reads the tasks one at a time.
    With equal factors in all tasks the second is T times the first, so a strength chosen for one mode does not fit the
    other. Dense matrices are the same in both.

    Args:
        statistics: ``kfac_a``, ``kfac_b`` and ``block`` sums of each reference task, in the same parameters.
        mode: see above.
    Raises:
        UserError: no tasks, no factors, or tasks that differ in their parameters or shapes.
    Reference: Porrello et al., "Dataless Weight Disentanglement in Task Arithmetic via Kronecker-Factored Approximate
    Curvature", ICLR 2026, arXiv 2602.17385, eq. 7 and 8.
    """
    a: dict[str, list[Tensor]] = {}
    b: dict[str, list[Tensor]] = {}
    dense: dict[str, list[Tensor]] = {}
    num_samples = 0
    names: set[tuple[str, str]] | None = None
    for task in statistics:
        own = {(kind, name) for kind, name in task if kind in ("kfac_a", "kfac_b", "block")}
        if not own:
            raise UserError("the statistics of a task hold no K-FAC factors; collect them with the kind kfac")
        if names is not None and own != names:
            raise UserError(f"tasks have K-FAC factors of different parameters, such as {min(own ^ names)[1]!r}")
        names = own
        keep_one = mode == "accumulated"
        for kind, name in own:
            entry = task.sum(kind, name)
            if kind == "kfac_a":
                _gather(a.setdefault(name, []), entry.total, name, keep_one)
            elif kind == "kfac_b":
                _gather(b.setdefault(name, []), entry.total / max(1, entry.num_samples), name, keep_one)
            else:
                _gather(dense.setdefault(name, []), entry.total, name, True)
        num_samples += max(task.sum(kind, name).num_samples for kind, name in own)
    if names is None:
        raise UserError("there are no reference tasks to take K-FAC factors of")
    share = 1 / max(1, num_samples)
    matrices = {name: Factors(torch.stack(values) * share, torch.stack(b[name])) for name, values in a.items()}
    return Curvature(matrices, {name: value[0] * share for name, value in dense.items()})


def _gather(kept: list[Tensor], value: Tensor, name: str, keep_one: bool) -> None:
    if kept and kept[0].shape != value.shape:
        raise UserError(f"K-FAC factors of {name!r} have shapes {list(kept[0].shape)} and {list(value.shape)}")
    if kept and keep_one:
        kept[0] = kept[0] + value
    else:
        kept.append(value)


class Tak:
    """Regulariser of fine-tuning: ``strength * (layers + vectors_scale * vectors + projection_scale * projection)``.

    Only parameters that the curvature speaks about are trained. Its values fit features of unit length.

    Args:
        curvature: of the other tasks, from :func:`aggregate`, on the device and in the dtype of the network.
        strength: lambda.
        vectors_scale: of LayerNorms and tokens.
        projection_scale: of the output projection.
        projection: glob patterns of the weight that is the output projection, which sees one token a sample.
    Reference: Porrello et al., "Dataless Weight Disentanglement in Task Arithmetic via Kronecker-Factored Approximate
    Curvature", ICLR 2026, arXiv 2602.17385.
    """

    def __init__(
        self,
        curvature: Curvature,
        *,
        strength: float = 100.0,
        vectors_scale: float = 10.0,
        projection_scale: float = 0.01,
        projection: Sequence[str] = (),
    ) -> None:
        self.curvature = curvature
        self.tracked = curvature.tracked()
        self.scales = {
            **{
                name: projection_scale if any(fnmatchcase(name, pattern) for pattern in projection) else 1.0
                for name in curvature.matrices
            },
            **dict.fromkeys(curvature.vectors, vectors_scale),
        }
        self.strength = strength

    def trains(self, name: str) -> bool:
        """Whether the penalty holds that parameter."""
        return name in self.tracked

    def compose(self, deltas: Mapping[str, Tensor]) -> None:
        """The loss is that of the network being trained."""

    def penalty(self, deltas: Mapping[str, Tensor]) -> Tensor:
        """What is added to the loss at these differences from the base: the drift they cause in the other tasks."""
        terms = [self.scales[name] * value for name, value in self.curvature.penalties(deltas).items()]
        return self.strength * torch.stack(terms).sum()

    def step(self, deltas: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """Nothing: all is in the penalty."""
        return {}


def disentanglement_error(
    alone: Sequence[nn.Module],
    together: nn.Module,
    batches: Sequence[Iterable[Tensor]],
    heads: Sequence[Tensor] | None = None,
) -> float:
    """How often a task's own model and the composed one disagree on the task's inputs, summed over tasks.

    ``sum_t E_{x of task t} [argmax f(x; base + alpha_t tau_t) != argmax f(x; base + sum_s alpha_s tau_s)]``

    Args:
        alone: base and one scaled task vector each, in evaluation mode.
        together: base and all scaled task vectors.
        batches: inputs of each task.
        heads: class vectors [K, E] of each task for networks that give embeddings; outputs are logits if None.
    Returns: between 0 and the number of tasks.
    Raises:
        ValueError: lists of different lengths.
    Reference: Ortiz-Jimenez, Favero and Frossard, "Task Arithmetic in the Tangent Space", NeurIPS 2023,
    arXiv 2305.12827, section 4.
    """
    error = 0.0
    for task, (own, inputs) in enumerate(zip(alone, batches, strict=True)):
        differ = seen = 0
        for batch in inputs:
            with torch.no_grad():
                outputs = own(batch), together(batch)
            first, second = outputs if heads is None else (value @ heads[task].T for value in outputs)
            differ += int((first.argmax(dim=1) != second.argmax(dim=1)).sum())
            seen += len(batch)
        error += differ / max(1, seen)
    return error
