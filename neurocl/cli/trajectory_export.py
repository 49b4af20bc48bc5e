"""``neurocl trajectory export``: a forecaster as graphs for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from neurocl.cli.options import JsonOption, QuietOption
from neurocl.cli.trajectory import RunArgument, ThreadsOption


def export(
    run: RunArgument,
    to: Annotated[str, typer.Option(help="onnx or torchscript.")] = "onnx",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the graphs.", show_default="RUN/onnx or RUN/torchscript")
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a forecaster as three graphs with a manifest, after checking that they forecast what torch does.

    The loop around the graphs is in `neurocl.trajectory.Runner`, which needs no torch for ONNX.
    """
    from neurocl.trajectory.export import export_forecaster, known_format

    form = known_format(to)
    from neurocl.devices import prepare
    from neurocl.trajectory.forecaster import Forecaster

    prepare("cpu", "fp32", threads)
    forecaster = Forecaster.load(run)
    folder = run / to if out is None else out
    say = None if quiet else lambda line: typer.echo(line, err=True)
    written = export_forecaster(forecaster, folder, to=form, say=say)
    if as_json:
        document: dict[str, Any] = {
            "folder": str(written.folder),
            "format": to,
            "bytes": written.files,
            "difference": written.difference,
        }
        typer.echo(json.dumps(document, indent=1))
        return
    for name, size in written.files.items():
        typer.echo(f"Written: {written.folder / name} ({size / 1e3:.0f} kB)")
    typer.echo(
        f"checked: {written.num_samples} forecasts of {written.num_agents} agents differ from torch's by at most "
        f"{written.difference:.2g} network units"
    )
