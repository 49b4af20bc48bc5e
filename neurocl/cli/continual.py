"""``neurocl continual``: ordinary networks on the same protocol as the spiking ones."""

from __future__ import annotations

from typing import Annotated

import typer

from neurocl.cli.options import (
    MODEL,
    BatchSizeOption,
    BufferSizeOption,
    ConfigOption,
    DataDirOption,
    DatasetOption,
    DeviceOption,
    EpochsOption,
    JsonOption,
    OutOption,
    PrecisionOption,
    QuietOption,
    ResumeOption,
    RunArgument,
    SeedOption,
    SeedsOption,
    SetOption,
    SmokeOption,
    StopAfterTaskOption,
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
    dataset: DatasetOption = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="mlp, resnet18, resnet19, resnet-small.", rich_help_panel=MODEL, show_default="by data set"),
    ] = None,
    buffer_size: BufferSizeOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate.", rich_help_panel=MODEL, show_default="published, else 0.1")
    ] = None,
    seed: SeedOption = None,
    seeds: SeedsOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
    stop_after_task: StopAfterTaskOption = None,
    smoke: SmokeOption = False,
    data_dir: DataDirOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
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
