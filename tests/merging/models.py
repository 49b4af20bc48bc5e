"""Small models with every kind of parameter, in memory and on disk, shared by the tests of merging whole models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from neurocl.merging.catalog import MERGES
from neurocl.merging.method import MergeMethod
from neurocl.merging.statistics import Statistics

WEIGHT_MERGES = MERGES.names("weights")
StateDict = dict[str, Tensor]


def declared(name: str) -> MergeMethod:
    """The declaration of a merge of weights."""
    method: MergeMethod = MERGES.load(name).merge
    return method


def num_models(name: str) -> int:
    """How many models a test merges with that merge: three, or what it asks for."""
    return declared(name).num_models or 3


def small_models(
    count: int = 3, dtype: torch.dtype = torch.float32, *, seed: int = 0, width: int = 6
) -> tuple[StateDict, list[StateDict]]:
    """A base and models fine-tuned from it, with matrices, vectors, a convolution, BatchNorm and integer buffers."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = {
        "embed_tokens.weight": (12, width),
        "blocks.0.weight": (8, width),
        "blocks.0.bias": (8,),
        "blocks.1.weight": (5, 8),
        "conv.weight": (4, 3, 2, 2),
        "norm.running_mean": (4,),
        "norm.running_var": (4,),
        "scale": (),
        "text_projection.weight": (6, 5),
        "empty": (0, 4),
    }
    base = {name: random(*shape) for name, shape in shapes.items()}
    base["norm.running_var"] = base["norm.running_var"].abs() + 0.5
    models = [{name: value + 0.05 * random(*value.shape) for name, value in base.items()} for _ in range(count)]
    integers = {"norm.num_batches_tracked": torch.tensor(7), "position_ids": torch.arange(5)}
    return _as(base, dtype, integers, 0), [_as(model, dtype, integers, i + 1) for i, model in enumerate(models)]


def _as(values: StateDict, dtype: torch.dtype, integers: StateDict, number: int) -> StateDict:
    return {name: value.to(dtype) for name, value in values.items()} | {
        name: value + number for name, value in integers.items()
    }


def statistics_of(models: Sequence[Mapping[str, Tensor]], *, seed: int = 5) -> list[Statistics]:
    """Gram matrices of the matrices and Fisher information of everything, one for each model."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for model in models:
        statistics = Statistics()
        for name, value in model.items():
            if not value.is_floating_point() or value.numel() == 0:
                continue
            fisher = torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.1
            statistics.add("fisher", name, fisher, num_samples=1)
            if value.ndim == 2:
                inputs = torch.randn(64, value.shape[1], generator=generator, dtype=torch.float64)
                statistics.add("gram", name, inputs.T @ inputs, num_samples=64, num_rows=64)
        found.append(statistics)
    return found


def needed_statistics(name: str, models: Sequence[Mapping[str, Tensor]]) -> list[Statistics] | None:
    """Statistics for a merge that needs them."""
    return None if declared(name).statistic is None else statistics_of(models)


def save_folder(
    folder: Path, tensors: StateDict, *, shards: int = 1, config: Mapping[str, object] | None = None
) -> Path:
    """Write a model folder as the Hugging Face libraries do: one file, or shards with an index."""
    folder.mkdir(parents=True)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[number::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def content_sha256(tensors: StateDict) -> str:
    """What the provenance calls the contents of a model, computed from the state dict."""
    types = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        data = hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        digest.update(f"{name} {types[value.dtype]} {list(value.shape)} {data}\n".encode())
    return digest.hexdigest()


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Same names, types and bytes."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name], value), f"{name}: {(found[name].double() - value.double()).abs().max()}"
