"""Small real models to try a merge on: two experts of the digits suite, made in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from neurocl.devices import prepare
from neurocl.merging.catalog import MERGES
from neurocl.merging.gathering import gather
from neurocl.merging.lora import LoraLayer
from neurocl.merging.memory import find_method
from neurocl.merging.peft import CONFIG_NAME, WEIGHTS_NAME
from neurocl.merging.recipe import ModelEntry, Recipe
from neurocl.merging.suite import SMOKE, suite_config
from neurocl.merging.training import train_suite
from neurocl.runs import make_folder, write_atomically

TASKS = ("turned", "inverted")
RANK = 4


def smoke_recipe(method: str, folder: Path) -> Recipe:
    """Make what ``method`` needs in ``folder`` and return the recipe that merges it.

    Experts of two tasks of the embedded digits, trained for a few passes; their statistics where the method asks for
    them; for merges of adapters the leading singular directions of what the experts learned.
    """
    entry = MERGES.entry(method)
    runtime = prepare("cpu", "fp32", None, keep_memory=False)
    config = suite_config("digits", **{**SMOKE, "tasks": TASKS})
    suite = train_suite(config, folder / "suite", runtime=runtime)
    experts = [suite.path / "experts" / task for task in TASKS]
    if "adapters" in entry.areas:
        return Recipe(method=method, models=tuple(ModelEntry(path=path) for path in _adapters(suite, folder)))
    statistic = find_method(method).statistic
    entries = []
    for task, path in zip(TASKS, experts, strict=True):
        file = None
        if statistic is not None:
            file = folder / f"{task}.safetensors"
            gather(
                path, suite=suite.path, task=task, inputs=None, kinds=(statistic,), num_examples=64, runtime=runtime
            ).save(file)
        entries.append(ModelEntry(path=path, statistics=file))
    return Recipe(method=method, base=suite.path / "base", models=tuple(entries))


def _adapters(suite: Any, folder: Path) -> list[Path]:
    from safetensors.torch import save_file

    paths = []
    for task, state in suite.experts.items():
        path = folder / f"adapter-{task}"
        make_folder(path)
        tensors = {}
        for name, value in state.items():
            if value.dim() != 2 or not name.startswith("blocks."):
                continue
            left, values, right = torch.linalg.svd(value - suite.base[name], full_matrices=False)
            layer = LoraLayer(right[:RANK], left[:, :RANK] * values[:RANK])
            module = name.removesuffix(".weight")
            tensors[f"base_model.model.{module}.lora_A.weight"] = layer.A.contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = layer.B.contiguous()
        save_file(tensors, path / WEIGHTS_NAME, metadata={"format": "pt"})
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["qkv", "proj", "fc1", "fc2"]}
        write_atomically(path / CONFIG_NAME, json.dumps(config))
        paths.append(path)
    return paths
