"""``neurocl spiking``: spiking networks that learn streams of tasks; their energy; their export."""

from __future__ import annotations

from pathlib import Path
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
    help="Spiking networks that learn streams of tasks: STAER and its baselines, energy, export.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.command()
def train(
    method: Annotated[str | None, typer.Option(help="See `neurocl list methods`.", show_default="staer")] = None,
    dataset: DatasetOption = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="spiking-mlp, spiking-resnet-small, spiking-resnet18, spiking-resnet19.",
            rich_help_panel=MODEL,
            show_default="by data set",
        ),
    ] = None,
    timesteps: Annotated[
        int | None,
        typer.Option(help="T, steps of simulation; even for staer.", rich_help_panel=MODEL, show_default="4"),
    ] = None,
    buffer_size: BufferSizeOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate.", rich_help_panel=MODEL, show_default="0.003, AdamW, cosine")
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
    """Train a spiking network on a stream of tasks.

    With no options STAER learns the five tasks of seq-digits (real scans, embedded) in about a minute.

    [dim]neurocl spiking train --method er --buffer-size 50
    neurocl spiking train --dataset seq-mnist --backbone spiking-resnet-small --timesteps 2
    neurocl spiking train --seeds 0,1,2 --set options.beta=0.01[/dim]
    """
    from neurocl.cli.training import run_training

    run_training(
        "spiking",
        {
            "method": method,
            "dataset": dataset,
            "backbone": backbone,
            "timesteps": timesteps,
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

    print_config("spiking")


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

    resume_run("spiking", run, device, threads, as_json, quiet)


@app.command()
def energy(
    run: RunArgument,
    samples: Annotated[int, typer.Option(min=1, help="Test items to measure on.")] = 64,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Firing rates, dead neurons, operations and energy of a run's network, beside its ANN twin."""
    from neurocl.cli.energy import print_energy

    print_energy(run, samples, device, threads, as_json)


@app.command()
def export(
    run: RunArgument,
    to: Annotated[str, typer.Option(help="Format: nir.")] = "nir",
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="RUN/model.nir")] = None,
) -> None:
    """Write a run's network for neuromorphic tools (NIR), after checking that it gives the same spikes.

    NIR has neurons that reset at once to zero, so train with [bold]--set neuron.reset=hard[/bold]; others are refused.
    """
    from neurocl.errors import UserError

    if to != "nir":
        raise UserError(f"--to knows nir, got {to!r}")
    from neurocl.spiking.export import export_run

    written = export_run(run, out)
    checked = f"{written.checked_neurons:,} neuron outputs over {written.checked_steps} steps"
    typer.echo(f"{written.path}: {written.layers} layers of neurons; {checked} replayed from the file, all equal")
