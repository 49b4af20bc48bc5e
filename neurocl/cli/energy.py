"""What ``neurocl spiking energy`` prints: a table by layer, totals beside the ANN twin, constants, measured time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from neurocl.spiking.energy import EnergyReport, Timing, Totals

SCHEMA = 1


def print_energy(run: Path, samples: int, device: str | None, threads: int | None, as_json: bool) -> None:
    """Measure a run's network and print the report, or one JSON document."""
    from neurocl.spiking.energy import measure_run

    report = measure_run(run, samples=samples, device=device, threads=threads)
    if as_json:
        typer.echo(json.dumps({"schema": SCHEMA, "run": str(run), **report.as_dict()}))
        return

    from rich.console import Console

    console = Console(highlight=False)
    console.print(_layers(report))
    console.print(_totals(report))
    console.print("\n".join(_lines(report)))


def _table(title: str, first: str, columns: Iterable[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _layers(report: EnergyReport) -> Table:
    title = f"Per image over T = {report.timesteps} steps, measured on {_items(report.items)}"
    table = _table(title, "layer", ("MACs", "ACs", "updates", "rate %", "dead %", "nJ", "ANN nJ"))
    for layer in report.layers:
        spiking = layer.firing_rate is not None
        table.add_row(
            layer.name,
            _count(layer.macs),
            _count(layer.acs),
            _count(layer.updates),
            _per_cent(layer.firing_rate),
            _per_cent(layer.dead_share),
            _nanojoule(layer.compute_pj),
            _nanojoule(layer.ann_pj) if layer.ann_pj or not spiking else "",
        )
    return table


def _totals(report: EnergyReport) -> Table:
    networks = {"spiking": report.spiking}
    if report.spiking_every_step != report.spiking:
        networks["no reuse"] = report.spiking_every_step
    networks["ANN twin"] = report.ann
    table = _table("Totals per image", "", networks)
    rows: dict[str, Callable[[Totals], str]] = {
        "MACs": lambda totals: _count(totals.macs),
        "ACs, synaptic operations": lambda totals: _count(totals.acs),
        "membrane updates": lambda totals: _count(totals.updates),
        "synapses, nJ": lambda totals: _nanojoule(totals.synapse_pj),
        "neurons, nJ": lambda totals: _nanojoule(totals.neuron_pj),
        "computing (sum), nJ": lambda totals: _nanojoule(totals.compute_pj),
        "computing, times the twin's": lambda totals: f"{totals.compute_pj / report.ann.compute_pj:.2f}",
        "memory traffic, kB": lambda totals: f"{totals.memory_bytes / 1e3:.1f}",
        "memory traffic, nJ": lambda totals: _nanojoule(totals.memory_pj),
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(totals) for totals in networks.values()))
    return table


def _lines(report: EnergyReport) -> list[str]:
    constants = report.constants
    lines = [
        f"Spikes: {_count(report.spikes) or 0} per image; mean rate {100 * report.firing_rate:.2f} % of neurons a "
        f"step; {100 * report.dead_share:.1f} % of neurons fired for none of the {report.items} images.",
    ]
    if report.spiking_every_step != report.spiking:
        lines.append("No reuse: a chip that computes the first layer at all T steps; this program does so once.")
    lines += [
        f"Constants: {constants.mac_pj:g} pJ per MAC and membrane update, {constants.ac_pj:g} pJ per AC (synaptic "
        f"operation), {constants.byte_pj:g} pJ per byte; {constants.source}. Memory traffic is not part of the sum.",
        *(_measured(timing) for timing in report.timings),
        _energy(report.timings),
    ]
    return lines


def _measured(timing: Timing) -> str:
    return (
        f"Measured, batch {timing.batch_size}: {1e3 * timing.seconds_per_image:.3g} ms and "
        f"{1e3 * timing.cpu_seconds_per_image:.3g} CPU-ms per image."
    )


def _energy(timings: Iterable[Timing]) -> str:
    """The measured energy, or why there is none."""
    measured = list(timings)
    figures = [
        f"{timing.joules_per_image:.3g} J per image at batch {timing.batch_size}"
        for timing in measured
        if timing.joules_per_image is not None
    ]
    meter = measured[-1].meter
    if not figures:
        return f"Measured energy: {meter.note}."
    return f"Measured energy: {', '.join(figures)} ({meter.backend}: {meter.device}; {meter.note})."


def _items(count: int) -> str:
    return "1 test image" if count == 1 else f"{count} test images"


def _count(value: float) -> str:
    """Three digits with k, M or G; nothing for zero."""
    if not value:
        return ""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999.5 and above would round up to four digits
        if value >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{value:.3g}"


def _nanojoule(picojoule: float) -> str:
    value = picojoule / 1e3
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _per_cent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
