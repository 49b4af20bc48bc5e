"""Walking through a network layer by layer on calibration data: stages, partial forward passes, cached block inputs.

A stage is a group of linear layers that read the same tensor (query, key and value projections); stages are in
execution order. ``N`` models, ``T`` tasks, ``d`` inputs of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from neurocl.errors import UserError
from neurocl.merging.linear_inputs import (
    Batch,
    Forward,
    RowMask,
    Tap,
    attention_mask,
    evaluating,
    find_taps,
    moved,
    rows_of,
    run,
    watched,
)
from neurocl.merging.regmean import weighted_mean


class _Enough(BaseException):
    """Ends a forward pass early; no ``except Exception`` of a network may swallow it."""


@dataclass(frozen=True)
class Stage:
    """Linear layers that read the same tensor.

    Attributes:
        taps: the layers.
        num_calls: how often they run in one forward pass.
    """

    taps: tuple[Tap, ...]
    num_calls: int = 1

    @property
    def names(self) -> list[str]:
        return [tap.name for tap in self.taps]


@dataclass(frozen=True)
class Invocation:
    """One call of the network, or of one of its blocks, that can be repeated."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None


Runner = Callable[[nn.Module, Invocation], Any]


def mean_model(base: nn.Module | None, experts: Sequence[nn.Module]) -> nn.Module:
    """A copy of ``base`` (or the first expert) in evaluation mode whose floating parameters are the experts' mean.

    Raises:
        UserError: no experts, experts of another architecture, or BatchNorm, whose running statistics would not fit.
    """
    if not experts:
        raise UserError("there are no models to merge")
    shapes = {name: value.shape for name, value in experts[0].named_parameters()}
    for position, model in enumerate([*experts[1:], *([base] if base is not None else [])], 2):
        own = {name: value.shape for name, value in model.named_parameters()}
        if own != shapes:
            odd = min(name for name in own.keys() | shapes.keys() if own.get(name) != shapes.get(name))
            raise UserError(f"model {position} differs from the first in parameter {odd!r}")
    for name, part in experts[0].named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats:
            raise UserError(
                f"layer {name!r} is a BatchNorm: its running statistics would have to be estimated again after every "
                "merged layer; merge such networks with regmean, or replace it by a layer without running statistics"
            )
    merged = copy.deepcopy(experts[0] if base is None else base).eval()
    with torch.no_grad():
        for name, value in merged.named_parameters():
            if value.is_floating_point():
                value.copy_(weighted_mean(stacked(experts, name)))
    return merged


def stacked(experts: Sequence[nn.Module], name: str) -> Tensor:
    """A parameter of all experts, [N, *shape], in float64 on the first expert's device."""
    first = experts[0].get_parameter(name)
    return torch.stack([model.get_parameter(name).detach().to(first.device, torch.float64) for model in experts])


def repeatable(batches: Sequence[Iterable[Batch]]) -> list[Iterable[Batch]]:
    """Every task's batches as something that can be walked through again and again.

    Raises:
        UserError: a task without batches.
    """
    again: list[Iterable[Batch]] = [list(own) if iter(own) is own else own for own in batches]
    for position, own in enumerate(again, 1):
        if next(iter(own), None) is None:
            raise UserError(f"task {position} has no calibration batches")
    return again


def invocations(batches: Iterable[Batch], row_mask: RowMask | None, device: torch.device) -> Iterator[Invocation]:
    """The batches of one task as calls of the whole network."""
    for raw in batches:
        batch = moved(raw, device)
        yield Invocation((batch,), {}, (row_mask or attention_mask)(batch))


def whole_network(forward: Forward | None) -> Runner:
    """Runs an invocation of the whole network."""

    def runner(module: nn.Module, call: Invocation) -> Any:
        return (forward or run)(module, call.args[0])

    return runner


def one_block(path: str) -> Runner:
    """Runs an invocation of the block of that path."""

    def runner(module: nn.Module, call: Invocation) -> Any:
        return module.get_submodule(path)(*call.args, **call.kwargs)

    return runner


def trace_stages(module: nn.Module, runner: Runner, call: Invocation, *, conv: bool = False) -> list[Stage]:
    """Stages of a network in the order in which they first run on ``call``.

    Layers belong together when all their calls read the same tensors, unchanged in between.
    """
    seen: dict[Tap, list[tuple[Any, ...]]] = {}
    kept: list[Tensor] = []  # alive until the end, so that no address is used twice

    def receive(tap: Tap, value: Tensor) -> None:
        kept.append(value)
        key = (value.data_ptr(), value.shape, value.stride(), value._version)
        seen.setdefault(tap, []).append(key)

    with evaluating(module), torch.no_grad(), watched(module, find_taps(module, conv=conv), receive):
        runner(module, call)
    groups: dict[tuple[Any, ...], list[Tap]] = {}
    for tap, keys in seen.items():
        groups.setdefault(tuple(keys), []).append(tap)
    return [Stage(tuple(taps), len(keys)) for keys, taps in groups.items()]


def stage_rows(module: nn.Module, runner: Runner, call: Invocation, stage: Stage) -> Tensor:
    """Input rows [n, d] of a stage in one partial forward pass, which ends as soon as they are known."""
    found: list[Tensor] = []
    lead = stage.taps[0]

    def receive(tap: Tap, value: Tensor) -> None:
        found.append(rows_of(value, call.mask))
        if len(found) == stage.num_calls:
            raise _Enough

    with evaluating(module), torch.no_grad(), watched(module, [lead], receive), suppress(_Enough):
        runner(module, call)
    return found[0] if len(found) == 1 else torch.cat(found)


@contextmanager
def _spied(
    part: nn.Module, before: Callable[[tuple[Any, ...], dict[str, Any]], None], after: Callable[[Any], None] | None
) -> Iterator[None]:
    handles = [
        part.register_forward_pre_hook(lambda _, args, kwargs: before(args, kwargs), with_kwargs=True),
    ]
    if after is not None:
        handles.append(part.register_forward_hook(lambda _, args, output: after(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def block_invocations(module: nn.Module, runner: Runner, calls: Iterable[Invocation], block: str) -> list[Invocation]:
    """How ``block`` is called when the network runs on ``calls``; nothing behind it is computed."""
    found: list[Invocation] = []
    for call in calls:

        def before(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None = call.mask) -> None:
            found.append(Invocation(_detached(args), _detached(kwargs), mask))
            raise _Enough

        with evaluating(module), torch.no_grad(), _spied(module.get_submodule(block), before, None):
            try:
                runner(module, call)
            except _Enough:
                continue
        raise UserError(f"block {block!r} does not run in a forward pass")
    return found


def next_invocations(module: nn.Module, block: str, calls: Sequence[Invocation]) -> list[Invocation]:
    """The invocations of the block behind ``block``: its output in place of the first argument."""
    runner, following = one_block(block), []
    with evaluating(module), torch.no_grad():
        for call in calls:
            output = runner(module, call)
            first = output[0] if isinstance(output, tuple) else output
            following.append(Invocation((first, *call.args[1:]), call.kwargs, call.mask))
    return following


class Walker:
    """Stage inputs of one network on the data of one task, from whole forward passes or from cached block inputs.

    Args:
        network: the network; what is changed in it shows in the next rows.
        calls: makes its invocations, again and again.
        forward: how a batch is run, or None.
    """

    def __init__(
        self, network: nn.Module, calls: Callable[[], Iterable[Invocation]], forward: Forward | None = None
    ) -> None:
        self.network = network
        self.calls = calls
        self.whole = whole_network(forward)
        self.block: str | None = None
        self.cached: list[Invocation] = []

    def enter(self, block: str) -> None:
        """Keep the inputs of ``block``, the first or the one behind the present one, as its prefix gives them now."""
        if self.block is None:
            self.cached = block_invocations(self.network, self.whole, self.calls(), block)
        else:
            self.cached = next_invocations(self.network, self.block, self.cached)
        self.block = block

    def leave(self) -> None:
        """Forget the block inputs and run whole forward passes from now on."""
        self.block, self.cached = None, []

    def rows(self, stage: Stage) -> Iterator[Tensor]:
        """Input rows [n, d] of a stage, batch by batch."""
        runner = self.whole if self.block is None else one_block(self.block)
        for call in self.calls() if self.block is None else self.cached:
            yield stage_rows(self.network, runner, call, stage)


def check_sequence(module: nn.Module, runner: Runner, call: Invocation, blocks: Sequence[str]) -> None:
    """Make sure that ``blocks`` run once each, in this order, each on the output of the one before.

    Raises:
        UserError: they do not; the blocks are named.
    """
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}

    def spy(name: str) -> tuple[Callable[[tuple[Any, ...], dict[str, Any]], None], Callable[[Any], None]]:
        def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in inputs:
                raise UserError(f"block {name!r} runs more than once in a forward pass")
            if not args:
                raise UserError(f"block {name!r} is not given its input as first argument")
            inputs[name] = args[0]

        def after(output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return before, after

    with ExitStack() as spies, evaluating(module), torch.no_grad():
        for name in blocks:
            try:
                part = module.get_submodule(name)
            except AttributeError:
                raise UserError(f"the network has no block {name!r}") from None
            spies.enter_context(_spied(part, *spy(name)))
        runner(module, call)
    for name in blocks:
        if name not in inputs:
            raise UserError(f"block {name!r} does not run in a forward pass")
    for name, following in pairwise(blocks):
        if not torch.equal(outputs[name], inputs[following]):
            raise UserError(f"block {following!r} does not run on the output of block {name!r}")


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(_detached(item) for item in value)
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return value
