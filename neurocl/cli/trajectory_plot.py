"""``neurocl trajectory plot``: pictures of a forecaster and of what it forecasts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neurocl.cli.options import JsonOption, QuietOption
from neurocl.cli.trajectory import (
    DataOption,
    DeviceOption,
    JointOption,
    RunArgument,
    SamplesOption,
    SelectOption,
    StepsOption,
    ThreadsOption,
)
from neurocl.errors import UserError
from neurocl.registry import did_you_mean

if TYPE_CHECKING:
    from neurocl.runs import RunFolder
    from neurocl.trajectory.config import TrajectoryConfig
    from neurocl.trajectory.fields import Field
    from neurocl.trajectory.forecaster import Forecaster, SamplingConfig
    from neurocl.trajectory.scenes import Scenes

KINDS_OF_PICTURES = ("curves", "codes", "scenes", "density", "horizon")
BACKGROUNDS = ("auto", "nba", "nfl", "none")
DENSITY_SAMPLES = 500


def plot(
    run: RunArgument,
    what: Annotated[str, typer.Option(help="curves, codes, scenes, density, horizon or all.")] = "all",
    num_scenes: Annotated[int, typer.Option("--scenes", min=1, help="Scenes to draw.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder of the pictures.", show_default="RUN/plots")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Another data set of the same lengths.", show_default="the run's")
    ] = None,
    split: Annotated[str, typer.Option(help="test or val.")] = "test",
    animate: Annotated[bool, typer.Option("--animate", help="Scenes also as GIF.")] = False,
    field: Annotated[str, typer.Option(help="Below players: nba, nfl, none; auto goes by the data set.")] = "auto",
    max_scenes: Annotated[int, typer.Option(min=1, help="Scenes to measure codes and horizons on.")] = 50,
    num_samples: SamplesOption = 20,
    steps: StepsOption = 5,
    select: SelectOption = "centroids",
    joint: JointOption = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of scenes and the draws.")] = 0,
    data_dir: DataOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw how a forecaster learnt, its codes, forecasts of test scenes, and how its error grows with time."""
    for value, known, option in (
        (what, (*KINDS_OF_PICTURES, "all"), "--what"),
        (split, ("test", "val"), "--split"),
        (field, BACKGROUNDS, "--field"),
    ):
        if value not in known:
            raise UserError(f"{option} must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")
    from neurocl.config import validate
    from neurocl.devices import prepare
    from neurocl.runs import RunFolder
    from neurocl.trajectory.forecaster import Forecaster, SamplingConfig
    from neurocl.trajectory.training import load_config, load_split

    wanted = KINDS_OF_PICTURES if what == "all" else (what,)
    folder = RunFolder.open(run)
    config = load_config(folder)
    runtime = prepare(device, "fp32", threads)
    pictures = _Pictures(run / "plots" if out is None else out, quiet)
    # Curves can be looked at while the run still trains; everything else needs its model.
    if what == "curves":
        _curves(folder, config, pictures)
    else:
        forecaster = Forecaster.load(run, device=str(runtime.device))
        values = {"steps": steps, "select": select, "joint": joint, "seed": seed}
        sampling = validate(SamplingConfig, values, source="plot")
        changes: dict[str, Any] = {"dataset": dataset, "files": ()} if dataset else {}
        if data_dir is not None:
            changes["data_dir"] = data_dir
        data = config.model_copy(update=changes)
        scenes = load_split(data, split)  # type: ignore[arg-type]
        ground = _ground(field, scenes)
        if "curves" in wanted:
            _curves(folder, config, pictures)
        if "codes" in wanted:
            _codes(forecaster, _some(scenes, max_scenes, seed)[1], pictures)
        if "scenes" in wanted or "density" in wanted:
            numbers, shown = _some(scenes, num_scenes, seed)
            for row, number in enumerate(numbers):
                one = shown.subset([row])
                if "scenes" in wanted:
                    _scene(forecaster, one, number, num_samples, sampling, ground, animate, pictures)
                if "density" in wanted:
                    _density(forecaster, one, number, sampling, ground, pictures)
        if "horizon" in wanted:
            _horizon(forecaster, _some(scenes, max_scenes, seed)[1], data, num_samples, sampling, pictures)
    if as_json:
        typer.echo(json.dumps({"written": [str(path) for path in pictures.written]}, indent=1))
        return
    for path in pictures.written:
        typer.echo(f"Written: {path}")


class _Pictures:
    """The folder that pictures go to, and which were put there."""

    def __init__(self, folder: Path, quiet: bool) -> None:
        self.folder, self.quiet = folder, quiet
        self.written: list[Path] = []

    def path(self, name: str) -> Path:
        """Where the picture goes that is drawn next."""
        from neurocl.runs import make_folder

        make_folder(self.folder)
        self.say(f"drawing {name}")
        self.written.append(self.folder / name)
        return self.written[-1]

    def say(self, line: str) -> None:
        if not self.quiet:
            typer.echo(line, err=True)


def _some(scenes: Scenes, count: int, seed: int) -> tuple[list[int], Scenes]:
    """Numbers of scenes drawn from all, in their order, and these scenes."""
    import torch

    from neurocl.devices import generator_for

    rows = torch.randperm(len(scenes), generator=generator_for(seed, 8))[:count].sort().values
    return rows.tolist(), scenes.subset(rows)


def _ground(name: str, scenes: Scenes) -> Field | None:
    from neurocl.trajectory.fields import FIELDS, field

    if name == "auto":
        name = next((known for known in FIELDS if scenes.name.split(":")[0] == known), "none")
    return None if name == "none" else field(name, scenes.unit)


def _curves(folder: RunFolder, config: TrajectoryConfig, pictures: _Pictures) -> None:
    from neurocl.trajectory.config import budget, completed
    from neurocl.trajectory.plots_canvas import save_figure
    from neurocl.trajectory.plots_model import learning_figure

    fades = config.model.get("rank") != 0
    steps = budget(completed(config).stage1).steps
    fading = (config.strength_from * steps, config.strength_to * steps) if fades else (0.0, 0.0)
    try:
        records = folder.read_metrics()
    except ValueError as error:
        raise UserError(f"{folder.metrics_path}: a line is not JSON ({error})") from None
    unit = folder.read_result().get("unit", "") if folder.has_result() else ""
    figure = learning_figure(records, unit=unit, fading=fading)
    save_figure(figure, pictures.path("curves.png"))


def _codes(forecaster: Forecaster, scenes: Scenes, pictures: _Pictures) -> None:
    from neurocl.trajectory.plots_canvas import save_figure
    from neurocl.trajectory.plots_model import code_use_figure, codebook_figure, codebook_view

    view = codebook_view(forecaster, scenes)
    save_figure(code_use_figure(view.counts), pictures.path("code-use.png"))
    save_figure(codebook_figure(view), pictures.path("codebook.png"))


def _scene(
    forecaster: Forecaster,
    scene: Scenes,
    number: int,
    num_samples: int,
    sampling: SamplingConfig,
    ground: Field | None,
    animate: bool,
    pictures: _Pictures,
) -> None:
    from neurocl.trajectory.plots import animate_forecast, draw_forecast
    from neurocl.trajectory.scenes import KINDS, Forecast

    path = pictures.path(f"scene-{number}.png")
    targets = scene.target_mask[0]
    chosen = forecaster.forecast_scenes(scene, num_samples, sampling)
    found = Forecast(
        trajectories=chosen.trajectories[:, 0, targets].cpu(),
        probabilities=chosen.probabilities[:, 0, targets].cpu(),
        agents=tuple(str(agent) for agent in scene.agent_id[0, targets].tolist()),
        hz=scene.hz,
        unit=scene.unit,
        joint=sampling.joint,
    )
    past, neighbours, truth = _tracks(scene)
    options: dict[str, Any] = {
        "neighbours": neighbours,
        "truth": truth,
        "kinds": [KINDS[kind] for kind in scene.kind[0, targets].tolist()],
        "field": ground,
        "title": _title(scene, number),
    }
    draw_forecast(found, past, path, **options)
    if animate:
        animate_forecast(found, past, pictures.path(f"scene-{number}.gif"), **options)


def _density(
    forecaster: Forecaster,
    scene: Scenes,
    number: int,
    sampling: SamplingConfig,
    ground: Field | None,
    pictures: _Pictures,
) -> None:
    from neurocl.trajectory.plots_canvas import save_figure
    from neurocl.trajectory.plots_density import density_figure

    path = pictures.path(f"density-{number}.png")
    plain = sampling.model_copy(update={"select": "samples", "num_samples": None})
    drawn = forecaster.forecast_scenes(scene, DENSITY_SAMPLES, plain).trajectories[:, 0, scene.target_mask[0]].cpu()
    past, neighbours, truth = _tracks(scene)
    figure = density_figure(
        drawn,
        past,
        hz=scene.hz,
        unit=scene.unit,
        neighbours=neighbours,
        truth=truth,
        field=ground,
        title=f"{_title(scene, number)}: {DENSITY_SAMPLES} samples",
    )
    save_figure(figure, path)


def _tracks(scene: Scenes) -> tuple[Any, Any, Any]:
    """Past of the targets, past of the others, future of the targets of one scene; NaN where nobody looked."""
    nan = float("nan")
    targets = scene.target_mask[0]
    past = scene.past[0].masked_fill(~scene.past_mask[0, :, :, None], nan)
    truth = scene.future[0].masked_fill(~scene.future_mask[0, :, :, None], nan)
    return past[targets], past[scene.agent_mask[0] & ~targets], truth[targets]


def _title(scene: Scenes, number: int) -> str:
    recording = scene.recording[0]
    name = scene.name if recording.startswith(scene.name) else f"{scene.name}, {recording}"
    return f"{name}, scene {number}"


def _horizon(
    forecaster: Forecaster,
    scenes: Scenes,
    config: TrajectoryConfig,
    num_samples: int,
    sampling: SamplingConfig,
    pictures: _Pictures,
) -> None:
    from neurocl.trajectory.plots_canvas import save_figure
    from neurocl.trajectory.plots_model import horizon_figure, measure_horizons
    from neurocl.trajectory.training import load_split

    path, train = pictures.path("horizon.png"), load_split(config, "train")
    rows = measure_horizons(
        forecaster,
        scenes,
        train,
        num_forecasts=num_samples,
        sampling=sampling,
        say=lambda name: pictures.say(f"measuring {name}"),
    )
    title = f"{scenes.name}: {len(scenes)} scenes, {scenes.num_targets} agents"
    save_figure(horizon_figure(rows, hz=scenes.hz, unit=scenes.unit, title=title), path)
