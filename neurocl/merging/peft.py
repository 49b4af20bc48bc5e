"""PEFT's LoRA adapter folders, read and written, and an adapter on its base model as one more source to merge."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neurocl.errors import UserError
from neurocl.merging.checkpoints import FileSource, header_bytes
from neurocl.merging.lora import LoraLayer
from neurocl.merging.parameters import TensorSpec
from neurocl.runs import read_json, sha256, write_atomically

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")  # PEFT's own levels in the names of trained tensors
FROZEN = ".original_module."  # copies of the base's tensors that PEFT may save with trained ones
# Initialisations that take the adapter's start out of the base, which then is not the model the adapter is named for.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
FACTORS = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.weight)?$")


def is_adapter(path: Path) -> bool:
    """Whether ``path`` is a PEFT adapter folder."""
    return (path / CONFIG_NAME).is_file()


@dataclass(frozen=True)
class AdapterLayer:
    """The factors of one adapted module.

    Attributes:
        lora: A [r, in], B [out, r] and the scaling; of convolutions the flattened factors.
        names: tensor names of A and B in the file.
        shapes: their shapes in the file.
        transposed: the weight is stored [in, out] (embeddings, GPT-2's Conv1D).
    """

    lora: LoraLayer
    names: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    transposed: bool


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in memory.

    Attributes:
        label: its folder.
        config: ``adapter_config.json``.
        layers: by module name of the base model.
        extras: fully trained tensors that came along (``modules_to_save``, biases), by name in the base model.
        dtype: type of the factors on disk.
    """

    label: str
    config: dict[str, Any]
    layers: dict[str, AdapterLayer]
    extras: dict[str, torch.Tensor]
    dtype: torch.dtype


def _pattern_value(patterns: Mapping[str, Any], module: str, default: float) -> float:
    """PEFT's rule: a key matches a module name that ends in it, as a regular expression."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        except re.error:
            raise UserError(f"adapter pattern {pattern!r} is not a regular expression") from None
    return default


def read_adapter(path: Path) -> Adapter:
    """Read a LoRA adapter folder.

    Raises:
        UserError: not LoRA, a variant whose delta is not B A (DoRA), a factor without its partner, ranks that do not
            fit, NaN; the message names folder and tensor.
    """
    config = read_json(path / CONFIG_NAME)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"{path}: only LoRA adapters can be merged, this one is {kind!r}")
    if config.get("use_dora"):
        raise UserError(f"{path}: a DoRA adapter also rescales the base's columns; it cannot be merged as LoRA")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise UserError(
            f"{path}: an adapter started with {start} belongs to a changed base; convert it with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )
    weights = path / WEIGHTS_NAME
    if not weights.is_file():
        if (path / "adapter_model.bin").exists():
            raise UserError(f"{path / 'adapter_model.bin'}: a pickle; save the adapter as safetensors first")
        raise UserError(f"{path}: {WEIGHTS_NAME} is missing")
    source = FileSource.open(weights)
    values = {
        name: source.read(name, 0, spec.numel).clone().reshape(spec.shape) for name, spec in source.tensors.items()
    }
    source.close()
    factors: dict[str, dict[str, str]] = {}
    extras, embeddings = {}, set()
    for name, value in values.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{weights}: tensor {name!r} contains NaN or infinity")
        found = FACTORS.match(name)
        if found is None:
            if FROZEN not in name:
                extras[WRAPPERS.sub("", name.removeprefix(PREFIX))] = value
            continue
        module = found["module"].removeprefix(PREFIX)
        factors.setdefault(module, {})[found["factor"]] = name
        if found["embedding"]:
            embeddings.add(module)
    layers = {}
    for module, names in factors.items():
        if names.keys() != {"A", "B"}:
            raise UserError(f"{weights}: module {module!r} has only one of the factors A and B")
        layers[module] = _layer(weights, module, config, values, names, module in embeddings)
    if not layers:
        raise UserError(f"{weights}: holds no LoRA factors")
    dtype = values[next(iter(factors.values()))["A"]].dtype
    return Adapter(str(path), config, layers, extras, dtype)


def _layer(
    file: Path,
    module: str,
    config: Mapping[str, Any],
    values: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    embedding: bool,
) -> AdapterLayer:
    a, b = values[names["A"]], values[names["B"]]
    flat_a, flat_b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    rank = len(flat_a)
    if a.dim() < 2 or b.dim() < 2 or flat_b.shape[1] != rank:
        raise UserError(f"{file}: factors {list(a.shape)} and {list(b.shape)} of module {module!r} do not fit together")
    alpha = _pattern_value(config.get("alpha_pattern") or {}, module, float(config.get("lora_alpha", rank)))
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return AdapterLayer(
        LoraLayer(flat_a, flat_b, scaling),
        (names["A"], names["B"]),
        (tuple(a.shape), tuple(b.shape)),
        embedding or bool(config.get("fan_in_fan_out")),
    )


class AdapterSource:
    """The model that an adapter makes of its base: ``W + scaling * B A``, computed in float64 when it is read."""

    def __init__(self, adapter: Adapter, base: FileSource, digest: str) -> None:
        self.adapter = adapter
        self.base = base
        self.label = adapter.label
        self.digest = digest
        self.tensors = base.tensors
        self._targets = {f"{module}.weight": layer for module, layer in adapter.layers.items()}
        unknown = sorted((self._targets.keys() | adapter.extras.keys()) - base.tensors.keys())
        if unknown:
            raise UserError(f"{self.label} adapts {unknown[0]!r}, which {base.label} does not have")
        for name, value in adapter.extras.items():
            if value.shape != base.tensors[name].shape:
                shapes = f"{list(value.shape)} in {self.label}, {list(base.tensors[name].shape)} in {base.label}"
                raise UserError(f"tensor {name!r} is {shapes}")
        for name, layer in self._targets.items():
            out, width = len(layer.lora.B), layer.lora.A.shape[1]
            expected = (width, out) if layer.transposed else (out, width)
            shape = base.tensors[name].shape
            if (shape[0], math.prod(shape[1:])) != expected:
                raise UserError(f"{self.label}: factors of {name!r} make {list(expected)}, the base has {list(shape)}")
        self._delta: tuple[str, torch.Tensor] | None = None

    @classmethod
    def open(cls, path: Path, base: FileSource) -> AdapterSource:
        """Read an adapter and check it against its base; see :func:`read_adapter`."""
        return cls(read_adapter(path), base, sha256(path / WEIGHTS_NAME))

    @property
    def largest_delta_bytes(self) -> int:
        """Memory of the update that is kept while its tensor is read, twice while it is computed."""
        return 16 * max((self.tensors[name].numel for name in self._targets), default=0)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name in self.adapter.extras:
            return self.adapter.extras[name].reshape(-1)[start:stop]
        values = self.base.read(name, start, stop)
        if name not in self._targets:
            return values
        return values.double() + self._delta_of(name)[start:stop]

    def _delta_of(self, name: str) -> torch.Tensor:
        # computed whole and kept: products of row blocks would differ in the last bits with the size of the slices
        if self._delta is None or self._delta[0] != name:
            layer = self._targets[name]
            delta = layer.lora.scaling * (layer.lora.B.double() @ layer.lora.A.double())
            self._delta = (name, (delta.T if layer.transposed else delta).reshape(-1))
        return self._delta[1]

    def fingerprint(self) -> str:
        """Changes when the adapter or its base does."""
        return f"{self.digest} {json.dumps(self.adapter.config, sort_keys=True)} {self.base.fingerprint()}"


def write_adapter(
    folder: Path,
    layers: Mapping[str, LoraLayer],
    like: Sequence[Adapter],
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write merged factors as a PEFT adapter folder.

    The scaling is folded into B, so ``lora_alpha`` equals the rank everywhere; layers of another rank than the
    commonest are listed in ``rank_pattern`` and ``alpha_pattern``.

    Args:
        folder: an existing folder.
        layers: by module name.
        like: the merged adapters; names, shapes and the rest of the configuration come from them.
        metadata: for the file header.
        dtype: of the factors; None is the inputs'.

    Raises:
        RunError: the disk is full.
    """
    ranks = [len(layer.A) for layer in layers.values()]
    common = max(set(ranks), key=lambda rank: (ranks.count(rank), rank))
    tensors: dict[str, torch.Tensor] = {}
    for module, layer in layers.items():
        origin = next(adapter.layers[module] for adapter in like if module in adapter.layers)
        rank = len(layer.A)
        (shape_a, shape_b), (name_a, name_b) = origin.shapes, origin.names
        kept = dtype or like[0].dtype
        tensors[name_a] = layer.A.reshape(rank, *shape_a[1:]).to(kept).contiguous()
        tensors[name_b] = (layer.scaling * layer.B).reshape(shape_b[0], rank, *shape_b[2:]).to(kept).contiguous()
    others = {f"^{re.escape(module)}": len(layer.A) for module, layer in layers.items() if len(layer.A) != common}
    config = {
        **like[0].config,
        "r": common,
        "lora_alpha": common,
        "use_rslora": False,
        "rank_pattern": others,
        "alpha_pattern": others,
        "modules_to_save": None,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    # safetensors' own writer puts the metadata in an order that changes from call to call
    specs = [(name, TensorSpec(value.dtype, tuple(value.shape))) for name, value in tensors.items()]
    data = [value.cpu().view(-1).view(torch.uint8).numpy().tobytes() for value in tensors.values()]
    write_atomically(folder / WEIGHTS_NAME, header_bytes(specs, metadata) + b"".join(data))
    write_atomically(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def copy_small_files(origin: Path, folder: Path) -> None:
    """Tokenizer files that came with an adapter."""
    for file in sorted(origin.iterdir()):
        if file.is_file() and file.name.startswith(("tokenizer", "special_tokens", "vocab", "merges")):
            shutil.copyfile(file, folder / file.name)
