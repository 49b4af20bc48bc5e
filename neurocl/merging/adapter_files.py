"""Merging LoRA adapter folders into one adapter folder."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from neurocl import __version__
from neurocl.config import to_yaml
from neurocl.devices import peak_memory_mb
from neurocl.errors import UserError
from neurocl.merging.adapters import ADAPTER_MERGES, merge_adapters
from neurocl.merging.card import card_text
from neurocl.merging.engine import Step
from neurocl.merging.files import MergePlan, MergeReport, process_bytes, provenance
from neurocl.merging.lora import LoraLayer
from neurocl.merging.parameters import TensorSpec
from neurocl.merging.peft import WEIGHTS_NAME, Adapter, copy_small_files, is_adapter, read_adapter, write_adapter
from neurocl.merging.recipe import Recipe, recipe_values, relative_to
from neurocl.runs import make_folder, sha256, write_atomically, write_error

# Keys of a recipe that speak of weight files.
WEIGHTS_ONLY = ("parameters", "on_mismatch", "compute_dtype", "shard_size")
ADDS_RANKS = frozenset({"lora-cat", "core-space", "knots"})  # unless a rank is asked for


def plan_adapters(recipe: Recipe, *, max_memory: int | None = None) -> MergePlan:
    """Read the adapters and say what their merge would do; see :func:`neurocl.merging.files.plan_merge`."""
    return _planned(recipe, _read(recipe), max_memory)


def merge_adapter_folders(recipe: Recipe, out: Path, *, max_memory: int | None = None) -> MergeReport:
    """Merge PEFT adapter folders into the new folder ``out``, which appears when it is complete.

    Args:
        recipe: its method is a merge of adapters, its models are adapter folders; ``alpha`` scales the result.
        out: a new folder.
        max_memory: bytes the process may need; more is refused before anything is computed.

    Raises:
        UserError: a model is no LoRA adapter, layers or ranks do not fit, an option is wrong, the memory would not
            suffice, or ``out`` exists.
        RunError: the disk is full.
    """
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out")
    if out.suffix == ".safetensors":
        raise UserError(f"{out}: an adapter is a folder of two files; choose an --out without .safetensors")
    started = time.perf_counter()
    adapters = _read(recipe)
    plan = _planned(recipe, adapters, max_memory)
    merged = merge_adapters(
        [{module: layer.lora for module, layer in adapter.layers.items()} for adapter in adapters],
        recipe.method,
        weights=recipe.weights,
        **plan.recipe.options,
    )
    if recipe.alpha != 1:
        merged = {name: LoraLayer(layer.A, layer.B, recipe.alpha * layer.scaling) for name, layer in merged.items()}
    inputs = {str(entry.path): sha256(entry.path / WEIGHTS_NAME) for entry in recipe.models}
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    make_folder(partial)
    try:
        report = _write(recipe, plan, partial, out, adapters, merged, inputs, started)
        partial.rename(out)
    except OSError as error:
        raise write_error(out, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # adapters are merged in memory, there is nothing to go on from
    return report


def _write(
    recipe: Recipe,
    plan: MergePlan,
    partial: Path,
    out: Path,
    adapters: list[Adapter],
    merged: Mapping[str, LoraLayer],
    inputs: Mapping[str, str],
    started: float,
) -> MergeReport:
    metadata = {"format": "pt", "neurocl_merge": provenance(plan, inputs)}
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
    write_adapter(partial, merged, adapters, metadata=metadata, dtype=dtype)
    copy_small_files(recipe.models[0].path, partial)
    report = MergeReport(out, plan, dict(inputs), time.perf_counter() - started, peak_memory_mb()["host"], 0)
    document = {
        "schema": 1,
        "neurocl": __version__,
        "method": plan.method.name,
        "reference": plan.method.reference,
        "recipe": dict(recipe_values(plan.recipe)),
        "inputs_sha256": dict(inputs),
        "ranks": {name: layer.rank for name, layer in merged.items()},
        "seconds": round(report.seconds, 3),
    }
    write_atomically(partial / "merge.json", json.dumps(document, indent=1))
    write_atomically(partial / "merge.yaml", to_yaml(relative_to(plan.recipe, out)))
    write_atomically(partial / "README.md", card_text(plan.recipe, plan.method, inputs, _rank_lines(adapters, merged)))
    return report


def _read(recipe: Recipe) -> list[Adapter]:
    if recipe.base is not None:
        raise UserError(f"{recipe.method} merges adapters with each other and takes no base")
    for key in WEIGHTS_ONLY:
        if getattr(recipe, key) != Recipe.model_fields[key].default:
            raise UserError(
                f"{recipe.method} merges adapters, for which the recipe's {key!r} has no meaning; leave it out"
            )
    if any(entry.statistics is not None for entry in recipe.models):
        raise UserError(f"{recipe.method} takes no statistics")
    for entry in recipe.models:
        if not is_adapter(entry.path):
            raise UserError(f"{entry.path}: not a PEFT adapter folder, which {recipe.method} merges")
    adapters = [read_adapter(entry.path) for entry in recipe.models]
    for adapter in adapters:
        if adapter.extras:
            raise UserError(
                f"{adapter.label} holds the fully trained tensor {min(adapter.extras)!r} beside its factors; "
                "merge it on its base with a merge of weights"
            )
        odd = sorted(adapter.layers.keys() ^ adapters[0].layers.keys())
        if odd:
            has, lacks = (adapter, adapters[0]) if odd[0] in adapter.layers else (adapters[0], adapter)
            raise UserError(f"{has.label} adapts {odd[0]!r}, {lacks.label} does not; they cannot be merged as adapters")
        names = {str(other.config.get("base_model_name_or_path")) for other in (adapters[0], adapter)}
        if len(names) > 1:
            raise UserError(f"{adapter.label} and {adapters[0].label} were made for different models: {sorted(names)}")
    return adapters


def _planned(recipe: Recipe, adapters: list[Adapter], max_memory: int | None) -> MergePlan:
    method = ADAPTER_MERGES[recipe.method]
    options = method.resolve(recipe.options)
    steps, size = [], 0
    for module, layer in adapters[0].layers.items():
        shape = (len(layer.lora.B), layer.lora.A.shape[1])
        steps.append(Step(f"{module}.weight", TensorSpec(adapters[0].dtype, shape), "matrix", "merge"))
        ranks = [adapter.layers[module].lora.rank for adapter in adapters]
        rank = options.get("rank") or (sum(ranks) if recipe.method in ADDS_RANKS else max(ranks))
        size += rank * sum(shape) * adapters[0].dtype.itemsize
    widest = max(steps, key=lambda step: step.spec.numel)
    factors = sum(
        layer.lora.A.nbytes + layer.lora.B.nbytes for adapter in adapters for layer in adapter.layers.values()
    )
    memory = process_bytes() + 6 * factors
    if max_memory is not None and memory > max_memory:
        raise UserError(
            f"--max-memory {max_memory >> 20}M is too little: {method.name} on {len(adapters)} adapters needs about "
            f"{memory >> 20}M"
        )
    return MergePlan(
        recipe=recipe.model_copy(update={"options": options}),
        method=method,
        steps=tuple(steps),
        left_out=(),
        out_bytes=size,
        files=(WEIGHTS_NAME,),
        memory_bytes=memory,
        largest=widest.name,
    )


def _rank_lines(adapters: list[Adapter], merged: Mapping[str, LoraLayer]) -> list[str]:
    """What the model card says about ranks: one line for every set of ranks."""
    groups: dict[tuple[Any, ...], int] = {}
    for name, layer in merged.items():
        key = (tuple(adapter.layers[name].lora.rank for adapter in adapters), layer.rank)
        groups[key] = groups.get(key, 0) + 1
    rows = [f"| {', '.join(map(str, ranks))} | {rank} | {count} |" for (ranks, rank), count in groups.items()]
    return ["| ranks merged | rank of the result | layers |", "|---|---|---|", *rows]
