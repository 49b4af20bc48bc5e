"""``neurocl trajectory``: train forecasters, forecast recordings, compare with simple baselines, convert files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neurocl.cli.options import JsonOption, QuietOption
from neurocl.errors import UserError

if TYPE_CHECKING:
    from neurocl.trajectory.evaluation import Evaluation
    from neurocl.trajectory.evaluation_tables import Table
    from neurocl.trajectory.streaming import Streamer

app = typer.Typer(
    help="Forecast where agents go: several futures with probabilities.\n\n"
    "[bold]neurocl trajectory train[/bold] learns from a small simulated crowd, without any download; "
    "[bold]neurocl trajectory forecast[/bold] then draws the futures of a recording.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

DataOption = Annotated[
    Path | None, typer.Option(help="Folder with data sets.", envvar="NEUROCL_DATA", show_default="the user's cache")
]
RunArgument = Annotated[Path, typer.Argument(help="A run folder of `neurocl trajectory train`.", show_default=False)]
SamplesOption = Annotated[int, typer.Option(min=1, help="Forecasts per agent.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Steps of the sampler.")]
SamplerOption = Annotated[str, typer.Option(help="unmask or posterior.")]
SelectOption = Annotated[str, typer.Option(help="centroids of clustered samples, medoids, or plain samples.")]
JointOption = Annotated[bool, typer.Option("--joint", help="Forecasts of whole scenes.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads.", envvar="NEUROCL_THREADS", show_default="torch's")
]


@app.command()
def train(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Own recordings instead of a data set.", show_default=False)
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="crowd, eth-ucy:FOLD, sdd, nba or nfl.", show_default="crowd")
    ] = None,
    preset: Annotated[str, typer.Option(help="tiny, small or paper.")] = "small",
    faithful: Annotated[bool, typer.Option("--faithful", help="The paper's model, without our additions.")] = False,
    prior: Annotated[
        str | None, typer.Option(help="diffusion, autoregressive, flow or ddim.", show_default="diffusion")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates of each stage.", show_default="by preset")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any keys.", show_default=False)] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any key: stage1.lr=5e-4, model.rank=4 ...", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of everything random.", show_default="0")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/...")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run.", show_default=False)] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="The whole path in seconds, on little data.")] = False,
    data_dir: DataOption = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.", show_default="auto")] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a forecaster: codes for futures, then a prior over the codes. Validation scenes choose the weights.

    The data set `crowd` is synthetic: walkers of a small social-force simulator. The others are real recordings.
    """
    from neurocl.config import merged, parse_overrides, read_yaml
    from neurocl.trajectory import training
    from neurocl.trajectory.config import resolve

    say = None if quiet else TrainingProgress()
    if resume is not None:
        result = training.resume(resume, say=say)
    else:
        flags: dict[str, Any] = {
            "dataset": dataset,
            "files": tuple(files) if files else None,
            "faithful": faithful or None,
            "prior": prior,
            "seed": seed,
            "data_dir": data_dir,
            "device": device,
            "threads": threads,
        }
        if files and dataset:
            raise UserError("give --dataset or files, not both")
        if steps is not None:
            flags |= {"stage1": {"steps": steps}, "stage2": {"steps": steps}}
        given = {key: value for key, value in flags.items() if value is not None}
        layers = [read_yaml(config) if config else {}, given, parse_overrides(assignments or [])]
        if smoke:
            layers.insert(0, SMOKE)
        result = training.train(resolve("tiny" if smoke else preset, merged(*layers)), out=out, say=say)
    if as_json:
        typer.echo(json.dumps({"run": str(result.path), "validation": result.metrics}, indent=1))
        return
    for name, value in result.metrics.items():
        typer.echo(f"validation {name}: {value:.3f}")
    typer.echo(f"Run: {result.path}")
    typer.echo(f"Compare it with simple baselines: neurocl trajectory evaluate {result.path}")


SMOKE: dict[str, Any] = {
    "stage1": {"steps": 4, "validate_every": 4, "batch_size": 8},
    "stage2": {"steps": 4, "validate_every": 4, "batch_size": 8},
    "max_validation_scenes": 4,
}


class TrainingProgress:
    """Lines or a bar on stderr, for the ``say`` of a training run."""

    def __init__(self) -> None:
        import sys

        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._live = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, detail="")

    def __call__(self, stage: str, step: int, steps: int, numbers: dict[str, float]) -> None:
        measured = {name: value for name, value in numbers.items() if name.startswith("val_")}
        if measured:
            text = ", ".join(f"{name} {value:.3f}" for name, value in measured.items())
            line = f"{stage} {step}/{steps}: {text}"
            self._bar.console.print(line, highlight=False) if self._live else typer.echo(line, err=True)
        if self._live:
            if not self._bar.live.is_started:
                self._bar.start()
            detail = f"loss {sum(value for name, value in numbers.items() if name not in measured):.3f}"
            self._bar.update(self._task, description=stage, completed=step, total=steps, detail=detail)
            if stage == "prior" and step == steps:
                self._bar.stop()


@app.command()
def forecast(
    run: RunArgument,
    source: Annotated[
        Path | None, typer.Option("--input", help="A recording: txt, csv, ndjson, npz, json ...", show_default=False)
    ] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="A live feed on standard input: a line in, a line of JSON with forecasts out."),
    ] = False,
    every: Annotated[
        float | None,
        typer.Option(min=0, help="With --stream: seconds between forecasts, at least.", show_default="every instant"),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="With --stream: stop at a malformed line instead of skipping it.")
    ] = False,
    num_samples: SamplesOption = 20,
    out: Annotated[Path | None, typer.Option(help="forecasts.json, .csv, .ndjson or .npz.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture: .png, .svg or .pdf.", show_default=False)] = None,
    animate: Annotated[Path | None, typer.Option(help="Animation: .gif or .mp4.", show_default=False)] = None,
    recording: Annotated[int, typer.Option(min=0, help="Which recording of a file that holds several.")] = 0,
    steps: StepsOption = 5,
    sampler: SamplerOption = "unmask",
    select: SelectOption = "centroids",
    joint: JointOption = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forecast everybody who is there at the end of a recording, or now: several futures with probabilities.

    Lines of a live feed are JSON, `{"t": 0.4, "agents": {"7": [1.0, 2.0]}}`, or rows `t,id,x,y`, where a row with a
    later t completes the instant before.
    """
    from neurocl.config import validate
    from neurocl.devices import prepare
    from neurocl.trajectory.forecaster import Forecaster, SamplingConfig
    from neurocl.trajectory.plots import animate_forecast, draw_forecast
    from neurocl.trajectory.readers import read_recordings
    from neurocl.trajectory.scenes import KINDS
    from neurocl.trajectory.writers import write_forecast

    if stream == (source is not None):
        raise UserError("give either --input FILE or --stream")
    files = {"--out": out, "--plot": plot, "--animate": animate, "--recording": recording or None}
    foreign = files | {"--json": as_json or None} if stream else {"--every": every, "--strict": strict or None}
    for option, value in foreign.items():
        if value is not None:
            other, hint = ("--input", "; forecasts go to standard output") if stream else ("--stream", "")
            raise UserError(f"{option} belongs to {other}{hint}")
    runtime = prepare(device, "fp32", threads)
    forecaster = Forecaster.load(run, device=str(runtime.device))
    sampling = validate(
        SamplingConfig,
        {"steps": steps, "sampler": sampler, "select": select, "joint": joint, "seed": seed},
        source="forecast",
    )
    if source is None:
        from neurocl.trajectory.streaming import Streamer

        _follow(Streamer(forecaster, every=every or 0.0, num_samples=num_samples, sampling=sampling), strict=strict)
        return
    recordings = read_recordings(source)
    if recording >= len(recordings):
        raise UserError(f"{source} holds {len(recordings)} recordings, there is no number {recording}")
    found, scenes = forecaster.forecast_tracks(recordings[recording], num_samples, sampling=sampling)
    here = len(found.agents)
    past = scenes.past[0].masked_fill(~scenes.past_mask[0, :, :, None], float("nan"))
    if out is not None:
        write_forecast(out, found)
    kinds = [KINDS[int(kind)] for kind in scenes.kind[0, :here]]
    if plot is not None:
        title = recordings[recording].name
        draw_forecast(found, past[:here], plot, neighbours=past[here:], kinds=kinds, title=title)
    if animate is not None:
        animate_forecast(found, past[:here], animate, neighbours=past[here:], kinds=kinds)
    ends = found.trajectories[:, :, -1]
    rows: list[dict[str, Any]] = []
    for index, agent in enumerate(found.agents):
        best = int(found.probabilities[:, index].argmax())
        x, y = (float(value) for value in ends[best, index])
        rows.append({"agent": agent, "x": x, "y": y, "probability": float(found.probabilities[best, index])})
    written = [str(path) for path in (out, plot, animate) if path is not None]
    if as_json:
        document = {"likeliest end": rows, "unit": found.unit, "hz": found.hz, "written": written, **found.extra}
        typer.echo(json.dumps(document, indent=1))
        return
    horizon = found.trajectories.shape[2] / found.hz
    typer.echo(f"{here} agents, {num_samples} forecasts each over {horizon:.1f} s, in {found.extra['seconds']:.2f} s")
    _print_rows(
        ["agent", f"likeliest end x ({found.unit})", "y", "probability"],
        [[row["agent"], f"{row['x']:.2f}", f"{row['y']:.2f}", f"{row['probability']:.2f}"] for row in rows],
    )
    if written:
        typer.echo("Written: " + ", ".join(written))


def _follow(streamer: Streamer, *, strict: bool) -> None:
    """Forecasts on standard output for the lines of standard input, until one of the two ends."""
    import os
    import sys

    from neurocl.trajectory.streaming import BadLine, forecast_line, read_feed

    if sys.stdin is None:
        raise UserError("standard input is closed")
    skipped = 0
    try:
        for item in read_feed(sys.stdin.buffer, streamer.max_agents):
            try:
                if isinstance(item, BadLine):
                    raise UserError(item.reason)
                found = streamer.update(item.t, item.positions, item.kinds)
            except UserError as error:
                message = f"standard input:{item.line}: {error}"
                if strict:
                    raise UserError(message) from error
                skipped += 1
                typer.echo(f"skipped: {message}", err=True)
                continue
            if found is not None:
                sys.stdout.write(forecast_line(found) + "\n")
                sys.stdout.flush()
    except BrokenPipeError:
        # Who reads has had enough. What is left in the buffer goes nowhere, or Python complains at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        if skipped:
            typer.echo(f"malformed lines skipped: {skipped}", err=True)


@app.command()
def evaluate(
    run: RunArgument,
    dataset: Annotated[
        str | None, typer.Option(help="Another data set of the same lengths.", show_default="the run's")
    ] = None,
    split: Annotated[str, typer.Option(help="test or val.")] = "test",
    num_samples: SamplesOption = 20,
    max_scenes: Annotated[int | None, typer.Option(min=1, help="Only so many scenes.", show_default="all")] = None,
    baselines: Annotated[bool, typer.Option(help="Compute simple forecasters on the same scenes.")] = True,
    steps: StepsOption = 5,
    sampler: SamplerOption = "unmask",
    select: SelectOption = "centroids",
    joint: JointOption = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    horizons: Annotated[bool, typer.Option("--horizons", help="A second table, of errors by horizon.")] = False,
    counts: Annotated[
        str | None, typer.Option(help="Errors with fewer forecasts too: 1,5,10.", show_default=False)
    ] = None,
    miss_distance: Annotated[
        float | None, typer.Option(min=0, help="In the data's unit; for the miss rate.", show_default="2 m")
    ] = None,
    drop_history: Annotated[
        float, typer.Option(min=0, max=0.9, help="Hide this share of the observed positions, from the baselines too.")
    ] = 0.0,
    form: Annotated[str, typer.Option("--format", help="table, md, csv or json.")] = "table",
    out: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and evaluation.md.", show_default=False)
    ] = None,
    data_dir: DataOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
) -> None:
    """Every metric of the model beside baselines that are computed on the same scenes, not quoted."""
    from neurocl.config import validate
    from neurocl.devices import generator_for, prepare
    from neurocl.runs import RunFolder
    from neurocl.trajectory.evaluation import evaluate as measure
    from neurocl.trajectory.evaluation_tables import markdown
    from neurocl.trajectory.forecaster import Forecaster, SamplingConfig
    from neurocl.trajectory.training import load_config, load_split

    if form not in FORMATS:
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, got {form!r}")
    if split not in ("test", "val"):
        raise UserError(f"--split must be test or val, got {split!r}")
    fewer = _whole_numbers("--counts", counts)
    if out is not None and (out / "evaluation.json").exists():
        raise UserError(f"{out} holds an evaluation already; choose another --out")
    runtime = prepare(device, "fp32", threads)
    forecaster = Forecaster.load(run, device=str(runtime.device))
    changes: dict[str, Any] = {"dataset": dataset, "files": ()} if dataset else {}
    if data_dir is not None:
        changes["data_dir"] = data_dir
    config = load_config(RunFolder.open(run)).model_copy(update=changes)
    scenes = load_split(config, split)  # type: ignore[arg-type]
    if max_scenes is not None and max_scenes < len(scenes):
        import torch

        order = torch.randperm(len(scenes), generator=generator_for(config.seed, 7))[:max_scenes]
        scenes = scenes.subset(order.sort().values)
    if drop_history:
        from neurocl.trajectory.augment import dropped

        scenes = dropped(scenes, generator_for(config.seed, 10), drop_history)
    values = {"steps": steps, "sampler": sampler, "select": select, "joint": joint, "seed": seed}
    found = measure(
        forecaster,
        scenes,
        train=load_split(config, "train") if baselines else None,
        num_forecasts=num_samples,
        counts=fewer,
        sampling=validate(SamplingConfig, values, source="evaluate"),
        miss=miss_distance,
        say=None if quiet else lambda name: typer.echo(f"measuring {name}", err=True),
    )
    found.settings.update(run=str(run), split=split, **({"drop_history": drop_history} if drop_history else {}))
    if out is not None:
        found.write(out, markdown(found))
    _print_evaluation(found, form, horizons=horizons, quiet=quiet)
    if out is not None and not quiet:
        typer.echo(f"Written: {out / 'evaluation.json'}, {out / 'evaluation.md'}", err=form != "table")


FORMATS = ("table", "md", "csv", "json")


def _whole_numbers(option: str, text: str | None) -> tuple[int, ...]:
    """``"1,5,10"`` as numbers."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UserError(f"{option} expects whole numbers such as 1,5,10, got {text!r}") from None


def _print_evaluation(found: Evaluation, form: str, *, horizons: bool, quiet: bool) -> None:
    from neurocl.trajectory import evaluation_tables as tables
    from neurocl.trajectory.evaluation import row_document

    if form == "json":
        typer.echo(json.dumps([row_document(row) for row in found.rows], indent=1))
    elif form == "csv":
        import csv
        import sys

        table = tables.every_number(found)
        csv.writer(sys.stdout, lineterminator="\n").writerows([table.header, *table.rows])
    elif form == "md":
        typer.echo(tables.markdown(found), nl=False)
    else:
        if not quiet:
            typer.echo("\n".join(tables.summary(found)) + "\n")
        _print_table(tables.main_table(found, short=True))
        if horizons:
            typer.echo("\nminADE/minFDE by horizon")
            _print_table(tables.horizon_table(found, short=True))
        if found.rows[0].by_count:
            typer.echo("\nminADE/minFDE by number of forecasts")
            _print_table(tables.count_table(found, short=True))
        if not quiet:
            lines = [*tables.verdicts(found), "", *tables.calibration_lines(found), *found.notes]
            typer.echo("\n" + "\n".join(lines))


def _print_table(table: Table) -> None:
    _print_rows(table.header, table.marked("[bold]", "[/bold]"), gap=1)


def _print_rows(header: Sequence[str], rows: Sequence[Sequence[str]], gap: int = 2) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for index, column in enumerate(header):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A recording.", show_default=False)], as_json: JsonOption = False
) -> None:
    """Say what a recording is: format, rate, unit, agents, time."""
    from neurocl.trajectory.readers import detect_format, read_recordings

    kind = detect_format(file)
    rows = []
    for tracks in read_recordings(file):
        span = float(tracks.time[-1] - tracks.time[0]) if len(tracks.time) else 0.0
        rows.append(
            {
                "name": tracks.name,
                "agents": tracks.num_agents,
                "rows": len(tracks.time),
                "seconds": round(span, 3),
                "hz": round(tracks.hz, 4),
                "unit": tracks.unit,
            }
        )
    if as_json:
        typer.echo(json.dumps({"file": str(file), "format": kind, "recordings": rows}, indent=1))
        return
    typer.echo(f"{file}: {kind}, {len(rows)} recording{'s' if len(rows) != 1 else ''}")
    _print_rows(list(rows[0]), [[str(value) for value in row.values()] for row in rows[:50]])


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A recording.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="New file: .ndjson, .csv, .npz or .json.", show_default=False)],
) -> None:
    """Write a recording in another format; .gz packs it."""
    from neurocl.trajectory.readers import read_recordings
    from neurocl.trajectory.writers import write_tracks

    if target.exists():
        raise UserError(f"{target} exists already")
    recordings = read_recordings(source)
    write_tracks(target, recordings)
    typer.echo(f"Written: {target} ({len(recordings)} recordings, {sum(len(t.time) for t in recordings):,} rows)")
