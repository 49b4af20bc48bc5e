"""Tokens of a frozen encoder, computed once per picture set and kept in the cache."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from neurocl.backbones.efficientnet_lite import PICTURE_SIDE, batches_of_tokens, load_pretrained
from neurocl.data.locate import cache_dir


def cached_tokens(label: str, images: NDArray[np.uint8]) -> NDArray[np.float16]:
    """EfficientNet-Lite0's last feature map of every picture as tokens.

    Args:
        label: what the message on stderr calls the pictures while they are computed, some 50 a second and core.
        images: uint8 [N, 1 or 3, H, W].

    Returns: float16 [N, 25, 320], memory-mapped from the cache; keyed by the pictures' SHA-256.
    Raises:
        UserError: the encoder's weights are not here.
    """
    digest = hashlib.sha256(np.ascontiguousarray(images).data)
    digest.update(f"efficientnet_lite0 {PICTURE_SIDE} {images.shape}".encode())
    kept = cache_dir() / "tokens" / f"{digest.hexdigest()}.npy"
    if not kept.is_file():
        _compute(label, images, kept)
    tokens: NDArray[np.float16] = np.load(kept, mmap_mode="r", allow_pickle=False)
    return tokens


def _compute(label: str, images: NDArray[np.uint8], kept: Path) -> None:
    model = load_pretrained()
    kept.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{kept.stem[:16]}.", suffix=".tmp", dir=kept.parent)
    os.close(handle)
    try:
        out, done = None, 0
        for tokens in batches_of_tokens(model, images):
            if out is None:
                out = open_memmap(name, mode="w+", dtype=np.float16, shape=(len(images), *tokens.shape[1:]))
            out[done : done + len(tokens)] = tokens.numpy()
            done += len(tokens)
            if done % 640 < len(tokens):
                print(f"tokens of {label}: {done} of {len(images)} pictures", file=sys.stderr, flush=True)
        assert out is not None
        out.flush()
        os.replace(name, kept)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
