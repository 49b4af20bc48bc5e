"""``neurocl report``: tables and pictures of finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neurocl.cli.options import RunsArgument


def report(
    runs: RunsArgument,
    form: Annotated[str, typer.Option("--format", help="table, csv, json, md, latex or html.")] = "table",
    plots: Annotated[
        bool,
        typer.Option("--plots", help="Draw curves and matrices into RUN/plots, or ./plots for several."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the report here; plots go beside it.", show_default="stdout")
    ] = None,
) -> None:
    """Compare runs: mean ± standard deviation over the seeds of each setting.

    [dim]neurocl report runs/* --plots
    neurocl report runs/a runs/b --format html --out report.html[/dim]
    """
    from neurocl.errors import UserError
    from neurocl.report import FORMATS, print_summary, read_results, render, save_plots
    from neurocl.runs import find_runs, write_atomically

    if form not in FORMATS:
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, got {form!r}")
    documents, notes = read_results(find_runs(runs))
    for note in notes:
        typer.echo(f"left out: {note}", err=True)
    if form == "table":
        if out is not None:
            raise UserError("--out needs a file format: --format csv, json, md, latex or html")
        print_summary(documents)
    elif out is None:
        typer.echo(render(documents, form), nl=False)
    else:
        write_atomically(out, render(documents, form))
        typer.echo(str(out))
    if plots:
        folder = out.parent / "plots" if out is not None else runs[0] / "plots" if len(runs) == 1 else Path("plots")
        for path in save_plots(documents, folder):
            typer.echo(str(path), err=form not in ("table",) and out is None)
