"""Chain of Merges: linear layers merged first to last, each on the activations of the network merged so far.

``T`` tasks with one expert each, ``o`` outputs and ``d`` inputs of a layer. X_i are the inputs of a layer when expert i
runs on its data, Xh_i when the merged network does; G_i = X_i^T X_i, Gh_i = Xh_i^T Xh_i, C_i = X_i^T Xh_i.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from neurocl.errors import UserError
from neurocl.merging.activation_chain import (
    Invocation,
    Stage,
    Walker,
    check_sequence,
    invocations,
    mean_model,
    repeatable,
    stacked,
    trace_stages,
    whole_network,
)
from neurocl.merging.linear_inputs import Batch, Forward, RowMask, Tap, add_gram
from neurocl.merging.regmean import merge_responses, shrunk

Target = Literal["merged", "expert"]
TaskWeighting = Literal["none", "offdiag", "trace", "response"]
GramReduction = Literal["mean", "sum"]
Progress = Callable[[int, int, list[str]], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """What happened to one stage.

    Attributes:
        names: the layers that read the same input.
        skipped: those among them that are equal in all experts.
        num_rows: input rows per task.
        condition: condition number of the (shrunk, ridged) system, or None without diagnostics.
        shift_before: per task, distance between the normalised Gram matrices of the expert's inputs and of the
            plainly averaged network's, ||G/||G|| - Gh/||Gh|| ||, or None without diagnostics.
        shift_after: the same for the merged network when the chain reaches the stage.
    """

    names: list[str]
    skipped: list[str]
    num_rows: list[int]
    condition: float | None = None
    shift_before: list[float] | None = None
    shift_after: list[float] | None = None


@dataclass(frozen=True)
class ChainResult:
    """The merged network, in evaluation mode, and a report for every stage in the order of the chain."""

    model: nn.Module
    layers: list[LayerReport]


def chain_of_merges(
    base: nn.Module | None,
    experts: Sequence[nn.Module],
    batches: Sequence[Iterable[Batch]],
    *,
    target: Target = "merged",
    off_diagonal: float = 0.95,
    ridge: float = 1e-4,
    weights: Sequence[float] | None = None,
    task_weighting: TaskWeighting = "none",
    fit_bias: bool = False,
    gram_reduction: GramReduction = "mean",
    conv: bool = False,
    stages: Sequence[Sequence[str]] | None = None,
    blocks: Sequence[str] | None = None,
    forward: Forward | None = None,
    row_mask: RowMask | None = None,
    diagnostics: bool = False,
    progress: Progress | None = None,
) -> ChainResult:
    """Merge experts layer by layer, refreshing the statistics of every layer with the part that is merged already.

    target="merged": W = (sum c_i W_i Gh_i)(sum c_i Gh_i)^-1, the responses of the experts' layers to the inputs that
    the merged network really sees. target="expert": W = (sum c_i W_i C_i)(sum c_i Gh_i)^-1, the responses that the
    experts give in their own network, which also repairs drift from further up. Both are solved as deviations from the
    mean, with entries off the diagonal of Gh_i and C_i times ``off_diagonal``. Everything that is no linear layer, and
    biases, is averaged before the chain starts; layers that are equal in all experts stay.

    Args:
        base: network whose buffers and architecture the result takes; the first expert if None.
        experts: fine-tuned networks of one architecture, on one device.
        batches: unlabelled calibration data of each expert, the same batches each time they are walked through.
        target: whose responses to match.
        off_diagonal: from 0 (only the diagonal is used) to 1.
        ridge: pull towards the mean, relative to the mean of the system's diagonal; 0 uses the pseudo-inverse.
        weights: weight c_i of each task; one each if None.
        task_weighting: factor on c_i, layer by layer: ``"offdiag"`` the mean absolute correlation of the inputs,
            ``"trace"`` 1 / tr Gh_i, ``"response"`` ||W_i||^2 / ||X_i W_i^T||^2.
        fit_bias: solve for the bias too, as the weight of a constant input.
        gram_reduction: mean over rows (tasks weigh equally) or sum (they weigh by their rows).
        conv: also solve convolutions, as matrices on unfolded patches, instead of averaging them.
        stages: names of the layers of each stage, in order; found by a forward pass if None.
        blocks: names of submodules that run one after the other, each on the output of the one before; their inputs
            are then kept, so that a stage costs one block instead of a forward pass.
        forward: from network and batch to output, where calling the network on the batch is not enough.
        row_mask: from a batch to [B, S], zero where a token is padding; by default ``attention_mask`` of a dict.
        diagnostics: also report condition numbers and shifts, for two further networks' forward passes.
        progress: called with the number of stages done, of all stages, and the names of the next.
    Raises:
        UserError: networks or data that do not fit together, BatchNorm, blocks that are no sequence.
        ValueError: an option outside its range.
    Reference: Buzzega, Salami, Porrello and Calderara, "Rethinking layer-wise model merging through chain of merges",
    arXiv 2508.21421. There is no public code; target="expert" follows IterIS, arXiv 2411.15231.
    """
    if not 0 <= off_diagonal <= 1 or ridge < 0:
        raise ValueError(f"off_diagonal in [0, 1] and ridge from 0 expected, got {off_diagonal} and {ridge}")
    if len(experts) != len(batches) or (weights is not None and len(weights) != len(experts)):
        raise UserError(f"one data set (and one weight) for each of the {len(experts)} experts expected")
    merged = mean_model(base, experts)
    data = repeatable(batches)
    device = next(merged.parameters()).device
    first = next(iter(invocations(data[0], row_mask, device)))
    order = _named_stages(merged, first, forward, conv, stages)
    route = _route(merged, first, forward, order, blocks or ())

    def walkers(networks: Sequence[nn.Module]) -> list[Walker]:
        def calls_of(own: Iterable[Batch]) -> Callable[[], Iterable[Invocation]]:
            return lambda: invocations(own, row_mask, device)

        return [Walker(network, calls_of(own), forward) for network, own in zip(networks, data, strict=True)]

    want_experts = target == "expert" or task_weighting == "response" or diagnostics
    chain = _Chain(
        merged=walkers([merged] * len(experts)),
        experts=walkers(experts) if want_experts else None,
        plain=walkers([mean_model(base, experts)] * len(experts)) if diagnostics else None,
        device=device,
    )
    solver = _Solver(merged, experts, chain, target, off_diagonal, ridge, weights, task_weighting, fit_bias)
    reports: list[LayerReport] = []
    for block, inside in route:
        chain.go_to(block)
        for stage in inside:
            if progress is not None:
                progress(len(reports), len(order), stage.names)
            reports.append(solver.merge(stage, gram_reduction, diagnostics))
    return ChainResult(merged, reports)


def _named_stages(
    network: nn.Module,
    call: Invocation,
    forward: Forward | None,
    conv: bool,
    names: Sequence[Sequence[str]] | None,
) -> list[Stage]:
    """The stages of the chain: traced, or traced and put together as the user names them."""
    traced = trace_stages(network, whole_network(forward), call, conv=conv)
    for stage in traced:
        if stage.num_calls > 1:
            log.warning("%s runs %d times; it is merged once", ", ".join(stage.names), stage.num_calls)
    if names is None:
        return traced
    known = {tap.name: (tap, stage.num_calls) for stage in traced for tap in stage.taps}
    chosen = []
    for group in names:
        for name in group:
            if name not in known:
                raise UserError(f"stages: {name!r} is no linear layer that runs (there are {', '.join(known)})")
        chosen.append(Stage(tuple(known[name][0] for name in group), known[group[0]][1]))
    return chosen


def _route(
    network: nn.Module, call: Invocation, forward: Forward | None, stages: Sequence[Stage], blocks: Sequence[str]
) -> list[tuple[str | None, list[Stage]]]:
    """Which stages are merged inside which block; None stands for whole forward passes.

    Raises:
        UserError: blocks that are no sequence, or stages that do not follow it.
    """
    if blocks:
        check_sequence(network, whole_network(forward), call, blocks)

    def home(stage: Stage) -> int | None:
        inside = {
            next((i for i, block in enumerate(blocks) if f"{tap.module}.".startswith(f"{block}.")), None)
            for tap in stage.taps
        }
        return inside.pop() if len(inside) == 1 else None

    route: list[tuple[str | None, list[Stage]]] = [(None, []), *((block, []) for block in blocks), (None, [])]
    place = 0
    for stage in stages:
        where = home(stage)
        following = where + 1 if where is not None else (0 if place == 0 else len(route) - 1)
        if following < place:
            raise UserError(f"layers {', '.join(stage.names)} do not run in the order of the blocks")
        place = following
        route[place][1].append(stage)
    return route


@dataclass
class _Chain:
    """Walkers of every task through the merged network, the experts and the plainly averaged network."""

    merged: list[Walker]
    experts: list[Walker] | None
    plain: list[Walker] | None
    device: torch.device

    def go_to(self, block: str | None) -> None:
        for walker in [*self.merged, *(self.experts or ()), *(self.plain or ())]:
            if block is None:
                walker.leave()
            else:
                walker.enter(block)


@dataclass
class _Sums:
    """Gram matrices of one stage and one task."""

    gram: Tensor
    cross: Tensor | None
    own: Tensor | None
    plain: Tensor | None
    num_rows: int


@dataclass
class _Solver:
    """Collects the statistics of a stage and writes its solution into the merged network."""

    network: nn.Module
    experts: Sequence[nn.Module]
    chain: _Chain
    target: Target
    off_diagonal: float
    ridge: float
    weights: Sequence[float] | None
    task_weighting: TaskWeighting
    fit_bias: bool

    def merge(self, stage: Stage, reduction: GramReduction, diagnostics: bool) -> LayerReport:
        skipped = [tap for tap in stage.taps if self._agree(tap)]
        if len(skipped) == len(stage.taps) and not diagnostics:
            return LayerReport(stage.names, stage.names, [])
        with_bias = self.fit_bias and any(tap.bias is not None for tap in stage.taps)
        plain_diagonal = self.off_diagonal == 0 and self.task_weighting in ("none", "trace")
        diagonal = plain_diagonal and not with_bias and not diagnostics
        sums = [self._sums(stage, task, with_bias, diagonal) for task in range(len(self.experts))]
        scale = [1 / max(1, own.num_rows) if reduction == "mean" else 1.0 for own in sums]
        grams = torch.stack([own.gram * s for own, s in zip(sums, scale, strict=True)])
        crosses = [own.cross * s for own, s in zip(sums, scale, strict=True) if own.cross is not None]
        grams_used = shrunk(grams, self.off_diagonal)
        crosses_used = shrunk(torch.stack(crosses), self.off_diagonal) if crosses else None
        with torch.no_grad():
            for tap in stage.taps:
                if tap not in skipped:
                    self._solve(tap, sums, grams, grams_used, crosses_used, with_bias)
        names = [tap.name for tap in skipped]
        if not diagnostics:
            return LayerReport(stage.names, names, [own.num_rows for own in sums])
        system = torch.einsum("n,n...->...", self._task_weights(stage.taps[0], sums, grams, with_bias), grams_used)
        return LayerReport(
            stage.names,
            names,
            [own.num_rows for own in sums],
            condition=_condition(system, self.ridge),
            shift_before=[_shift(own.own, own.plain) for own in sums],
            shift_after=[_shift(own.own, own.gram) for own in sums],
        )

    def _agree(self, tap: Tap) -> bool:
        """Whether all experts have the same layer."""
        names = [tap.weight, *([tap.bias] if tap.bias is not None and self.fit_bias else [])]
        return all(bool((values == values[:1]).all()) for values in (stacked(self.experts, name) for name in names))

    def _sums(self, stage: Stage, task: int, with_bias: bool, diagonal: bool) -> _Sums:
        chain = self.chain
        seen = chain.merged[task].rows(stage)
        own = chain.experts[task].rows(stage) if chain.experts is not None else None
        plain = chain.plain[task].rows(stage) if chain.plain is not None else None
        result: _Sums | None = None
        for rows in seen:
            rows = _with_constant(rows) if with_bias else rows
            expert = None if own is None else next(own)
            average = None if plain is None else next(plain)
            if expert is not None and with_bias:
                expert = _with_constant(expert)
            if average is not None and with_bias:
                average = _with_constant(average)
            if expert is not None and expert.shape != rows.shape:
                raise UserError(f"{stage.names[0]} sees {len(expert)} rows in an expert and {len(rows)} when merged")
            if result is None:
                shape = (rows.shape[1],) * (1 if diagonal else 2)
                new = [torch.zeros(shape, dtype=torch.float64, device=chain.device) for _ in range(4)]
                result = _Sums(
                    new[0],
                    new[1] if self.target == "expert" else None,
                    new[2] if own is not None else None,
                    new[3] if plain is not None else None,
                    0,
                )
            add_gram(result.gram, rows)
            result.num_rows += len(rows)
            if expert is not None and result.cross is not None:
                add_gram(result.cross, expert, rows)
            if expert is not None and result.own is not None:
                add_gram(result.own, expert)
            if average is not None and result.plain is not None:
                add_gram(result.plain, average)
        assert result is not None
        return result

    def _solve(
        self,
        tap: Tap,
        sums: Sequence[_Sums],
        grams: Tensor,
        grams_used: Tensor,
        crosses_used: Tensor | None,
        with_bias: bool,
    ) -> None:
        matrices = stacked(self.experts, tap.weight).flatten(2)
        solves_bias = with_bias and tap.bias is not None
        if solves_bias:
            assert tap.bias is not None
            matrices = torch.cat([matrices, stacked(self.experts, tap.bias).unsqueeze(2)], dim=2)
        elif with_bias:
            grams_used = grams_used[:, :-1, :-1] if grams_used.ndim == 3 else grams_used[:, :-1]
            if crosses_used is not None:
                crosses_used = crosses_used[:, :-1, :-1] if crosses_used.ndim == 3 else crosses_used[:, :-1]
        c = self._task_weights(tap, sums, grams, with_bias)
        solution = merge_responses(matrices, grams_used, crosses=crosses_used, weights=c, ridge=self.ridge)
        weight = self.network.get_parameter(tap.weight)
        if solves_bias:
            assert tap.bias is not None
            self.network.get_parameter(tap.bias).copy_(solution[:, -1])
            solution = solution[:, :-1]
        weight.copy_(solution.reshape(weight.shape))

    def _task_weights(self, tap: Tap, sums: Sequence[_Sums], grams: Tensor, with_bias: bool) -> Tensor:
        """c_i [T] of one layer; those of ``task_weighting`` have mean 1."""
        if with_bias:
            grams = grams[:, :-1, :-1]
        given = torch.ones(len(sums)) if self.weights is None else torch.tensor(list(self.weights))
        given = given.to(grams)
        if self.task_weighting == "none":
            return given
        if self.task_weighting == "offdiag":
            factor = _correlation(grams)
        elif self.task_weighting == "trace":
            trace = grams.sum(1) if grams.ndim == 2 else grams.diagonal(dim1=1, dim2=2).sum(1)
            factor = _inverse(trace)
        else:
            matrices = stacked(self.experts, tap.weight).flatten(2)
            energies = []
            for own, matrix in zip(sums, matrices, strict=True):
                assert own.own is not None
                gram = own.own[: matrix.shape[1], : matrix.shape[1]]
                energies.append(((matrix @ gram) * matrix).sum())
            factor = matrices.square().sum((1, 2)) * _inverse(torch.stack(energies))
        total = factor.sum()
        return given * (len(sums) * factor / total if float(total) > 0 else torch.ones_like(factor))


def _with_constant(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def _correlation(grams: Tensor) -> Tensor:
    """Mean absolute correlation off the diagonal of Gram matrices [T, d, d]; 0 for a single feature."""
    root = grams.diagonal(dim1=1, dim2=2).sqrt()
    inverse = _inverse(root)
    normal = grams * inverse.unsqueeze(1) * inverse.unsqueeze(2)
    d = grams.shape[1]
    off = normal.abs().sum((1, 2)) - normal.diagonal(dim1=1, dim2=2).abs().sum(1)
    return off / max(1, d * (d - 1))


def _inverse(values: Tensor) -> Tensor:
    """1 / values, and 0 where there is nothing to divide by."""
    return torch.where(values > 0, torch.where(values > 0, values, torch.ones_like(values)).reciprocal(), 0.0)


def _condition(system: Tensor, ridge: float) -> float:
    """Condition number of ``system`` [d, d] or [d] with its ridge; infinite if it is singular."""
    diagonal = system if system.ndim == 1 else system.diagonal()
    values = (system if system.ndim == 1 else torch.linalg.eigvalsh(system)) + ridge * diagonal.mean()
    low, high = float(values.min()), float(values.max())
    return high / low if low > 0 else float("inf")


def _shift(one: Tensor | None, other: Tensor | None) -> float:
    """Distance of two Gram matrices, each scaled to norm 1."""
    assert one is not None
    assert other is not None
    tiny = torch.finfo(one.dtype).tiny
    return float((one / one.norm().clamp(min=tiny) - other / other.norm().clamp(min=tiny)).norm())
