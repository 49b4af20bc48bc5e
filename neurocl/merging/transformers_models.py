"""A Hugging Face folder as a running network, with inputs from a file, to collect statistics from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neurocl.errors import UserError
from neurocl.merging.suite import load_state
from neurocl.runs import read_json


def load_transformers_model(folder: Path) -> nn.Module:
    """The network that ``config.json`` names, with the folder's weights, in float32 and eval mode.

    Raises:
        UserError: transformers is not installed, or the folder is not a model that it knows.
    """
    document = read_json(folder / "config.json")
    names = document.get("architectures") if isinstance(document, dict) else None
    if not isinstance(names, list) or not names:
        raise UserError(f"{folder / 'config.json'}: names no architecture, so the network cannot be built")
    from neurocl.compat.torchvision import ensure_torchaudio, ensure_torchvision

    ensure_torchvision()
    ensure_torchaudio()
    try:
        import transformers
    except ImportError:
        raise UserError("running Hugging Face models needs: pip install 'neurocl[vision]'") from None
    kind = getattr(transformers, str(names[0]), None)
    if kind is None:
        raise UserError(f"{folder / 'config.json'}: transformers knows no architecture {names[0]!r}")
    try:
        model: nn.Module = kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: transformers cannot load it: {' '.join(str(error).split())[:200]}") from None
    return model.eval()


def input_batches(path: Path, batch_size: int, max_samples: int | None) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of keyword arguments from a safetensors file whose tensors are named like them, samples first.

    Raises:
        UserError: tensors with different numbers of samples.
    """
    values = load_state(path)
    counts = {name: len(value) if value.dim() else 0 for name, value in values.items()}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        raise UserError(f"{path}: its tensors must all begin with the same number of samples, they have {counts}")
    total = min(counts.values()) if max_samples is None else min(max_samples, *counts.values())
    for start in range(0, total, batch_size):
        yield {name: value[start : min(total, start + batch_size)] for name, value in values.items()}


def output_of(module: nn.Module, batch: Any) -> torch.Tensor:
    """Logits of the network on a batch of keyword arguments, or whatever it returns first."""
    result = module(**batch)
    logits = getattr(result, "logits", None)
    if logits is not None:
        return logits  # type: ignore[no-any-return]
    pooled = getattr(result, "pooler_output", None)
    return pooled if pooled is not None else result[0]  # type: ignore[no-any-return]
