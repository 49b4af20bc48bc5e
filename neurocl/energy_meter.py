"""A meter for the energy of a block of code: hardware counters where they can be read, else a labelled estimate.

``with EnergyMeter() as meter: ...`` and then ``meter.reading``. Meters nest, and a meter that fails leaves a note
in its reading and never disturbs the code that it measures.

Back ends: ``rapl`` reads the processor's counters from Linux's powercap folder (recent kernels show them to root
alone; they count the whole machine, other people's work included); ``nvml`` reads an NVIDIA board, by its energy
counter or, on boards without one, by sampled power; ``model`` multiplies CPU seconds of this process by stated
watts per core and calls the result estimated.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, get_args

Backend = Literal["auto", "rapl", "nvml", "model"]

JOULES_PER_KWH = 3.6e6
POWERCAP = Path("/sys/class/powercap")
# A counter of 262 kJ under 400 W turns over after eleven minutes: at this interval it does so at most once.
COUNTER_INTERVAL = 30.0
POWER_INTERVAL = 0.1


def counter_joules(readings_uj: Sequence[int], range_uj: int) -> float:
    """Energy between the first and the last reading of a counter that starts again at 0 after ``range_uj``.

    Args:
        readings_uj: microjoules, so close in time that the counter turned over at most once from one to the next.
        range_uj: the value that the counter never reaches.

    Returns: joules.
    """
    total = 0
    for before, after in pairwise(readings_uj):
        total += after - before if after >= before else after - before + range_uj
    return total / 1e6


def trapezoid_joules(seconds: Sequence[float], watts: Sequence[float]) -> float:
    """Energy in joules of power samples, taken as straight lines between them."""
    return sum(
        (t1 - t0) * (p0 + p1) / 2 for t0, t1, p0, p1 in zip(seconds, seconds[1:], watts, watts[1:], strict=False)
    )


@dataclass(frozen=True)
class EnergyReading:
    """What a meter saw.

    Attributes:
        backend: ``"rapl"``, ``"nvml"``, ``"model"``, or ``"none"`` where nothing could be read.
        joules: energy of the block, None where nothing could be read.
        estimated: the figure was computed from a model, not measured.
        seconds: wall time of the block.
        cpu_seconds: CPU time that this process spent in it, all threads.
        samples: how often the counter was read.
        device: what was counted.
        version: of the back end.
        note: what a reader must know, or why there is no figure.
    """

    backend: str
    joules: float | None
    estimated: bool
    seconds: float
    cpu_seconds: float
    samples: int
    device: str
    version: str
    note: str


class _Source(Protocol):
    """One way to read energy: ``sample`` at both ends of the block and every ``interval`` seconds between."""

    backend: str
    interval: float | None
    device: str
    version: str
    note: str

    def sample(self) -> None: ...

    def joules(self) -> float: ...


class _Rapl:
    """Processor packages and memory, from ``<root>/intel-rapl:*``."""

    backend = "rapl"
    interval: float | None = COUNTER_INTERVAL
    note = "counts the whole machine, other processes included"

    def __init__(self, root: Path) -> None:
        self.zones: list[tuple[Path, int]] = []
        names = []
        for zone in sorted(root.glob("intel-rapl:*")):
            name = (zone / "name").read_text().strip()
            # "core" and "uncore" are parts of a package, and "psys" contains the packages: adding them counts twice
            if name.startswith("package") or name == "dram":
                self.zones.append((zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
                names.append(name)
        if not self.zones:
            raise OSError(f"no RAPL counters in {root}")
        self.device = ", ".join(names)
        self.version = f"Linux {os.uname().release}"
        self.readings: list[list[int]] = [[] for _ in self.zones]

    def sample(self) -> None:
        for (path, _), readings in zip(self.zones, self.readings, strict=True):
            readings.append(int(path.read_text()))

    def joules(self) -> float:
        return sum(
            counter_joules(readings, range_uj)
            for readings, (_, range_uj) in zip(self.readings, self.zones, strict=True)
        )


class _Nvml:
    """One NVIDIA board; torch names the board because NVML ignores CUDA_VISIBLE_DEVICES."""

    backend = "nvml"

    def __init__(self, device: str) -> None:
        import pynvml
        import torch

        self.api: Any = pynvml
        pynvml.nvmlInit()
        properties = torch.cuda.get_device_properties(torch.device(device))
        self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        self.device = properties.name
        self.version = f"driver {pynvml.nvmlSystemGetDriverVersion()}"
        self.synchronize = torch.cuda.synchronize
        self.times: list[float] = []
        self.values: list[float] = []
        try:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)
            self.counts = True
        except pynvml.NVMLError:
            self.counts = False
        self.interval: float | None = None if self.counts else POWER_INTERVAL
        self.note = "the board alone, by " + ("its energy counter" if self.counts else "power sampled at 10 Hz")

    def sample(self) -> None:
        if self.counts:
            self.synchronize()
            self.values.append(self.api.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3)
        else:
            self.values.append(self.api.nvmlDeviceGetPowerUsage(self.handle) / 1e3)
        self.times.append(time.perf_counter())

    def joules(self) -> float:
        return self.values[-1] - self.values[0] if self.counts else trapezoid_joules(self.times, self.values)


class _Model:
    """CPU seconds of this process times a constant."""

    backend = "model"
    interval: float | None = None
    device = "this process"
    version = "1"

    def __init__(self, watts_per_core: float) -> None:
        self.watts = watts_per_core
        self.note = f"estimated: CPU seconds x {watts_per_core:g} W per core"
        self.seconds: list[float] = []

    def sample(self) -> None:
        self.seconds.append(time.process_time())

    def joules(self) -> float:
        return (self.seconds[-1] - self.seconds[0]) * self.watts


class EnergyMeter:
    """Measure the energy of a ``with`` block; one block after the other, or meters within meters.

    Args:
        backend: ``"auto"`` takes ``nvml`` for a CUDA device and ``rapl`` otherwise, and reports ``"none"`` where
            that cannot be read. It never falls back to ``model``: estimates are given to those who ask for them.
        device: where the block computes, as torch writes it (``"cpu"``, ``"cuda:1"``).
        powercap: folder with the RAPL zones.
        watts_per_core: the constant of ``model``.

    Raises:
        ValueError: no such back end, or a constant that is not positive.
    """

    def __init__(
        self,
        backend: Backend = "auto",
        *,
        device: str = "cpu",
        powercap: Path = POWERCAP,
        watts_per_core: float = 10.0,
    ) -> None:
        if backend not in get_args(Backend):
            raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
        if not watts_per_core > 0:
            raise ValueError(f"watts_per_core must be positive, got {watts_per_core}")
        self._backend = backend if backend != "auto" else ("nvml" if device.startswith("cuda") else "rapl")
        self._device, self._powercap, self._watts = device, powercap, watts_per_core
        self._reading: EnergyReading | None = None
        self._source: _Source | None = None
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._samples = 0
        self._start = (0.0, 0.0)

    @property
    def reading(self) -> EnergyReading:
        """What the last block took.

        Raises:
            RuntimeError: no block has ended yet.
        """
        if self._reading is None:
            raise RuntimeError("the meter has no reading before its block ends")
        return self._reading

    def _open(self) -> _Source:
        if self._backend == "rapl":
            return _Rapl(self._powercap)
        return _Nvml(self._device) if self._backend == "nvml" else _Model(self._watts)

    def _sample(self) -> None:
        if self._source is None or self._failure is not None:
            return
        try:
            self._source.sample()
            self._samples += 1
        except Exception as error:
            self._failure = error

    def _watch(self, interval: float) -> None:
        while not self._ended.wait(interval):
            self._sample()

    def __enter__(self) -> EnergyMeter:
        self._source = self._failure = self._thread = None
        self._samples = 0
        self._ended.clear()
        try:
            self._source = self._open()
        except Exception as error:
            self._failure = error
        self._start = time.perf_counter(), time.process_time()
        self._sample()
        if self._source is not None and self._source.interval is not None and self._failure is None:
            self._thread = threading.Thread(target=self._watch, args=(self._source.interval,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._sample()
        seconds, cpu_seconds = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        source, joules = self._source, None
        if source is not None and self._failure is None:
            try:
                joules = source.joules()
            except Exception as failure:
                self._failure = failure
        if source is None or joules is None:
            note = f"not readable on this machine ({self._backend}: {_reason(self._failure)})"
            self._reading = EnergyReading("none", None, False, seconds, cpu_seconds, self._samples, "", "", note)
            return
        self._reading = EnergyReading(
            backend=source.backend,
            joules=joules,
            estimated=source.backend == "model",
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            samples=self._samples,
            device=source.device,
            version=source.version,
            note=source.note,
        )


def _reason(error: Exception | None) -> str:
    """Why a back end failed, in a few words."""
    if isinstance(error, PermissionError):
        return "its counters are readable by root only"
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed"
    return str(error) or type(error).__name__
