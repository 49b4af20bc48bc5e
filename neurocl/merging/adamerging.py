"""AdaMerging: how much of each task vector to add, learned on unlabelled test inputs by making predictions certain.

``T`` tasks, ``L`` parameters that differ between the experts, ``B`` batch, ``K`` classes, ``E`` embedding.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurocl.errors import UserError

CoefficientMode = Literal["layer", "task"]


@dataclass(frozen=True)
class AdaMergingResult:
    """A merged network and how it came about.

    Attributes:
        model: the network, in evaluation mode.
        coefficients: one per task and parameter tensor, [T, L], or one per task, [T].
        names: of the L parameters.
        entropies: mean entropy of the predictions before every step, in nats.
    """

    model: nn.Module
    coefficients: Tensor
    names: tuple[str, ...]
    entropies: tuple[float, ...]


def ada_merging(
    base: nn.Module,
    experts: Sequence[nn.Module],
    batches: Sequence[Sequence[Tensor]],
    *,
    heads: Sequence[Tensor] | None = None,
    logit_scale: float = 1.0,
    mode: CoefficientMode = "layer",
    num_steps: int = 500,
    lr: float = 1e-3,
    init: float = 0.3,
    clamp: bool = False,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> AdaMergingResult:
    """Learn shares of task vectors that make predictions on unlabelled inputs sure.

    Works on the very inputs that the network is then tested on, but never sees their labels. The gradient of a
    coefficient is the dot product of the task vector with that of the weights, so one backward pass through the merged
    network is enough and the sum over tasks is not part of the graph.

    Args:
        base: the network that all experts were fine-tuned from.
        experts: T fine-tuned networks, on the same device.
        batches: unlabelled inputs of each task, gone through in a new order each time round.
        heads: class vectors [K, E] of each task for networks that give embeddings; outputs are logits if None.
        logit_scale: factor on the cosine of embedding and class vector; of no meaning without heads.
        mode: a coefficient per task and parameter tensor, or one per task.
        num_steps: Adam steps; each sees one batch of every task.
        lr: of Adam.
        init: of all coefficients.
        clamp: keep coefficients between 0 and 1.
        seed: of the order of batches.
        progress: called after every step with steps done, steps, entropy.
    Raises:
        UserError: no experts, networks of different architectures, or not one list of batches and head per expert.

    Reference: Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", ICLR 2024, arXiv 2310.02575.
    """
    _check(base, experts, batches, heads)
    model = copy.deepcopy(base).eval()
    with torch.no_grad():
        _average_buffers(model, experts)
        start, vectors = _task_vectors(base, experts)
    names = tuple(vectors)
    parameters = dict(model.named_parameters())
    for name, value in parameters.items():
        value.requires_grad_(name in vectors)
    coefficients = torch.full((len(experts), len(names) if mode == "layer" else 1), init, dtype=torch.float64)
    adam = torch.optim.Adam([coefficients], lr=lr)
    streams = [_shuffled(own, seed, task) for task, own in enumerate(batches)]
    entropies = []
    for step in range(num_steps if names else 0):
        _write(parameters, start, vectors, coefficients)
        model.zero_grad(set_to_none=True)
        entropy = 0.0
        for task, stream in enumerate(streams):
            output = model(next(stream))
            if heads is not None:
                output = logit_scale * F.normalize(output, dim=1) @ heads[task].to(output).T
            loss = mean_entropy(output) / len(experts)
            loss.backward()
            entropy += loss.item()
        columns = [vectors[name].flatten(1) @ _gradient(parameters[name]).flatten() for name in names]
        gradient = torch.stack(columns, dim=1).to(coefficients)
        coefficients.grad = gradient if mode == "layer" else gradient.sum(dim=1, keepdim=True)
        adam.step()
        if clamp:
            coefficients.clamp_(0, 1)
        entropies.append(entropy)
        if progress is not None:
            progress(step + 1, num_steps, entropy)
    _write(parameters, start, vectors, coefficients)
    model.zero_grad(set_to_none=True)
    for value in parameters.values():
        value.requires_grad_(True)
    found = coefficients if mode == "layer" else coefficients[:, 0]
    return AdaMergingResult(model, found.detach().clone(), names, tuple(entropies))


def mean_entropy(logits: Tensor) -> Tensor:
    """Mean over samples of ``-sum_k p_k log p_k`` in nats, logits [B, K]."""
    log_p = logits.log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1).mean()


def _check(
    base: nn.Module,
    experts: Sequence[nn.Module],
    batches: Sequence[Sequence[Tensor]],
    heads: Sequence[Tensor] | None,
) -> None:
    if not experts:
        raise UserError("AdaMerging needs at least one expert")
    for what, given in (("lists of batches", batches), ("heads", heads)):
        if given is not None and len(given) != len(experts):
            raise UserError(f"{len(given)} {what} for {len(experts)} experts")
    for task, own in enumerate(batches):
        if not len(own):
            raise UserError(f"there are no batches of task {task + 1}")
    shapes = {name: value.shape for name, value in base.named_parameters()}
    for number, expert in enumerate(experts, start=1):
        if {name: value.shape for name, value in expert.named_parameters()} != shapes:
            raise UserError(f"expert {number} does not have the parameters of the base")


def _average_buffers(model: nn.Module, experts: Sequence[nn.Module]) -> None:
    """Running statistics become the experts' mean; integers stay the base's."""
    own = [dict(expert.named_buffers()) for expert in experts]
    for name, value in model.named_buffers():
        if value.is_floating_point():
            value.copy_(torch.stack([buffers[name].double() for buffers in own]).mean(dim=0))


def _task_vectors(base: nn.Module, experts: Sequence[nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(parameters of the base, task vectors [T, *shape]) by name, without what is the same in all experts."""
    own = [dict(expert.named_parameters()) for expert in experts]
    start: dict[str, Tensor] = {}
    vectors: dict[str, Tensor] = {}
    for name, value in base.named_parameters():
        change = torch.stack([parameters[name].detach() - value.detach() for parameters in own])
        if change.any():
            start[name], vectors[name] = value.detach().clone(), change
    return start, vectors


def _shuffled(batches: Sequence[Tensor], seed: int, task: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed((seed << 16) + task)
    for _ in itertools.count():
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


@torch.no_grad()
def _write(
    parameters: dict[str, nn.Parameter], start: dict[str, Tensor], vectors: dict[str, Tensor], coefficients: Tensor
) -> None:
    """Set the network to ``start + sum_t c_t tau_t``."""
    per_name = coefficients.expand(-1, len(vectors)).unbind(dim=1)
    for (name, vector), column in zip(vectors.items(), per_name, strict=True):
        change = column.to(vector) @ vector.flatten(1)
        parameters[name].copy_(start[name] + change.reshape(start[name].shape))


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient, zero where the loss does not depend on the parameter."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
