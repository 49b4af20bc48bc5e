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

DatasetOption = Annotated[
    str | None, typer.Option(help="See `neurocl list datasets`; or a .npz file.", show_default="seq-digits")
]
BufferSizeOption = Annotated[
    int | None, typer.Option(help="Items in the replay memory.", rich_help_panel=STREAM, show_default="200")
]
EpochsOption = Annotated[
    int | None, typer.Option(help="Passes over each task.", rich_help_panel=STREAM, show_default="by data set")
]
BatchSizeOption = Annotated[
    int | None, typer.Option(help="Also the replay batch.", rich_help_panel=STREAM, show_default="by data set")
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder with data sets.", envvar="NEUROCL_DATA", rich_help_panel=STREAM, show_default="the user's cache"
    ),
]
SeedOption = Annotated[int | None, typer.Option(help="Of everything random.", rich_help_panel=RUN, show_default="0")]
SeedsOption = Annotated[
    str | None, typer.Option(help="Several runs: 0,1,2, or how many.", rich_help_panel=RUN, show_default=False)
]
ConfigOption = Annotated[
    Path | None, typer.Option(help="YAML file, see the command `config`.", rich_help_panel=RUN, show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any key of the command `config`: options.beta=0.01, optimizer.name=sgd ...",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
OutOption = Annotated[Path | None, typer.Option(help="Run folder.", rich_help_panel=RUN, show_default="runs/...")]
ResumeOption = Annotated[
    Path | None, typer.Option(help="Go on with this run.", rich_help_panel=RUN, show_default=False)
]
StopAfterTaskOption = Annotated[
    int | None,
    typer.Option(min=1, help="Stop after this task; resume later.", rich_help_panel=RUN, show_default=False),
]
SmokeOption = Annotated[
    bool, typer.Option("--smoke", help="The whole path in seconds, on little data.", rich_help_panel=RUN)
]
DeviceOption = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=MACHINE, show_default="auto")
]
PrecisionOption = Annotated[
    str | None, typer.Option(help="fp32 or bf16.", rich_help_panel=MACHINE, show_default="fp32")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads.", envvar="NEUROCL_THREADS", rich_help_panel=MACHINE, show_default="torch's"),
]
