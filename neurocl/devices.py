"""Where and how a run computes: device, number format, threads, seeds, and what the machine is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import random
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from neurocl.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
PACKAGES = ("torch", "numpy", "numba", "snntorch", "spikingjelly", "tslearn", "safetensors")


@dataclass(frozen=True)
class Runtime:
    """Device and number format of one run.

    ``precision`` is ``"fp32"`` (plain) or ``"bf16"`` (autocast: matrix products and convolutions in
    bfloat16, weights, neuron state and losses in float32).
    """

    device: torch.device
    precision: str = "fp32"

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Context in which a forward pass runs."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device or the CPU; otherwise what torch understands.

    Raises:
        UserError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r} was asked for, but torch sees no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} does not exist: this machine has {torch.cuda.device_count()}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' was asked for, but this torch has no Metal back end; use --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")
    return device


def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks for the next step instead of returning them to the system.

    Every step of a network allocates the same large tensors; without this the kernel clears and maps their pages
    anew each time: 3.7 instead of 2.6 s for a step of STAER (``benchmarks/staer_step.py``), for 1.7 instead of 2.2 GB.

    Returns: whether the C library took the settings (glibc only).
    """
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) and libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))
    except (OSError, AttributeError):
        return False


def prepare(device: str, precision: str, threads: int | None, *, keep_memory: bool = True) -> Runtime:
    """Set the thread count, the matrix-product format and the allocator, and resolve the device.

    Raises:
        UserError: a device that is not here, or a precision that is neither ``fp32`` nor ``bf16``.
    """
    if precision not in ("fp32", "bf16"):
        raise UserError(f"precision must be fp32 or bf16, got {precision!r}")
    if threads is not None:
        torch.set_num_threads(threads)
    resolved = resolve_device(device)
    if keep_memory and resolved.type == "cpu":
        keep_freed_memory()
    if resolved.type == "cuda":
        # kernels and counters address the current device, not the tensors' one
        torch.cuda.set_device(resolved)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return Runtime(resolved, precision)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's legacy and torch's global generators (methods own theirs besides)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (third-party code draws from the legacy generator)
    torch.manual_seed(seed)


def generator_for(*keys: int) -> torch.Generator:
    """A CPU generator whose stream is a function of ``keys`` alone (seed, purpose, task, epoch ...)."""
    state = np.random.SeedSequence([key % 2**64 for key in keys]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


def random_state() -> dict[str, torch.Tensor]:
    """State of torch's global generators, as tensors for a checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, value in enumerate(torch.cuda.get_rng_state_all()):
            state[f"cuda{index}"] = value
    return state


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """Undo :func:`random_state`; devices that are gone are ignored."""
    torch.set_rng_state(state["cpu"].cpu())
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda{index}" in state:
                torch.cuda.set_rng_state(state[f"cuda{index}"].cpu(), index)


def peak_memory_mb(device: torch.device | None = None) -> dict[str, float]:
    """Peak resident memory of the process and, on a CUDA device, peak memory allocated there, in MB."""
    memory = {"host": _peak_kilobytes() / 1024.0}
    if device is not None and device.type == "cuda":
        memory["device"] = torch.cuda.max_memory_allocated(device) / 2**20
    return memory


def _peak_kilobytes() -> float:
    # ru_maxrss of a child begins at what its parent had at the fork; the kernel's own mark does not
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return float(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024.0 if sys.platform == "darwin" else float(peak)


def cpu_name() -> str:
    """The processor's model name where the system tells it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """What a results file says about the machine."""
    described: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        described["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def versions() -> dict[str, str]:
    """Versions of neurocl and of the packages that its numbers depend on."""
    found = {}
    for name in ("neurocl", *PACKAGES):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
