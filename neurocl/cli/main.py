"""The ``neurocl`` command: groups, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from neurocl import __version__
from neurocl.cli import (
    catalogue,
    continual,
    data,
    doctor,
    federated,
    federated_export,
    flower,
    merging,
    merging_about,
    merging_suite,
    report,
    reproduce,
    spiking,
    trajectory,
    trajectory_export,
    trajectory_plot,
)
from neurocl.compat.argument_help import ensure_argument_help
from neurocl.errors import Interrupted, NeuroclError

app = typer.Typer(
    name="neurocl",
    help="Learning systems that keep learning.\n\n"
    "Start with [bold]neurocl spiking train[/bold]: a spiking network learns five tasks of real digits on your CPU "
    "in about a minute. Then [bold]neurocl list[/bold] shows what else there is, "
    "[bold]neurocl info staer[/bold] explains one name.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"neurocl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Options that stand before the command."""


app.add_typer(spiking.app, name="spiking", rich_help_panel="Areas")
app.add_typer(continual.app, name="continual", rich_help_panel="Areas")
merging.app.command()(merging_about.methods)
merging.app.command()(merging_about.info)
merging.app.command()(merging_suite.stats)
merging.app.command()(merging_suite.train)
merging.app.command()(merging_suite.evaluate)
merging.app.command()(merging_suite.compare)
app.add_typer(merging.app, name="merging", rich_help_panel="Areas")
trajectory.app.command()(trajectory_plot.plot)
trajectory.app.command()(trajectory_export.export)
app.add_typer(trajectory.app, name="trajectory", rich_help_panel="Areas")
federated.app.command()(federated_export.export)
federated.app.command()(flower.server)
federated.app.command()(flower.client)
federated.app.command()(flower.keys)
app.add_typer(federated.app, name="federated", rich_help_panel="Areas")
app.add_typer(data.app, name="data", rich_help_panel="Data and results")
app.command("report", rich_help_panel="Data and results")(report.report)
app.command("reproduce", rich_help_panel="Data and results")(reproduce.reproduce)
app.command("list", rich_help_panel="About neurocl")(catalogue.list_names)
app.command("info", rich_help_panel="About neurocl")(catalogue.info)
app.command("doctor", rich_help_panel="About neurocl")(doctor.doctor)


def main() -> None:
    """Run the command line; a mistake ends in one line and its exit code, ``--debug`` shows the traceback."""
    # Threads that spin while they wait make a busy machine many times slower; torch's runtime reads this when it loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ensure_argument_help()
    debug = "--debug" in sys.argv
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        app(arguments)
    except NeuroclError as error:
        if debug:
            raise
        typer.echo(f"neurocl: {error}", err=True)
        sys.exit(error.exit_code)
    except SystemExit as end:
        # Typer turns Ctrl-C into an exit without a word.
        if end.code == Interrupted.exit_code:
            typer.echo("neurocl: interrupted", err=True)
        raise
    except KeyboardInterrupt:
        typer.echo("neurocl: interrupted", err=True)
        sys.exit(Interrupted.exit_code)
    except BrokenPipeError:
        sys.exit(1)
