"""``neurocl federated export``: the model of a run as a folder for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from neurocl.cli.options import JsonOption, QuietOption, RunArgument


def export(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="A new folder.", show_default="RUN/model, RUN/peft ...")] = None,
    to: Annotated[str, typer.Option(help="model, transformers or peft.")] = "model",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Take the server's model away: a folder that needs neither the run nor its data, checked before it is kept.

    `--to model` works for every method with one model; `transformers` and `peft` for runs on a folder of transformers.
    """
    from neurocl.federated.export import export_model, known_format

    say = None if quiet else lambda line: typer.echo(line, err=True)
    written = export_model(run, out, to=known_format(to), say=say)
    if as_json:
        document: dict[str, Any] = {
            "run": str(run),
            "folder": str(written.folder),
            "format": written.to,
            "bytes": written.files,
            "difference": written.difference,
            "samples": written.num_samples,
            "model": written.model,
        }
        typer.echo(json.dumps(document, indent=1))
        return
    if written.model != "finished":
        typer.echo(f"{run} is not finished: this is its model {written.model}", err=True)
    for name, size in written.files.items():
        typer.echo(f"Written: {written.folder / name} ({max(1, round(size / 1e3))} kB)")
    typer.echo(
        f"checked: the scores of {written.num_samples} test samples differ from the run's by at most "
        f"{written.difference:.1g} of the largest"
    )
    typer.echo("Load it in Python:\n")
    typer.echo(written.usage)
