"""A forecaster beside simple baselines on the same scenes: every metric, with confidence intervals over scenes.

``K`` forecasts, ``M`` agents that count, ``G`` scenes, ``T`` predicted steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neurocl.devices import machine, versions
from neurocl.errors import UserError
from neurocl.runs import make_folder, write_atomically
from neurocl.trajectory import metrics
from neurocl.trajectory.baselines import Baseline, all_baselines, target_tracks
from neurocl.trajectory.calibration import inside, log_likelihood, nearest_forecast, tempered
from neurocl.trajectory.fields import field as sports_field
from neurocl.trajectory.forecaster import Forecaster, SamplingConfig, num_drawn
from neurocl.trajectory.resample import METRES
from neurocl.trajectory.scenes import Scenes
from neurocl.trajectory.selection import select

EVALUATION_SCHEMA = 1
LONG_SECONDS = 2.0  # from here on a forecast is long
MISS_METRES, SHORT_MISS_METRES = 2.0, 0.5  # a forecast that ends farther away has missed
TOUCH_METRES = 0.1
NUM_BINS = 10
MAX_AGENTS = 768  # forecast side by side: 200 samples of so many take 2 GB
# What a model is compared in with the best baseline; smaller is better in all.
COMPARED = ("minADE", "minFDE", "minJADE", "minJFDE", "miss rate", "NLL")
HORIZONS = {"sdd": (4, 8, 12), "eth-ucy": (4, 8, 12), "nba": (5, 10, 15, 20), "nfl": (5, 10, 16)}


@dataclass(frozen=True)
class Scores:
    """One forecaster on one set of scenes, in the units of the data.

    Attributes:
        name: of the row.
        num_forecasts: K; 1 for deterministic ones.
        numbers: mean of every metric, medians too.
        intervals: 95 % interval over scenes of the metrics that are compared.
        milliseconds: per scene.
        by_count: minADE, minFDE, minJADE and minJFDE of fewer forecasts, by their number.
        best_baseline: of a model, by metric: how it compares with the best baseline.
    """

    name: str
    num_forecasts: int
    numbers: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    milliseconds: float
    by_count: dict[int, dict[str, float]] = field(default_factory=dict)
    best_baseline: dict[str, Comparison] = field(default_factory=dict)


class Comparison(NamedTuple):
    """A forecaster less another one, on the same scenes.

    Attributes:
        baseline: the other one.
        difference: of the means; negative when the forecaster is better.
        low, high: 95 % interval, scenes drawn again for both together.
    """

    baseline: str
    difference: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Reliability:
    """Probabilities against how often forecasts turned out to be the nearest to the truth.

    Attributes:
        error: expected calibration error.
        log_loss: mean of -log p of the nearest forecast; a cluster without members has half a sample.
        bins: predicted and observed share and number of forecasts, bins with as many each.
    """

    error: float
    log_loss: float
    bins: list[tuple[float, float, int]]


@dataclass(frozen=True)
class Evaluation:
    """A model beside baselines.

    Attributes:
        rows: the model, first plain samples, then as asked if that is something else; then the baselines.
        settings: data set, unit, number of scenes and agents, K, N, steps, seed, select, thresholds, device, versions.
        horizons: numbers of steps at which minADE and minFDE are told.
        reliability: of ``masses`` of clusters, and of the ``tempered`` ones if the forecaster is calibrated.
        coverage: by nominal level, the share of truths within the calibrated radii: at each step.
        notes: what a reader has to know, a sentence each.
    """

    rows: list[Scores]
    settings: dict[str, Any]
    horizons: tuple[int, ...]
    reliability: dict[str, Reliability]
    coverage: dict[str, list[float]]
    notes: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """All of it as plain values."""
        rows = [row_document(row) for row in self.rows]
        return {"schema": EVALUATION_SCHEMA, **asdict(self), "rows": rows}

    def write(self, folder: Path, markdown: str) -> None:
        """Put ``evaluation.json`` and ``evaluation.md`` into a folder, which is made.

        Raises:
            RunError: the disk is full or the folder cannot be written.
        """
        make_folder(folder)
        write_atomically(folder / "evaluation.json", json.dumps(self.document(), indent=1) + "\n")
        write_atomically(folder / "evaluation.md", markdown)


def row_document(row: Scores) -> dict[str, Any]:
    """A row as plain values, comparisons with the names of their parts."""
    versus = {name: {**found._asdict(), "clear": found.clear} for name, found in row.best_baseline.items()}
    per_second = 1000 / row.milliseconds if row.milliseconds else None
    return {**asdict(row), "scenes_per_second": per_second, "best_baseline": versus}


@dataclass(frozen=True)
class Thresholds:
    """From where on a forecast has missed and two agents have touched, and where the field ends; in a unit.

    Attributes:
        miss: distance at the end; None leaves the miss rate out.
        touch: distance between agents; None leaves collisions out.
        field: length and width, with the origin in a corner; None leaves who is outside out.
    """

    miss: float | None
    touch: float | None
    field: tuple[float, float] | None = None


def thresholds_for(scenes: Scenes, miss: float | None = None) -> Thresholds:
    """2 m (0.5 m for forecasts below 2 s) and 0.1 m in the unit of the scenes; none for pixels, which have no length.

    Args:
        scenes: their unit, rate, length and name count.
        miss: in the unit of the scenes, instead.

    Raises:
        UserError: a distance that is not positive.
    """
    if miss is not None and not miss > 0:
        raise UserError(f"a miss needs a distance above 0, got {miss}")
    if scenes.unit not in METRES:
        return Thresholds(miss, None)
    long = scenes.num_predicted / scenes.hz >= LONG_SECONDS
    metres = METRES[scenes.unit]
    sport = scenes.name.partition(":")[0]
    size = sports_field(sport, scenes.unit).size if sport in ("nba", "nfl") else None
    return Thresholds(miss or (MISS_METRES if long else SHORT_MISS_METRES) / metres, TOUCH_METRES / metres, size)


def default_horizons(scenes: Scenes) -> tuple[int, ...]:
    """Steps at which papers tell the errors on a data set, with the last one; quarters for other data."""
    steps = scenes.num_predicted
    known = HORIZONS.get(scenes.name if scenes.name in HORIZONS else scenes.name.partition(":")[0], ())
    if scenes.name == "nba:rebound" or steps not in known:
        known = tuple(max(1, round(steps * quarter / 4)) for quarter in (1, 2, 3, 4))
    return tuple(sorted(set(known)))


def scores(
    name: str,
    predicted: Tensor,
    truth: Tensor,
    scene: Tensor,
    *,
    thresholds: Thresholds,
    probabilities: Tensor | None = None,
    seconds: float = 0.0,
    horizons: Sequence[int] = (),
    seed: int = 0,
) -> tuple[Scores, dict[str, Tensor]]:
    """Metrics of forecasts, and those of every agent or scene that models are compared in.

    Args:
        name: of the row.
        predicted: [K, M, T, 2].
        truth: [M, T, 2].
        scene: number of each agent's scene, int64 [M].
        thresholds: of misses, collisions and the field.
        probabilities: of the forecasts, [K, M]; None means equal ones.
        seconds: that the forecasts took.
        horizons: numbers of steps at which minADE and minFDE are told.
        seed: of the bootstrap.

    Returns: the scores, and by metric one number per agent [M] or per scene [G].
    """
    predicted, truth = predicted.double(), truth.double()
    mean_distance, end_distance = metrics.errors(predicted, truth)
    joint_ade, joint_fde = metrics.joint_errors(predicted, truth, scene)
    each = {
        "minADE": mean_distance.amin(dim=0),
        "minFDE": end_distance.amin(dim=0),
        "minJADE": joint_ade,
        "minJFDE": joint_fde,
    }
    if thresholds.miss is not None:
        each["miss rate"] = metrics.misses(predicted, truth, thresholds.miss)
    if len(predicted) >= 3:
        each["NLL"] = metrics.kde_nll(predicted, truth, probabilities)
    numbers = {metric: float(values.mean()) for metric, values in each.items()}
    numbers["median minADE"] = float(each["minADE"].quantile(0.5))
    numbers["median minFDE"] = float(each["minFDE"].quantile(0.5))
    numbers["meanADE"] = float(mean_distance.mean())
    numbers["meanFDE"] = float(end_distance.mean())
    if thresholds.touch is not None:
        numbers["collisions"] = float(metrics.collisions(predicted, scene, thresholds.touch)[1].double().mean())
    if thresholds.field is not None:
        numbers["off the field"] = float(metrics.outside(predicted, (0.0, 0.0, *thresholds.field)).mean())
    if len(predicted) > 1:
        share = torch.full_like(mean_distance, 1 / len(predicted)) if probabilities is None else probabilities.double()
        numbers["brier-minFDE"] = float(metrics.brier_fde(predicted, truth, share).mean())
        numbers["energy score"] = float(metrics.energy_score(predicted, truth).mean())
        numbers["diversity (APD)"] = float(metrics.diversity(predicted).apd.mean())
    for steps in horizons:
        numbers[f"minADE@{steps}"] = float(metrics.min_ade(predicted, truth, horizon=steps).mean())
        numbers[f"minFDE@{steps}"] = float(metrics.min_fde(predicted, truth, horizon=steps).mean())
    intervals = {}
    for metric, values in each.items():
        found = metrics.bootstrap(values, _scene_of(values, scene), seed=seed)
        intervals[metric] = (found.low, found.high)
    num_scenes = len(scene.unique())
    return Scores(name, len(predicted), numbers, intervals, 1000 * seconds / max(1, num_scenes)), each


def few_scores(predicted: Tensor, truth: Tensor, scene: Tensor) -> dict[str, float]:
    """minADE, minFDE, minJADE and minJFDE of forecasts; arguments as in :func:`scores`."""
    predicted, truth = predicted.double(), truth.double()
    joint_ade, joint_fde = metrics.joint_errors(predicted, truth, scene)
    return {
        "minADE": float(metrics.min_ade(predicted, truth).mean()),
        "minFDE": float(metrics.min_fde(predicted, truth).mean()),
        "minJADE": float(joint_ade.mean()),
        "minJFDE": float(joint_fde.mean()),
    }


def _scene_of(values: Tensor, scene: Tensor) -> Tensor:
    """The scene of every value: of one per agent ``scene`` itself, of one per scene their numbers."""
    names = scene.unique()
    return names if len(values) == len(names) else scene


def compared(baseline: str, values: Tensor, others: Tensor, scene: Tensor, seed: int = 0) -> Comparison:
    """One forecaster less another by paired bootstrap: in each resample both are measured on the same scenes.

    Args:
        baseline: name of the other one.
        values: a metric of the one, per agent [M] or scene [G].
        others: of the other one.
        scene: number of each agent's scene, int64 [M].
        seed: of the bootstrap.
    """
    found = metrics.bootstrap(values - others, _scene_of(values, scene), seed=seed)
    return Comparison(baseline, found.mean, found.low, found.high)


def reliability_of(predicted: Tensor, truth: Tensor, probabilities: Tensor) -> Reliability:
    """How well probabilities [K, M], none of them 0, say which forecast [K, M, T, 2] is nearest to the truth."""
    predicted, truth, share = predicted.double(), truth.double(), probabilities.double()
    found = metrics.reliability(predicted, truth, share, NUM_BINS)
    bins = zip(found.predicted.tolist(), found.observed.tolist(), found.num_forecasts.int().tolist(), strict=True)
    return Reliability(found.error, -log_likelihood(share, nearest_forecast(predicted, truth)), list(bins))


def evaluate(
    forecaster: Forecaster,
    scenes: Scenes,
    *,
    train: Scenes | None = None,
    num_forecasts: int = 20,
    counts: Sequence[int] = (),
    sampling: SamplingConfig | None = None,
    horizons: Sequence[int] | None = None,
    miss: float | None = None,
    batch_size: int = 32,
    say: Callable[[str], None] | None = None,
) -> Evaluation:
    """The model, as plain samples and as ``sampling`` says, beside every baseline.

    Args:
        forecaster: the trained model.
        scenes: what to forecast.
        train: what the baselines learn from; without it they are left out.
        num_forecasts: K.
        counts: smaller K at which errors are told too; clusters are formed anew out of the same samples.
        sampling: of the second row of the model; clustered samples by default, plain ones leave it out.
        horizons: numbers of steps at which errors are told; None takes :func:`default_horizons`.
        miss: distance of a miss in the unit of the scenes; None takes 2 m, and no miss rate for pixels.
        batch_size: scenes at a time, fewer where they are full.
        say: called with the name of each row before it is computed.

    Raises:
        UserError: scenes that do not fit the model, or a count or horizon out of range.
    """
    say = say or (lambda name: None)
    horizons = default_horizons(scenes) if horizons is None else tuple(sorted(set(horizons)))
    counts = tuple(sorted(set(counts)))
    if not all(1 <= steps <= scenes.num_predicted for steps in horizons):
        raise UserError(f"horizons must be from 1 to {scenes.num_predicted} steps, got {', '.join(map(str, horizons))}")
    if not all(1 <= count <= num_forecasts for count in counts):
        raise UserError(f"counts must be from 1 to {num_forecasts}, got {', '.join(map(str, counts))}")
    thresholds = thresholds_for(scenes, miss)
    asked = sampling or SamplingConfig()
    past, truth = target_tracks(scenes)
    scene = torch.arange(len(scenes))[:, None].expand(-1, scenes.num_agents)[scenes.target_mask]
    rows: list[Scores] = []
    each: dict[str, dict[str, Tensor]] = {}

    def add(name: str, found: Drawn, probabilities: Tensor | None = None) -> None:
        row, each[name] = scores(
            name,
            found.predicted,
            truth,
            scene,
            thresholds=thresholds,
            probabilities=probabilities,
            seconds=found.seconds,
            horizons=horizons,
            seed=asked.seed,
        )
        fewer = {count: few_scores(predicted, truth, scene) for count, predicted in found.fewer.items()}
        rows.append(replace(row, by_count=fewer))

    plain = asked.model_copy(update={"select": "samples", "num_samples": None})
    ways = {f"model, {num_forecasts} samples": plain, f"model, {asked.select}": asked}
    if asked.select == "samples":
        del ways["model, samples"]
    forecaster.forecast_scenes(scenes.subset([0]), num_forecasts, asked)  # the first call is slower than the others
    for name, how in ways.items():
        say(name)
        found = draw_targets(forecaster, scenes, num_forecasts, how, batch_size, counts)
        add(name, found, forecaster.calibrated(found.masses, how))
    if train is not None:
        for baseline in all_baselines(scenes.num_predicted):
            say(baseline.name)
            baseline.fit(train)
            add(baseline.name, _forecasts_of(baseline, past, num_forecasts, counts, asked.seed))
        others = rows[len(ways) :]
        for index, name in enumerate(ways):
            best = _against_the_best(each[name], {row.name: each[row.name] for row in others}, scene, asked.seed)
            rows[index] = replace(rows[index], best_baseline=best)
    reliability: dict[str, Reliability] = {}
    coverage: dict[str, list[float]] = {}
    if asked.select != "samples" and num_forecasts > 1:
        num_samples = num_drawn(num_forecasts, asked)
        plain_masses = tempered(found.masses.double(), 1.0, num_samples)
        reliability["masses"] = reliability_of(found.predicted, truth, plain_masses)
        if forecaster.calibrates(num_forecasts, asked):
            better = forecaster.calibrated(found.masses.double(), asked)
            reliability["tempered"] = reliability_of(found.predicted, truth, better)
        for name, radii in forecaster.radii(num_forecasts, asked).items():
            within = inside(found.predicted.double(), truth, torch.tensor(radii, dtype=torch.float64))
            coverage[f"{int(name.removeprefix('radius_')) / 100:g}"] = within.double().mean(dim=0).tolist()
    settings = {
        "dataset": scenes.name,
        "unit": scenes.unit,
        "hz": scenes.hz,
        "num_observed": scenes.num_observed,
        "num_predicted": scenes.num_predicted,
        "num_scenes": len(scenes),
        "num_agents": len(truth),
        "num_forecasts": num_forecasts,
        "num_samples": num_drawn(num_forecasts, asked),
        **asked.model_dump(mode="json", exclude={"num_samples"}),
        "batch_size": batch_size,
        **asdict(thresholds),
        "machine": machine(forecaster.device),
        "versions": versions(),
    }
    notes = _notes(forecaster, scenes, thresholds, truth, num_forecasts, asked)
    return Evaluation(rows, settings, horizons, reliability, coverage, notes)


class Drawn(NamedTuple):
    """Forecasts of the agents that metrics count, scene by scene.

    Attributes:
        predicted: [K, M, T, 2].
        masses: of the clusters, or equal, [K, M].
        fewer: forecasts of smaller K, [K', M, T, 2].
        seconds: that ``predicted`` took.
    """

    predicted: Tensor
    masses: Tensor
    fewer: dict[int, Tensor]
    seconds: float


def draw_targets(
    forecaster: Forecaster,
    scenes: Scenes,
    num_forecasts: int,
    sampling: SamplingConfig,
    batch_size: int,
    counts: Sequence[int] = (),
) -> Drawn:
    """Forecasts of the agents that metrics count, before any calibration; fewer ones come from the same samples.

    Scenes of about as many agents are forecast together, so that there is little padding.
    """
    generator = torch.Generator(forecaster.device).manual_seed(sampling.seed)
    num_samples = num_drawn(num_forecasts, sampling)
    how: dict[str, Any] = {"how": sampling.select, "joint": sampling.joint, "smoothing": sampling.smoothing}
    fewer: dict[int, list[Tensor]] = {count: [] for count in counts}
    number = torch.zeros(scenes.target_mask.shape, dtype=torch.int64)
    number[scenes.target_mask] = torch.arange(scenes.num_targets)
    parts, masses, numbers, seconds = [], [], [], 0.0
    for rows in alike(scenes, batch_size):
        batch = scenes.subset(rows)
        numbers.append(number[rows][scenes.target_mask[rows]])
        started = time.perf_counter()
        samples, present = forecaster.draw(batch, num_samples, sampling, generator)
        chosen = select(samples, num_forecasts, agent_mask=present, generator=generator, **how)
        mask = batch.target_mask[:, : present.shape[1]]
        parts.append(chosen.trajectories.cpu()[:, mask])
        masses.append(chosen.probabilities.cpu()[:, mask])
        seconds += time.perf_counter() - started
        for count, found in fewer.items():
            # A generator of its own: that fewer forecasts are asked for too changes none of the others.
            own = torch.Generator(forecaster.device).manual_seed(sampling.seed)
            again = select(samples, count, agent_mask=present, generator=own, **how)
            found.append(again.trajectories.cpu()[:, mask])
    back = torch.cat(numbers).argsort()
    smaller = {count: torch.cat(found, dim=1)[:, back] for count, found in fewer.items()}
    return Drawn(torch.cat(parts, dim=1)[:, back], torch.cat(masses, dim=1)[:, back], smaller, seconds)


def alike(scenes: Scenes, batch_size: int) -> Iterator[Tensor]:
    """Rows of scenes with about as many targets, at most ``batch_size`` of them and ``MAX_AGENTS`` agents, int64."""
    order = scenes.target_mask.sum(dim=1).argsort(stable=True)
    first = widest = 0
    for index, agents in enumerate(scenes.agent_mask.sum(dim=1)[order].tolist()):
        widest, count = max(widest, agents), index - first
        if count and (count == batch_size or (count + 1) * widest > MAX_AGENTS):
            yield order[first:index]
            first, widest = index, agents
    yield order[first:]


def _forecasts_of(baseline: Baseline, past: Tensor, num_forecasts: int, counts: Sequence[int], seed: int) -> Drawn:
    """What a fitted baseline forecasts; deterministic ones are the same for every K."""

    def forecast(count: int) -> Tensor:
        return baseline.forecast(past, count, torch.Generator().manual_seed(seed))

    started = time.perf_counter()
    predicted = forecast(num_forecasts)
    seconds = time.perf_counter() - started
    masses = torch.full(predicted.shape[:2], 1 / len(predicted))
    fewer = {count: predicted if baseline.deterministic else forecast(count) for count in counts}
    return Drawn(predicted, masses, fewer, seconds)


def _against_the_best(
    own: dict[str, Tensor], others: dict[str, dict[str, Tensor]], scene: Tensor, seed: int
) -> dict[str, Comparison]:
    """A model's metrics less those of the baseline with the smallest mean, metric by metric."""
    found = {}
    for metric, values in own.items():
        means = {name: float(each[metric].mean()) for name, each in others.items() if metric in each}
        if means:
            best = min(means, key=means.__getitem__)
            found[metric] = compared(best, values, others[best][metric], scene, seed)
    return found


def _notes(
    forecaster: Forecaster,
    scenes: Scenes,
    thresholds: Thresholds,
    truth: Tensor,
    num_forecasts: int,
    sampling: SamplingConfig,
) -> tuple[str, ...]:
    unit, notes = scenes.unit, []
    if thresholds.miss is not None:
        notes.append(f"A miss: no forecast ends within {thresholds.miss:.3g} {unit} of the truth.")
    else:
        notes.append(f"No miss rate: 2 m have no meaning in {unit}; name a distance in {unit} to have one.")
    if thresholds.touch is not None:
        notes.append(f"A collision: two agents of a forecast come closer than {thresholds.touch:.3g} {unit}.")
    else:
        notes.append(f"No collisions: {TOUCH_METRES} m have no meaning in {unit}.")
    if thresholds.field is not None:
        length, width = thresholds.field
        share = float(metrics.outside(truth[None], (0.0, 0.0, length, width)).mean())
        notes.append(f"The field is {length:.4g} x {width:.4g} {unit}; {share:.1%} of the true futures leave it.")
    if sampling.select != "samples" and not forecaster.calibrates(num_forecasts, sampling):
        why = (
            "the run has no calibration" if forecaster.calibration is None else "the calibration is for other forecasts"
        )
        notes.append(f"Probabilities are plain masses: {why}.")
    return tuple(notes)
