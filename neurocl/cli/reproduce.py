"""``neurocl reproduce``: run a recipe and say whether its figures come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neurocl.cli.options import DataDirOption, DeviceOption, JsonOption, QuietOption, ThreadsOption

if TYPE_CHECKING:
    from neurocl.recipes import Recipe


def reproduce(
    recipe: Annotated[str, typer.Argument(help="A name from `neurocl list recipes`, or a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the runs.", show_default="runs/...")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Only try that it runs; figures are not compared.")] = False,
    data_dir: DataDirOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a recipe and compare its figures with the expected ones; exit code 1 if one is outside its tolerance."""
    from datetime import datetime

    import numpy as np

    from neurocl.recipes import load_recipe
    from neurocl.runs import read_json

    chosen = load_recipe(recipe)
    extra: dict[str, Any] = {"data_dir": data_dir, "device": device, "threads": threads}
    given = {key: value for key, value in extra.items() if value is not None}
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    parent = out or Path("runs") / f"reproduce-{chosen.name.replace('/', '-')}-{stamp}"
    results = []
    for seed in chosen.seeds[:1] if smoke else chosen.seeds:
        folder = parent / f"seed-{seed}"
        _train(chosen, {**given, "seed": seed}, folder, smoke=smoke, quiet=quiet)
        results.append(read_json(folder / "result.json")["metrics"])
    rows = []
    for expected in () if smoke else chosen.expected:
        group, _, name = expected.metric.partition(".")
        measured = float(np.mean([metrics[group][name] for metrics in results]))
        passed = abs(measured - expected.value) <= expected.tolerance
        rows.append({**expected.model_dump(), "measured": measured, "passed": passed})
    if as_json:
        typer.echo(json.dumps({"recipe": chosen.name, "runs": str(parent), "figures": rows}, indent=1))
    else:
        _print(chosen.name, chosen.source, rows, parent)
    if not all(row["passed"] for row in rows):
        raise typer.Exit(1)


def _train(recipe: Recipe, given: dict[str, Any], out: Path, *, smoke: bool, quiet: bool) -> None:
    """One run of a recipe in a folder."""
    if recipe.area == "trajectory":
        from neurocl.cli import trajectory
        from neurocl.trajectory import training
        from neurocl.trajectory.config import resolve as resolve_forecaster

        config = resolve_forecaster("small", recipe.config, trajectory.SMOKE if smoke else {}, given)
        training.train(config, out=out, say=None if quiet else trajectory.TrainingProgress())
        return
    if recipe.area == "federated":
        from neurocl.cli import federated
        from neurocl.federated.driver import run_federated

        settings = federated.checked(recipe.config, federated.SMOKE if smoke else {}, given)
        run_federated(settings, out=out, say=None if quiet else federated.Progress())
        return
    from neurocl.cli.progress import make_progress
    from neurocl.cli.training import SMOKE
    from neurocl.config import merged
    from neurocl.continual.building import resolve
    from neurocl.continual.training import train

    values = merged(recipe.config, SMOKE if smoke else {}, given)
    train(resolve(recipe.area, values), out=out, progress=make_progress(quiet))


def _print(name: str, source: str, rows: list[dict[str, Any]], parent: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{name}[/bold]: {source}")
    if rows:
        table = Table(box=None, pad_edge=False)
        for column in ("figure", "expected", "tolerance", "measured", ""):
            table.add_column(column, justify="left" if column in ("figure", "") else "right")
        for row in rows:
            verdict = "ok" if row["passed"] else "[red]outside[/red]"
            expected, tolerance, measured = (f"{row[key]:.4g}" for key in ("value", "tolerance", "measured"))
            table.add_row(row["metric"], expected, tolerance, measured, verdict)
        console.print(table)
    typer.echo(f"Results: {parent}")
