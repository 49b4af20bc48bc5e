"""What the evaluate and resume commands of the spiking and the continual group share."""

from __future__ import annotations

import json
from pathlib import Path

import typer


def evaluate_run(run: Path, device: str | None, threads: int | None, as_json: bool) -> None:
    """Print accuracies of a run's checkpoint per task."""
    from neurocl.continual.training import evaluate
    from neurocl.report import print_accuracies

    measured = evaluate(run, device=device, threads=threads)
    if as_json:
        typer.echo(json.dumps(measured))
    else:
        print_accuracies(measured["class_il"], measured["task_il"])


def resume_run(area: str, run: Path, device: str | None, threads: int | None, as_json: bool, quiet: bool) -> None:
    """Continue ``run`` as ``train --resume`` does."""
    from neurocl.cli.training import run_training

    run_training(
        area,
        {"device": device, "threads": threads},
        config_file=None,
        assignments=(),
        seeds=None,
        out=None,
        resume_path=run,
        stop_after_task=None,
        smoke=False,
        quiet=quiet,
        as_json=as_json,
    )
