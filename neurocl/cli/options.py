"""Options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RUN = "Run"
STREAM = "Stream"
MODEL = "Model"
MACHINE = "Machine"

RunArgument = Annotated[
    Path, typer.Argument(help="A run folder, as printed at the end of training.", show_default=False)
]
RunsArgument = Annotated[
    list[Path], typer.Argument(help="Run folders, or folders of several seeds.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=MACHINE, show_default="auto")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads.", envvar="NEUROCL_THREADS", rich_help_panel=MACHINE, show_default="torch's"),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder with data sets.", envvar="NEUROCL_DATA", rich_help_panel=STREAM, show_default="the user's cache"
    ),
]
