"""The loop that takes any merge over all tensors of a model, piece by piece, from memory or from files.

Reading goes through a :class:`Source`, writing through a :class:`Sink`; what is computed, and in which order, does not
depend on which ones they are, so a streamed merge gives the bits of a merge in memory.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from neurocl.errors import UserError
from neurocl.merging.average import average
from neurocl.merging.method import Measurement, MergeMethod, whereabouts
from neurocl.merging.parameters import ParameterClass, ParameterRules, TensorSpec, classify
from neurocl.merging.rounding import rounded

Action = Literal["merge", "mean", "copy"]
OnMismatch = Literal["error", "base"]
ALLOCATOR = 1.15  # what the allocator holds beyond what is asked for
PIECE_BYTES = {"cpu": 3 << 20, "cuda": 512 << 20}  # on a CPU what stays in its cache, on a GPU what hides the launches


class Source(Protocol):
    """One model, read in slices of its flattened tensors."""

    @property
    def label(self) -> str:
        """What messages call it: usually its path."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Names, types and shapes in file order."""

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor; valid until the next read."""


class Sink(Protocol):
    """Where merged tensors go; slices of one tensor arrive in order."""

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Store ``values`` [n] from element ``start`` on, already in the output type."""


class StatisticsOf(Protocol):
    """Per-layer statistics of one model."""

    def mean(self, kind: str, name: str) -> torch.Tensor:
        """Mean Gram matrix [d, d] or mean diagonal Fisher [*shape] of parameter ``name``."""

    def has(self, kind: str, name: str) -> bool:
        """Whether there is one."""


class MemorySource:
    """A state dict as a source."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], label: str) -> None:
        self.label = label
        self.values = tensors
        self.tensors = {name: TensorSpec(value.dtype, tuple(value.shape)) for name, value in tensors.items()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.values[name].detach().reshape(-1)[start:stop]


@dataclass
class MemorySink:
    """Collects the merged tensors in a state dict."""

    specs: Mapping[str, TensorSpec]
    device: torch.device
    values: dict[str, torch.Tensor] = field(default_factory=dict)

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        if name not in self.values:
            spec = self.specs[name]
            self.values[name] = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
        self.values[name].view(-1)[start : start + len(values)].copy_(values)


@dataclass(frozen=True)
class Step:
    """What happens to one tensor.

    Attributes:
        name: of the tensor.
        spec: type and shape in the output.
        kind: its parameter class.
        action: ``merge`` (the method), ``mean`` (of the models) or ``copy`` (from the base).
        absent: indices of the models that lack the tensor; they count as equal to the base.
    """

    name: str
    spec: TensorSpec
    kind: ParameterClass
    action: Action
    absent: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Plan:
    """Every step of a merge, and what of the models is left out.

    Attributes:
        steps: in the order of the base.
        left_out: one sentence for each tensor of a model that the merge does not use.
    """

    steps: tuple[Step, ...]
    left_out: tuple[str, ...] = ()


@dataclass
class Merger:
    """A merge ready to run: the method with its options, and the models.

    Attributes:
        method: the merge.
        options: resolved options of the method.
        base: the pre-trained model, or None for methods that need none.
        models: the fine-tuned models.
        alpha: scale on what the method returns, ``base + alpha * (merged - base)``.
        weights: per-model weights, or None.
        statistics: per-model statistics for methods that ask for them.
        rules: parameter classes.
        on_mismatch: ``error``, or ``base`` to take a tensor that a model lacks (or has in another shape) from the base.
        dtype: type of the output's floating tensors; None keeps the base's.
        compute_dtype: type of the arithmetic.
        device: where the arithmetic runs.
        pulse: called before every slice; what it raises ends the merge.
    """

    method: MergeMethod
    options: Mapping[str, Any]
    base: Source | None
    models: Sequence[Source]
    alpha: float = 1.0
    weights: Sequence[float] | None = None
    statistics: Sequence[StatisticsOf] | None = None
    rules: ParameterRules = field(default_factory=ParameterRules)
    on_mismatch: OnMismatch = "error"
    dtype: torch.dtype | None = None
    compute_dtype: torch.dtype = torch.float64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pulse: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        name, count = self.method.name, len(self.models)
        if self.method.num_models is not None and count != self.method.num_models:
            raise UserError(f"{name} merges exactly {self.method.num_models} models, got {count}")
        if count < self.method.min_models:
            raise UserError(f"{name} needs at least {self.method.min_models} models, got {count}")
        if self.base is None and self.method.needs_base:
            raise UserError(f"{name} needs the base model that the others were fine-tuned from")
        if self.base is None and self.alpha != 1:
            raise UserError(f"alpha = {self.alpha:g} scales the way from the base; give the base model too")
        if self.weights is not None and len(self.weights) != count:
            raise UserError(f"{len(self.weights)} weights for {count} models")
        if not all(math.isfinite(number) for number in (self.alpha, *(self.weights or ()))):
            raise UserError("alpha and weights must be finite numbers")
        if self.weights is not None and "weights" not in self.method.supplied:
            raise UserError(f"{name} takes no per-model weights")
        if self.method.statistic is not None and len(self.statistics or ()) != count:
            raise UserError(
                f"{name} needs the {self.method.statistic} statistics of each of the {count} models "
                f"(see `neurocl merging stats`), got {len(self.statistics or ())}"
            )
        self._uses_base = self.base is not None and (self.method.needs_base or self.alpha != 1)
        self._buffer: torch.Tensor | None = None

    @property
    def reference(self) -> Source:
        """The source whose names, shapes and types the output has."""
        return self.base if self.base is not None else self.models[0]

    def plan(self) -> Plan:
        """Compare the models and decide what happens to every tensor.

        Raises:
            UserError: names or shapes differ and ``on_mismatch`` is ``error``; the message names tensor and file.
        """
        steps, left_out = [], []
        for name, spec in self.reference.tensors.items():
            absent = set()
            for index, model in enumerate(self.models):
                other = model.tensors.get(name)
                if other is None:
                    problem = f"{model.label} has no tensor {name!r}, which {self.reference.label} has"
                elif other.shape != spec.shape:
                    problem = f"tensor {name!r} is {list(other.shape)} in {model.label}, {list(spec.shape)} in " + (
                        self.reference.label
                    )
                else:
                    continue
                if self.base is None:
                    raise UserError(problem)
                if self.on_mismatch == "error":
                    raise UserError(problem + "; --on-mismatch base would take it from the base")
                left_out.append(problem + "; the base's is used")
                absent.add(index)
            kind = classify(name, spec, self.rules)
            action = self._action(name, spec, kind)
            dtype = self.dtype if self.dtype is not None and spec.dtype.is_floating_point else spec.dtype
            steps.append(Step(name, TensorSpec(dtype, spec.shape), kind, action, frozenset(absent)))
        for model in self.models:
            for name in model.tensors.keys() - self.reference.tensors.keys():
                problem = f"{model.label} has a tensor {name!r} that {self.reference.label} lacks"
                if self.on_mismatch == "error":
                    raise UserError(problem + "; --on-mismatch base would leave it out")
                left_out.append(problem + "; it is left out")
        statistic = self.method.statistic
        if statistic is not None and not any(step.action == "merge" for step in steps):
            raise UserError(
                f"the statistics hold no {statistic} of any tensor that {self.method.name} merges; "
                f"collect them with `neurocl merging stats --kind {statistic}`"
            )
        return Plan(tuple(steps), tuple(sorted(left_out)))

    def _action(self, name: str, spec: TensorSpec, kind: ParameterClass) -> Action:
        if kind in ("buffer", "kept") or spec.numel == 0:
            return "copy"
        if kind == "statistics" or (self.method.scope == "matrix" and kind != "matrix"):
            return "mean"
        statistic = self.method.statistic
        if statistic is not None and not all(of.has(statistic, name) for of in self.statistics or ()):
            return "mean"
        return "merge"

    def piece(self) -> int:
        """Elements per slice."""
        budget = PIECE_BYTES.get(self.device.type, PIECE_BYTES["cuda"])
        return max(1 << 14, budget // (self.compute_dtype.itemsize * (len(self.models) + 1)))

    def whole_tensors(self, step: Step) -> bool:
        """Whether the tensor has to be in memory at once."""
        return step.action == "merge" and self.method.scope != "elements"

    def working_bytes(self, step: Step) -> int:
        """Estimate of the memory that one step takes beside the process itself."""
        models, width = len(self.models), self.compute_dtype.itemsize
        statistics = 2 * models * self._statistic_numel(step) * width
        if not self.whole_tensors(step):
            count = min(step.spec.numel, self.piece())
            return statistics + count * (width * (2 * models + 4) + 8 * (models + 1))
        copies, numel = self.method.copies, step.spec.numel
        matrices = (copies.per_model * models + copies.besides) * numel
        if len(step.spec.shape) == 2:
            wide = max(0, step.spec.shape[1] ** 2 - (numel if self.method.statistic is None else 0))
            matrices += copies.square * wide
        return statistics + int(ALLOCATOR * width * matrices) + 8 * (models + 1) * numel

    def _statistic_numel(self, step: Step) -> int:
        """Values in the statistics of one tensor of one model."""
        if self.method.statistic is None or step.action != "merge":
            return 0
        return step.spec.shape[1] ** 2 if self.method.statistic == "gram" else step.spec.numel

    def run(
        self,
        steps: Sequence[Step],
        sink: Sink,
        *,
        done: Callable[[Step], None] | None = None,
        model: Sequence[Step] | None = None,
    ) -> None:
        """Merge ``steps`` into ``sink``.

        Args:
            steps: what to merge, of the plan.
            sink: where it goes.
            done: called after each.
            model: the tensors that measurements over the whole model see, if those are not ``steps``: all of them when
                some are merged already.
        """
        over_model = self._measure_over_model(steps, steps if model is None else model)
        for step in steps:
            if step.action == "copy":
                self._copy(step, sink)
            else:
                self._merge(step, sink, over_model)
            if done is not None:
                done(step)

    def _measure_over_model(self, steps: Sequence[Step], model: Sequence[Step]) -> Measurement | None:
        if self._measure_scope() != "model" or not any(step.action == "merge" for step in steps):
            return None
        return self._measured(sorted((step for step in model if step.action == "merge"), key=lambda step: step.name))

    def _measure_scope(self) -> str | None:
        if self.method.measure is None:
            return None
        return str(self.options.get("trim", self.method.measure_scope))

    def _measured(self, steps: Sequence[Step]) -> Measurement:
        assert self.method.measure is not None
        wanted = inspect.signature(self.method.measure).parameters
        given = {name: value for name, value in self.options.items() if name in wanted}
        if "weights" in wanted:
            given["weights"] = self._weights()
        measurement = self.method.measure(num_models=len(self.models), **given)
        if not getattr(measurement, "reads_data", True):
            return measurement
        while True:
            for step in steps:
                for start, base, models in self._pieces(step):
                    measurement.update(base, models, **whereabouts(measurement, step.name, start))
            if not measurement.another_pass():
                return measurement

    def _weights(self) -> torch.Tensor | None:
        if self.weights is None:
            return None
        return torch.tensor(self.weights, dtype=self.compute_dtype, device=self.device)

    def _pieces(self, step: Step, *, whole: bool = False) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(start, base [n], models [N, n]) over a tensor; the buffers are reused."""
        rows, total = len(self.models) + 1, step.spec.numel
        size = total if whole else min(total, self.piece())
        if self._buffer is None or self._buffer.numel() < rows * size:
            self._buffer = torch.empty(rows * size, dtype=self.compute_dtype, device=self.device)
        for start in range(0, total, size):
            self.pulse()
            stop = min(total, start + size)
            stack = self._buffer[: rows * (stop - start)].view(rows, stop - start)
            if self.base is not None and self._uses_base:
                stack[0].copy_(self.base.read(step.name, start, stop))
            else:
                stack[0].zero_()
            for index, model in enumerate(self.models):
                source = self.base if index in step.absent else model
                assert source is not None
                stack[index + 1].copy_(source.read(step.name, start, stop))
            if step.action != "merge" or not self.method.spreads_nan:
                self._require_finite(step, stack)
            yield start, stack[0], stack[1:]

    def _require_finite(self, step: Step, stack: torch.Tensor) -> None:
        # one sum tells: a NaN or an infinity survives it, and float32 values cannot overflow float64
        if torch.isfinite(stack.sum()) or bool(torch.isfinite(stack).all()):
            return
        row = int(torch.isfinite(stack).all(dim=1).logical_not().nonzero()[0])
        source = self.models[row - 1] if row else self.base
        raise UserError(f"tensor {step.name!r} of {source.label if source else 'the base'} contains NaN or infinity")

    def _copy(self, step: Step, sink: Sink) -> None:
        source, size = self.reference, 1 << 20
        for start in range(0, step.spec.numel, size):
            values = source.read(step.name, start, min(step.spec.numel, start + size))
            sink.write(step.name, start, values.to(step.spec.dtype))
        if step.spec.numel == 0:
            sink.write(step.name, 0, torch.empty(0, dtype=step.spec.dtype))

    def _merge(self, step: Step, sink: Sink, measured: Measurement | None) -> None:
        supplied: dict[str, Any] = {}
        if step.action == "merge":
            if self._measure_scope() == "tensor":
                measured = self._measured([step])
            candidates = {"name": step.name, "weights": self._weights(), "measured": measured}
            supplied = {key: value for key, value in candidates.items() if key in self.method.supplied}
        whole = self.whole_tensors(step)
        fisher = self._statistic(step) if self.method.statistic == "fisher" and step.action == "merge" else None
        if self.method.statistic == "gram" and step.action == "merge":
            supplied["gram"] = self._statistic(step)
        for start, base, models in self._pieces(step, whole=whole):
            if step.action == "mean":
                merged = average(base, models)
            else:
                if "offset" in self.method.supplied:
                    supplied["offset"] = start
                if fisher is not None:
                    piece = fisher.reshape(len(models), -1)[:, start : start + len(base)]
                    supplied["fisher"] = piece.reshape(len(models), *step.spec.shape) if whole else piece
                if whole:
                    base, models = base.view(step.spec.shape), models.view(len(models), *step.spec.shape)
                merged = self.method.function(base, models, **supplied, **self.options)
            if self.alpha != 1 and step.kind != "statistics":  # a variance beyond the mean may be negative
                merged = base + self.alpha * (merged - base)
            merged = merged.reshape(-1)
            self._require_representable(step, merged, base, models)
            sink.write(step.name, start, rounded(merged, step.spec.dtype))

    def _require_representable(
        self, step: Step, merged: torch.Tensor, base: torch.Tensor, models: torch.Tensor
    ) -> None:
        low, high = (float(bound) for bound in merged.aminmax())
        limit = torch.finfo(step.spec.dtype).max
        if -limit <= low and high <= limit:
            return
        self._require_finite(step, torch.cat([base[None], models]).flatten(1))
        dtype = str(step.spec.dtype).removeprefix("torch.")
        raise UserError(
            f"tensor {step.name!r} of the merged model would reach {high if high > limit else low:g}, "
            f"which {dtype} cannot hold; lower alpha or choose another dtype"
        )

    def _statistic(self, step: Step) -> torch.Tensor:
        assert self.method.statistic is not None
        assert self.statistics is not None
        found = [of.mean(self.method.statistic, step.name) for of in self.statistics]
        stacked = torch.stack([value.to(self.device, self.compute_dtype) for value in found])
        expected = (step.spec.shape[1],) * 2 if self.method.statistic == "gram" else step.spec.shape
        if tuple(stacked.shape[1:]) != expected:
            raise UserError(
                f"the {self.method.statistic} statistics of {step.name!r} are {list(stacked.shape[1:])}, "
                f"its shape asks for {list(expected)}"
            )
        return stacked


def tied_names(tensors: Mapping[str, torch.Tensor], others: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, str]:
    """Names whose tensor is the very one of an earlier name, and equal to that in all ``others`` that have both.

    Returns: ``{name: earlier name}``.
    """
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, value in tensors.items():
        if value.numel() == 0:
            continue
        key = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if key in first and all(_equal(other, name, first[key]) for other in others):
            tied[name] = first[key]
        else:
            first.setdefault(key, name)
    return tied


def _equal(tensors: Mapping[str, torch.Tensor], name: str, other: str) -> bool:
    if name not in tensors or other not in tensors:
        return name not in tensors and other not in tensors
    return tensors[name] is tensors[other] or torch.equal(tensors[name], tensors[other])
