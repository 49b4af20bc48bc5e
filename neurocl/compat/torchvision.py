"""A shim that lets other packages import torchvision beside a torch build it was not compiled for.

spikingjelly installs torchvision and torchaudio; beside a CPU build of torch their compiled parts do
not load, and every package that imports them fails too (transformers, peft, parts of diffusers and of
spikingjelly). Only the schemas of two operators are missing for torchvision's Python part: with them
defined it imports, and its compiled operators raise when called. torchaudio is hidden, since its
users treat it as optional. neurocl itself needs neither; call :func:`ensure_torchvision` right
before importing a package that does.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any, Literal

State = Literal["native", "shimmed", "hidden", "absent"]

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: Any = None  # torch forgets the schemas when the library object dies
_shimmed = False


def _purge(package: str) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


def _installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def _try_import(package: str) -> bool:
    """Whether ``package`` imports; a half-imported one is removed again."""
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError, OSError, AttributeError):
        _purge(package)
        return False
    return True


def ensure_torchvision() -> State:
    """Make ``import torchvision`` work, or fail cleanly, in this process.

    Returns: ``"native"`` (nothing to do), ``"shimmed"`` (Python part usable, compiled operators raise),
        ``"hidden"`` (even the shim failed; packages see it as not installed) or ``"absent"``.
    """
    global _library, _shimmed
    if not _installed("torchvision"):
        return "hidden" if "torchvision" in sys.modules else "absent"
    if not _try_import("torchvision"):
        import torch

        if _library is None:
            _library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in SCHEMAS:
                _library.define(schema)
        if not _try_import("torchvision"):
            sys.modules["torchvision"] = None  # type: ignore[assignment]
            ensure_torchaudio()
            return "hidden"
        _shimmed = True
    ensure_torchaudio()
    return "shimmed" if _shimmed else "native"


def ensure_torchaudio() -> State:
    """Hide a torchaudio that cannot be imported, so that its optional users go on without it."""
    if not _installed("torchaudio"):
        return "hidden" if "torchaudio" in sys.modules else "absent"
    if _try_import("torchaudio"):
        return "native"
    sys.modules["torchaudio"] = None  # type: ignore[assignment]
    return "hidden"
