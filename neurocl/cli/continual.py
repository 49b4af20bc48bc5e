"""``neurocl continual``: ordinary networks on the same protocol as the spiking ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neurocl.cli.options import (
    MODEL,
    RUN,
    STREAM,
    DataDirOption,
    DeviceOption,
    JsonOption,
    QuietOption,
    RunArgument,
    ThreadsOption,
)

app = typer.Typer(
    help="Ordinary networks: SGD, joint, ER, ER-ACE, DER, DER++, LwF, online EWC, iCaRL, GDumb.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.command()
def train(
    method: Annotated[str | None, typer.Option(help="See `neurocl list methods`.", show_default="derpp")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="See `neurocl list datasets`; or a .npz file.", show_default="seq-digits")
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="mlp, resnet18, resnet19, resnet-small.", rich_help_panel=MODEL, show_default="by data set"),
    ] = None,
    buffer_size: Annotated[
        int | None, typer.Option(help="Items in the replay memory.", rich_help_panel=STREAM, show_default="200")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over each task.", rich_help_panel=STREAM, show_default="by data set")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Also the replay batch.", rich_help_panel=STREAM, show_default="by data set")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate.", rich_help_panel=MODEL, show_default="published, else 0.1")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of everything random.", rich_help_panel=RUN, show_default="0")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Several runs: 0,1,2, or how many.", rich_help_panel=RUN, show_default=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of these.", rich_help_panel=RUN, show_default=False)
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any key: options.alpha=0.2, optimizer.name=adamw ...",
            rich_help_panel=RUN,
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder.", rich_help_panel=RUN, show_default="runs/...")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run.", rich_help_panel=RUN, show_default=False)
    ] = None,
    stop_after_task: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this task; resume later.", rich_help_panel=RUN, show_default=False),
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="The whole path in seconds, on little data.", rich_help_panel=RUN)
    ] = False,
    data_dir: DataDirOption = None,
    device: DeviceOption = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32 or bf16.", rich_help_panel="Machine", show_default="fp32")
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train an ordinary network on a stream of tasks.

    Hyper-parameters start from the published ones of the data set, method and memory size.

    [dim]neurocl continual train --method er-ace --buffer-size 50
    neurocl continual train --method derpp --dataset seq-mnist --seeds 0,1,2[/dim]
    """
    from neurocl.cli.training import run_training

    run_training(
        "continual",
        {
            "method": method,
            "dataset": dataset,
            "backbone": backbone,
            "buffer_size": buffer_size,
            "epochs": epochs,
            "batch_size": batch_size,
            "optimizer.lr": lr,
            "seed": seed,
            "data_dir": data_dir,
            "device": device,
            "precision": precision,
            "threads": threads,
        },
        config_file=config,
        assignments=assignments or (),
        seeds=seeds,
        out=out,
        resume_path=resume,
        stop_after_task=stop_after_task,
        smoke=smoke,
        quiet=quiet,
        as_json=as_json,
    )


@app.command()
def config() -> None:
    """Print every configuration key with its default and meaning, as a YAML file to edit."""
    from neurocl.cli.training import print_config

    print_config("continual")


@app.command()
def evaluate(
    run: RunArgument,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a run's checkpoint again on the tasks it has learnt."""
    from neurocl.cli.evaluation import evaluate_run

    evaluate_run(run, device, threads, as_json)


@app.command()
def resume(
    run: RunArgument,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Go on with an interrupted run; the same as `train --resume`."""
    from neurocl.cli.evaluation import resume_run

    resume_run("continual", run, device, threads, as_json, quiet)
