"""A forecaster beside simple baselines on the same scenes: every metric, with confidence intervals over scenes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neurocl.trajectory import metrics
from neurocl.trajectory.baselines import all_baselines, target_tracks
from neurocl.trajectory.forecaster import Forecaster, SamplingConfig
from neurocl.trajectory.scenes import Scenes

MISS = 2.0  # units of the data; a forecast that ends farther away has missed
TOUCH = 0.1


@dataclass(frozen=True)
class Scores:
    """One forecaster on one set of scenes, in the units of the data.

    Attributes:
        name: of the row.
        num_forecasts: K; 1 for deterministic ones.
        numbers: mean of every metric.
        intervals: 95 % interval over scenes of minADE and minFDE.
        milliseconds: per scene.
    """

    name: str
    num_forecasts: int
    numbers: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    milliseconds: float


def scores(
    name: str,
    predicted: Tensor,
    truth: Tensor,
    scene: Tensor,
    *,
    probabilities: Tensor | None = None,
    seconds: float = 0.0,
    horizons: Sequence[int] = (),
    seed: int = 0,
) -> Scores:
    """Metrics of forecasts.

    Args:
        name: of the row.
        predicted: [K, N, T, 2].
        truth: [N, T, 2].
        scene: number of each agent's scene, int64 [N].
        probabilities: of the forecasts, [K, N]; None means equal ones.
        seconds: that the forecasts took.
        horizons: further numbers of steps at which minADE and minFDE are told.
        seed: of the bootstrap.
    """
    predicted, truth = predicted.double(), truth.double()
    ade, fde = metrics.min_ade(predicted, truth), metrics.min_fde(predicted, truth)
    joint_ade, joint_fde = metrics.joint_errors(predicted, truth, scene)
    numbers = {
        "minADE": float(ade.mean()),
        "minFDE": float(fde.mean()),
        "minJADE": float(joint_ade.mean()),
        "minJFDE": float(joint_fde.mean()),
        "miss rate": float(metrics.misses(predicted, truth, MISS).mean()),
        "collisions": float(metrics.collisions(predicted, scene, TOUCH)[1].double().mean()),
    }
    if len(predicted) > 1:
        share = probabilities.double() if probabilities is not None else None
        equal = torch.full(predicted.shape[:2], 1 / len(predicted), dtype=torch.float64)
        numbers["brier-minFDE"] = float(metrics.brier_fde(predicted, truth, equal if share is None else share).mean())
        numbers["energy score"] = float(metrics.energy_score(predicted, truth).mean())
        numbers["diversity (APD)"] = float(metrics.diversity(predicted).apd.mean())
    if len(predicted) >= 3:
        numbers["NLL"] = float(metrics.kde_nll(predicted, truth, probabilities).mean())
    for steps in horizons:
        numbers[f"minADE@{steps}"] = float(metrics.min_ade(predicted, truth, horizon=steps).mean())
        numbers[f"minFDE@{steps}"] = float(metrics.min_fde(predicted, truth, horizon=steps).mean())
    intervals = {
        "minADE": _interval(ade, scene, seed),
        "minFDE": _interval(fde, scene, seed),
    }
    num_scenes = len(scene.unique())
    return Scores(name, len(predicted), numbers, intervals, 1000 * seconds / max(1, num_scenes))


def _interval(values: Tensor, scene: Tensor, seed: int) -> tuple[float, float]:
    found = metrics.bootstrap(values, scene, seed=seed)
    return found.low, found.high


def evaluate(
    forecaster: Forecaster,
    scenes: Scenes,
    *,
    train: Scenes | None = None,
    num_forecasts: int = 20,
    sampling: SamplingConfig | None = None,
    horizons: Sequence[int] = (),
    batch_size: int = 32,
    say: Callable[[str], None] | None = None,
) -> list[Scores]:
    """Rows for the model, twice (plain samples and as ``sampling`` says), and for every baseline.

    Args:
        forecaster: the trained model.
        scenes: what to forecast.
        train: what the baselines learn from; without it they are left out.
        num_forecasts: K.
        sampling: of the second row of the model; clustered samples by default.
        horizons: see :func:`scores`.
        batch_size: scenes at a time.
        say: called with the name of each row before it is computed.
    """
    say = say or (lambda name: None)
    past, truth = target_tracks(scenes)
    number = torch.arange(len(scenes))[:, None].expand(-1, scenes.num_agents)[scenes.target_mask]
    found = []
    clustered = sampling or SamplingConfig()
    plain = clustered.model_copy(update={"select": "samples", "num_samples": None})
    for name, how in ((f"model, {num_forecasts} samples", plain), (f"model, {clustered.select}", clustered)):
        say(name)
        started = time.perf_counter()
        predicted, share = forecast_targets(forecaster, scenes, num_forecasts, how, batch_size)
        seconds = time.perf_counter() - started
        found.append(scores(name, predicted, truth, number, probabilities=share, seconds=seconds, horizons=horizons))
    if train is not None:
        for baseline in all_baselines(scenes.num_predicted):
            say(baseline.name)
            baseline.fit(train)
            started = time.perf_counter()
            predicted = baseline.forecast(past, num_forecasts, torch.Generator().manual_seed(clustered.seed))
            seconds = time.perf_counter() - started
            found.append(scores(baseline.name, predicted, truth, number, seconds=seconds, horizons=horizons))
    return found


def forecast_targets(
    forecaster: Forecaster, scenes: Scenes, num_forecasts: int, sampling: SamplingConfig, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Forecasts [K, N, T_p, 2] and probabilities [K, N] of the agents that metrics count, scene by scene."""
    generator = torch.Generator(forecaster.device).manual_seed(sampling.seed)
    parts, shares = [], []
    for batch in scenes.batches(batch_size):
        chosen = forecaster.forecast_scenes(batch, num_forecasts, sampling, generator=generator)
        parts.append(chosen.trajectories.cpu()[:, batch.target_mask])
        shares.append(chosen.probabilities.cpu()[:, batch.target_mask])
    return torch.cat(parts, dim=1), torch.cat(shares, dim=1)
