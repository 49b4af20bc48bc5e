"""Collecting the statistics of a network's layers from a stream of batches, by hooks on an unchanged network.

``B`` samples of a batch, ``R`` rows (tokens) of a sample, ``K`` outputs of the network (classes or features).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neurocl.errors import UserError
from neurocl.merging.linear_inputs import (
    Batch,
    Forward,
    RowMask,
    Tap,
    add_gram,
    attention_mask,
    batch_size,
    evaluating,
    find_taps,
    moved,
    rows_of,
    run,
    watched,
)
from neurocl.merging.sample_gradients import (
    LAYERS,
    Call,
    Layout,
    Rows,
    add_embedding_squares,
    bare_gradients,
    chunks,
    layer_gradients,
    record,
)
from neurocl.merging.statistics import Statistics

Wanted = Literal["gram", "fisher", "kfac"]
FisherKind = Literal["exact", "sampled", "empirical"]
Makers = dict[str, list[Callable[[slice], Tensor]]]

log = logging.getLogger(__name__)


def collect(
    module: nn.Module,
    batches: Iterable[Batch],
    *,
    kinds: Sequence[Wanted] = ("gram",),
    parameters: Sequence[str] | None = None,
    forward: Forward | None = None,
    row_mask: RowMask | None = None,
    diagonal: bool = False,
    conv: bool = False,
    fisher: FisherKind = "exact",
    num_draws: int = 1,
    num_probes: int = 1,
    probes: Tensor | None = None,
    batch_first: bool | None = None,
    seed: int = 0,
) -> Statistics:
    """Statistics of the layers of ``module`` on ``batches``, in evaluation mode; the module comes back as it was.

    ``"gram"`` reads the inputs of ``nn.Linear`` and ``nn.MultiheadAttention`` (and ``nn.Conv2d`` if ``conv``).
    ``"fisher"`` squares the gradient of each sample, after the sum over its tokens, for every parameter.
    ``"kfac"`` gives, for the output features f of the network and its Gauss-Newton matrix E[J^T J], Kronecker factors
    ``kfac_a`` and ``kfac_b`` of every ``nn.Linear`` and dense ``block`` matrices of LayerNorm weights and biases and
    of parameter vectors outside such layers (a class embedding).

    Args:
        module: the network.
        batches: tensors, lists or tuples ``(x, labels)``, or dicts of keyword arguments; samples along the first axis.
        kinds: what to collect; ``"fisher"`` and ``"kfac"`` need an output [B, K].
        parameters: glob patterns of parameter names (``"blocks.*.weight"``); None takes all.
        forward: from network and batch to its output, where calling the network on the batch is not enough.
        row_mask: from a batch to [B, S], zero where a token is padding; by default ``attention_mask`` of a dict batch.
        diagonal: keep only the diagonal of Gram matrices.
        conv: also read convolutions, as matrices on unfolded patches.
        fisher: expectation over the network's own classes (one backward pass per class), labels sampled from the
            network's prediction, or the labels of the batches (``batch[1]`` or ``batch["labels"]``).
        num_draws: labels per sample for ``fisher="sampled"``.
        num_probes: Gaussian probes per sample for ``"kfac"``, averaged; 0 sums over all output features exactly.
        probes: the probes themselves, [num_probes, samples of all batches, K], instead of drawn ones.
        batch_first: which axis counts samples; None finds out from the batch size.
        seed: of labels and probes.
    Raises:
        UserError: no batches, nothing matches ``parameters``, the output is not [B, K], labels are missing, or the
            samples cannot be told apart.
        ValueError: an unknown kind or a count below its minimum.
    Reference: Kunstner, Balles and Hennig, "Limitations of the empirical Fisher approximation for natural gradient
    descent", NeurIPS 2019, arXiv 1905.12558; Martens and Grosse, "Optimizing neural networks with Kronecker-factored
    approximate curvature", ICML 2015, arXiv 1503.05671.
    """
    unknown = set(kinds) - {"gram", "fisher", "kfac"}
    if unknown or not kinds:
        raise ValueError(f"kinds must be some of gram, fisher, kfac, got {list(kinds)}")
    if num_draws < 1 or num_probes < 0:
        raise ValueError(f"num_draws from 1 and num_probes from 0 expected, got {num_draws} and {num_probes}")
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    selected = _Selection(module, parameters)
    sums = _Sums(module, device, diagonal)
    call = forward or run
    taps = [tap for tap in find_taps(module, conv=conv) if sums.weight(tap) in selected.names]
    taps = taps if "gram" in kinds else []
    if set(kinds) == {"gram"} and not taps:
        raise UserError("no linear layer of the network matches; there is no Gram matrix to collect")
    gradients = "fisher" in kinds or "kfac" in kinds
    layout, seen, mask = Layout(batch_first), 0, None
    row_mask = row_mask or attention_mask

    def receive(tap: Tap, value: Tensor) -> None:
        sums.add_rows(sums.weight(tap), rows_of(value, mask))

    with evaluating(module):
        for raw in batches:
            batch = moved(raw, device)
            size, mask = batch_size(batch), row_mask(batch)
            calls: list[Call] = []
            handles = record(selected.layers, calls) if gradients else []
            try:
                with watched(module, taps, receive), torch.set_grad_enabled(gradients):
                    output = call(module, batch)
            finally:
                for handle in handles:
                    handle.remove()
            if gradients:
                flow = _Flow(module, call, batch, _output(output, size), calls, layout, size, mask, selected)
                with torch.no_grad():
                    if "fisher" in kinds:
                        _add_fisher(sums, flow, _fisher_seeds(fisher, flow.output, batch, num_draws, generator))
                    if "kfac" in kinds:
                        given = None if probes is None else probes[:, seen : seen + size]
                        _add_kfac(sums, flow, _kfac_seeds(flow.output, num_probes, given, generator))
            seen += size
            sums.count(size)
    if not seen:
        raise UserError("there are no batches to collect statistics from")
    if missing := [tap.weight for tap in taps if ("gram", sums.weight(tap)) not in sums.totals]:
        log.warning("no Gram matrix for %s: the layer never ran, or not on a single input", ", ".join(missing))
    return sums.statistics()


class _Selection:
    """The parameters that were asked for, the layers whose calls are recorded for them, and those outside layers."""

    def __init__(self, module: nn.Module, patterns: Sequence[str] | None) -> None:
        every = [name for name, value in module.named_parameters() if value.is_floating_point()]
        self.names = {n for n in every if patterns is None or any(fnmatchcase(n, pattern) for pattern in patterns)}
        if not self.names:
            raise UserError(f"no parameter of the network matches {', '.join(patterns or ('*',))}")
        ids = {id(module.get_parameter(name)) for name in self.names}
        uncalled = {id(part.out_proj) for part in module.modules() if isinstance(part, nn.MultiheadAttention)}
        self.layers: dict[str, nn.Module] = {}
        owned: set[int] = set()
        for name, part in module.named_modules():
            if isinstance(part, LAYERS) and id(part) not in uncalled:
                own = {id(value) for value in part.parameters(recurse=False)}
                if own & ids:
                    self.layers[name] = part
                    owned |= own
        self.bare = [name for name in every if name in self.names and id(module.get_parameter(name)) not in owned]


@dataclass
class _Sums:
    """Running totals in float64 on the network's device."""

    module: nn.Module
    device: torch.device
    diagonal: bool
    totals: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    num_rows: dict[tuple[str, str], int] = field(default_factory=dict)
    num_samples: dict[tuple[str, str], int] = field(default_factory=dict)
    touched: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.canonical = {id(value): name for name, value in self.module.named_parameters()}

    def name(self, layer: nn.Module, key: str) -> str:
        """The one name of a parameter, also where several layers share it."""
        return self.canonical[id(getattr(layer, key))]

    def weight(self, tap: Tap) -> str:
        """The one name of the matrix that a tap reads."""
        return self.canonical[id(self.module.get_parameter(tap.weight))]

    def total(self, kind: str, name: str, shape: Sequence[int], rows: int) -> Tensor:
        """The running total, made on first use, with ``rows`` added to its count."""
        key = (kind, name)
        if key not in self.totals:
            self.totals[key] = torch.zeros(*shape, dtype=torch.float64, device=self.device)
        self.num_rows[key] = self.num_rows.get(key, 0) + rows
        self.touched.add(key)
        return self.totals[key]

    def add_rows(self, name: str, rows: Tensor) -> None:
        width = rows.shape[1]
        add_gram(self.total("gram", name, [width] if self.diagonal else [width, width], len(rows)), rows)

    def count(self, size: int) -> None:
        """Close a batch: its samples count once for every total that it touched."""
        for key in self.touched:
            self.num_samples[key] = self.num_samples.get(key, 0) + size
        self.touched.clear()

    def statistics(self) -> Statistics:
        result = Statistics()
        for (kind, name), total in self.totals.items():
            samples, rows = self.num_samples[kind, name], self.num_rows[kind, name]
            result.add(kind, name, total.cpu(), num_samples=samples, num_rows=rows)
        return result


@dataclass
class _Flow:
    """One forward pass with its recorded calls, ready for any number of backward passes."""

    module: nn.Module
    forward: Forward
    batch: Batch
    output: Tensor
    calls: list[Call]
    layout: Layout
    size: int
    mask: Tensor | None
    selected: _Selection

    def back(self, seed: Tensor) -> list[Tensor | None]:
        """Gradients of ``sum(output * seed)`` with respect to the output of every call; None where it has no say."""
        if not self.calls:
            return []
        outputs = [call.output for call in self.calls]
        found = torch.autograd.grad(self.output, outputs, seed, retain_graph=True, allow_unused=True)
        return list(found)

    def bare_parts(self, names: list[str], seed: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Per-sample gradients [b, *shape] of parameters outside recorded layers, some samples at a time."""
        if not names:
            return
        tensor = self.batch[0] if isinstance(self.batch, list) else self.batch
        for part in chunks(self.size, sum(self.module.get_parameter(name).numel() for name in names)):
            piece = {k: v[part] for k, v in tensor.items()} if isinstance(tensor, Mapping) else tensor[part]

            def through(inner: nn.Module, sample: Batch) -> Tensor:
                given = [sample] if isinstance(self.batch, list) else sample
                return _output(self.forward(inner, given), 1)

            yield from zip(
                names, bare_gradients(self.module, through, names, piece, seed[part].contiguous()), strict=True
            )


def _output(output: Any, size: int) -> Tensor:
    """The tensor [B, K] of whatever a network returns."""
    value = getattr(output, "logits", output)
    value = value[0] if isinstance(value, list | tuple) else value
    if not isinstance(value, Tensor) or value.ndim != 2 or len(value) != size:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"the network must return [{size}, classes or features] for Fisher and KFAC, got {shape}")
    return value


def _fisher_seeds(
    kind: FisherKind, logits: Tensor, batch: Batch, num_draws: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """What flows back into the logits so that squared per-sample gradients add up to the diagonal Fisher.

    d log p_y / d logits = onehot(y) - p. The expectation over classes weighs its square by p_y, hence sqrt(p_y).
    """
    p = logits.double().softmax(dim=1)
    eye = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    if kind == "exact":
        for label in range(p.shape[1]):
            yield (p[:, label].sqrt().unsqueeze(1) * (eye[label] - p)).to(logits.dtype)
    elif kind == "sampled":
        drawn = torch.multinomial(p.cpu(), num_draws, replacement=True, generator=generator).to(p.device)
        for labels in drawn.T:
            yield ((eye[labels] - p) / num_draws**0.5).to(logits.dtype)
    else:
        yield (eye[_labels(batch, p.shape[1])] - p).to(logits.dtype)


def _labels(batch: Batch, num_classes: int) -> Tensor:
    found = batch.get("labels") if isinstance(batch, Mapping) else batch[1] if isinstance(batch, list) else None
    if not isinstance(found, Tensor) or found.ndim != 1:
        raise UserError("the empirical Fisher needs labels: batches (x, labels) or dicts with 'labels' [B]")
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < num_classes:
        raise UserError(f"labels must lie in 0..{num_classes - 1}, got {int(found.min())}..{int(found.max())}")
    return found.long()


def _add_fisher(sums: _Sums, flow: _Flow, seeds: Iterator[Tensor]) -> None:
    for index, seed in enumerate(seeds):
        first = index == 0
        gradients = flow.back(seed)
        makers = _makers(sums, flow, gradients)
        for name, positions in _uses(sums, flow).items():
            value = sums.module.get_parameter(name)
            rows = sum(_rows_out(flow.calls[at]) for at in positions) if first else 0
            total = sums.total("fisher", name, value.shape, rows)
            call, gradient = flow.calls[positions[0]], gradients[positions[0]]
            if len(positions) == 1 and gradient is not None and isinstance(call.layer, nn.Embedding):
                add_embedding_squares(total, call, gradient, flow.layout, flow.size)
            elif name in makers:
                for part in chunks(flow.size, value.numel()):
                    total += _added(makers[name], part).square().sum(0)
        for name, values in flow.bare_parts(flow.selected.bare, seed):
            sums.total("fisher", name, values.shape[1:], len(values) if first else 0).add_(values.square().sum(0))


def _rows_out(call: Call) -> int:
    """Rows that a call produced: output positions of a convolution, tokens of every other layer."""
    channels = call.output.shape[1] if isinstance(call.layer, nn.Conv2d) else call.output.shape[-1]
    return call.output.numel() // max(1, channels)


def _uses(sums: _Sums, flow: _Flow) -> dict[str, list[int]]:
    """In which calls each selected parameter of a recorded layer takes part."""
    uses: dict[str, list[int]] = {}
    for position, call in enumerate(flow.calls):
        for key, _ in call.layer.named_parameters(recurse=False):
            if (name := sums.name(call.layer, key)) in flow.selected.names:
                uses.setdefault(name, []).append(position)
    return uses


def _makers(sums: _Sums, flow: _Flow, gradients: list[Tensor | None]) -> Makers:
    """Per-sample gradient makers by parameter; a parameter used in several calls has several, to be added."""
    makers: Makers = {}
    for call, gradient in zip(flow.calls, gradients, strict=True):
        if gradient is not None:
            for key, make in layer_gradients(call, gradient, flow.layout, flow.size).items():
                if (name := sums.name(call.layer, key)) in flow.selected.names:
                    makers.setdefault(name, []).append(make)
    return makers


def _added(makers: list[Callable[[slice], Tensor]], part: slice) -> Tensor:
    result = makers[0](part)
    for make in makers[1:]:
        result = result + make(part)
    return result


def _kfac_seeds(features: Tensor, num_probes: int, given: Tensor | None, generator: torch.Generator) -> list[Tensor]:
    """Unit vectors of all features, or Gaussian probes scaled so that their squares average."""
    size, width = features.shape
    if given is None and num_probes == 0:
        eye = torch.eye(width, dtype=features.dtype, device=features.device)
        return [row.expand(size, width) for row in eye]
    if given is None:
        given = torch.randn(num_probes, size, width, generator=generator, dtype=torch.float64)
    if given.shape[1:] != features.shape:
        raise UserError(f"probes must be [draws, samples, {width}] for all samples, got {list(given.shape)} here")
    return list(given.to(features.device, features.dtype) / len(given) ** 0.5)


def _add_kfac(sums: _Sums, flow: _Flow, seeds: list[Tensor]) -> None:
    names = flow.selected.names
    rows = {
        at: Rows.of(call, flow.layout, flow.size, flow.mask)
        for at, call in enumerate(flow.calls)
        if isinstance(call.layer, nn.Linear) and sums.name(call.layer, "weight") in names
    }
    for at, own in rows.items():
        layer, a = flow.calls[at].layer, own.inputs
        if layer.bias is not None:
            a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], dim=2)
        add_gram(sums.total("kfac_a", sums.name(layer, "weight"), [a.shape[2]] * 2, own.num_rows), own.scaled(a))
    vectors = [name for name in flow.selected.bare if _is_vector(sums.module.get_parameter(name))]
    for index, seed in enumerate(seeds):
        first = index == 0
        gradients = flow.back(seed)
        for at, own in rows.items():
            call, gradient = flow.calls[at], gradients[at]
            name, width = sums.name(call.layer, "weight"), call.output.shape[-1]
            total = sums.total("kfac_b", name, [width] * 2, own.num_rows if first else 0)
            if gradient is not None:
                add_gram(total, own.scaled(flow.layout.by_sample(call.name, gradient, flow.size, 1)))
        norms: list[Tensor | None] = [
            gradient if isinstance(call.layer, nn.LayerNorm) else None
            for call, gradient in zip(flow.calls, gradients, strict=True)
        ]
        parts = [(name, _added(made, slice(None))) for name, made in _makers(sums, flow, norms).items()]
        for name, values in [*parts, *flow.bare_parts(vectors, seed)]:
            u = values.flatten(1)
            add_gram(sums.total("block", name, [u.shape[1]] * 2, len(u) if first else 0), u)


def _is_vector(value: Tensor) -> bool:
    """Whether at most one axis is longer than 1: a class embedding, not a table of positions."""
    return max(value.shape, default=1) == value.numel()
