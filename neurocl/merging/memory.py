"""Merging state dicts in memory, with the same engine that streams files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from neurocl.devices import resolve_device
from neurocl.errors import UserError
from neurocl.merging.catalog import MERGES
from neurocl.merging.engine import MemorySink, MemorySource, Merger, StatisticsOf, tied_names
from neurocl.merging.method import MergeMethod, declared
from neurocl.merging.parameters import ParameterRules

StateDict = Mapping[str, torch.Tensor]


def find_method(name: str) -> MergeMethod:
    """The declaration of a merge of weights.

    Raises:
        UserError: no such merge, one that is no merge of weights (the message says what to call instead), or a
            plug-in's that cannot be used.
    """
    entry = MERGES.entry(name)
    if "weights" not in (entry.areas or ("weights",)):
        home = {"adapters": "merge_adapters", "networks": "its own function"}[entry.areas[0]]
        raise UserError(f"{name} does not merge state dicts; use {home}, see `neurocl merging info {name}`")
    return declared(entry.load(), name)


def merge(
    base: StateDict | None,
    models: Sequence[StateDict],
    method: str = "iso-c",
    *,
    alpha: float = 1.0,
    weights: Sequence[float] | None = None,
    statistics: Sequence[StatisticsOf] | None = None,
    parameters: ParameterRules | None = None,
    on_mismatch: Literal["error", "base"] = "error",
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Merge fine-tuned state dicts into one.

    Args:
        base: the weights that all models were fine-tuned from; None for methods that need none.
        models: the fine-tuned weights, same names and shapes.
        method: a name from ``neurocl merging methods``.
        alpha: scale on the whole result, ``base + alpha * (merged - base)``.
        weights: one number per model, where the method takes them.
        statistics: one per model, for methods that need Gram matrices or Fisher information.
        parameters: patterns that override which treatment a parameter gets.
        on_mismatch: ``"error"``, or ``"base"`` to take what a model lacks from the base.
        dtype: of the result's floating tensors; None keeps the base's.
        compute_dtype: of the arithmetic; results are rounded once, at the end.
        device: where to compute; the result is on the CPU unless this is a device.
        options: the method's own, such as ``density=0.2``.

    Returns: state dict with the names, shapes and order of the base; tensors that are tied there stay tied.

    Raises:
        UserError: unknown method or option, names or shapes that differ, NaN.
    """
    found = find_method(method)
    where = resolve_device(str(device))
    sources = [MemorySource(model, f"model {index}") for index, model in enumerate(models)]
    merger = Merger(
        method=found,
        options=found.resolve(options),
        base=None if base is None else MemorySource(base, "the base"),
        models=sources,
        alpha=alpha,
        weights=weights,
        statistics=statistics,
        rules=parameters or ParameterRules(),
        on_mismatch=on_mismatch,
        dtype=dtype,
        compute_dtype=compute_dtype,
        device=where,
    )
    steps = merger.plan().steps
    reference = base if base is not None else models[0]
    tied = tied_names(reference, models)
    sink = MemorySink({step.name: step.spec for step in steps}, where)
    merger.run([step for step in steps if step.name not in tied], sink)
    return {step.name: sink.values[tied.get(step.name, step.name)] for step in steps}
