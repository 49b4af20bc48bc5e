"""What a forecaster's probabilities are worth: a temperature for cluster masses, and radii that hold the truth.

``K`` forecasts out of ``N`` samples of each of ``M`` agents, ``T`` predicted steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from neurocl.config import Config, validate
from neurocl.errors import UserError
from neurocl.runs import read_json, write_atomically
from neurocl.trajectory import metrics

CALIBRATION_SCHEMA = 1
CALIBRATION_FILE = "calibration.json"
# Below, probabilities of clusters without a member would underflow; above, they are all equal in any case.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.2, 100.0
HALVINGS = 60

Radius = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Radii = Annotated[tuple[Radius, ...], Field(min_length=1)]


class Calibration(Config):
    """What validation scenes said about forecasts that were clustered agent by agent.

    Attributes:
        temperature: tau; probabilities are proportional to the masses of the clusters to the power of 1 / tau.
        radius_50, radius_90: per predicted step, in ``unit``: the truth is that close to the nearest of the K forecasts
            with the probability in the name, for agents of scenes like those it was fitted on. None where there were
            too few agents to say so.
        num_forecasts: K.
        num_samples: N.
        steps, sampler: how samples were drawn.
        select: what the forecasts were.
        smoothing: of the samples before they were clustered.
        num_agents: M.
        unit: of the radii.
    """

    temperature: Annotated[float, Field(ge=LOWEST_TEMPERATURE, le=HIGHEST_TEMPERATURE, allow_inf_nan=False)]
    radius_50: Radii | None
    radius_90: Radii | None
    num_forecasts: Annotated[int, Field(ge=1)]
    num_samples: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]
    sampler: Literal["posterior", "unmask"]
    select: Literal["centroids", "medoids"]
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    num_agents: Annotated[int, Field(ge=0)]
    unit: str

    def tempers(self, num_forecasts: int) -> bool:
        """Whether K is near enough to the one it was fitted for: from half of it to twice as many."""
        return self.num_forecasts <= 2 * num_forecasts and num_forecasts <= 2 * self.num_forecasts

    def radii(self) -> dict[str, list[float]]:
        """The radii that there are, by their names."""
        found = {"radius_50": self.radius_50, "radius_90": self.radius_90}
        return {name: list(values) for name, values in found.items() if values is not None}

    def write(self, folder: Path) -> None:
        """Put ``calibration.json`` into a folder, whole or not at all.

        Raises:
            RunError: the disk is full or the folder cannot be written.
        """
        document = {"schema": CALIBRATION_SCHEMA, **self.model_dump(mode="json")}
        write_atomically(folder / CALIBRATION_FILE, json.dumps(document, indent=1, allow_nan=False))

    @classmethod
    def read(cls, folder: Path, *, num_predicted: int, unit: str) -> Calibration | None:
        """Back from :meth:`write`; None if the folder has none.

        Args:
            folder: of the run.
            num_predicted: T of the model it must be for.
            unit: of that model.

        Raises:
            UserError: damaged, of another version, or for another model.
        """
        path = folder / CALIBRATION_FILE
        if not path.exists():
            return None
        document = read_json(path)
        if not isinstance(document, dict) or document.pop("schema", None) != CALIBRATION_SCHEMA:
            raise UserError(f"{path}: not a calibration that this version reads")
        found = validate(cls, document, source=str(path))
        for name, values in found.radii().items():
            if len(values) != num_predicted:
                raise UserError(f"{path}: {name} has {len(values)} steps, the model forecasts {num_predicted}")
        if found.unit != unit:
            raise UserError(f"{path}: its radii are in {found.unit}, the model was trained in {unit}")
        return found


def tempered(masses: Tensor, temperature: float, num_samples: int) -> Tensor:
    """Probabilities out of masses: m^(1 / tau), scaled to add up to 1 over K; a cluster without members has half one.

    Args:
        masses: share of the samples in each cluster, [K, ...]; over K they add up to 1.
        temperature: tau; 1 leaves masses of clusters with members as they are, if all have some.
        num_samples: N.

    Reference: Guo et al., "On calibration of modern neural networks", ICML 2017, arXiv 1706.04599.
    """
    return (masses.clamp(min=0.5 / num_samples).log() / temperature).softmax(dim=0)


def nearest_forecast(pred: Tensor, truth: Tensor) -> Tensor:
    """Which of the forecasts [K, M, T, 2] has the smallest mean distance to the truth [M, T, 2]: int64 [M]."""
    return metrics.errors(pred, truth)[0].argmin(dim=0)


def log_likelihood(probabilities: Tensor, nearest: Tensor) -> float:
    """Mean log probability that [K, M] gave to the forecasts ``nearest``, int64 [M]."""
    return float(probabilities.gather(0, nearest[None]).log().mean())


def fit_temperature(masses: Tensor, nearest: Tensor, num_samples: int) -> float:
    """The temperature under which ``nearest`` is likeliest.

    The log-likelihood is concave in 1 / tau, so its slope is zero in one place, which is halved in on.

    Args:
        masses: [K, M].
        nearest: which forecast came true, int64 [M].
        num_samples: N.

    Returns: tau, between 0.2 and 100; 1 if all masses are equal, or if there are none.
    """
    logs = masses.double().clamp(min=0.5 / num_samples).log()
    if not logs.numel() or bool((logs.amax(dim=0) - logs.amin(dim=0)).max() < 1e-9):
        return 1.0
    came_true = logs.gather(0, nearest[None]).mean()
    low, high = 1 / HIGHEST_TEMPERATURE, 1 / LOWEST_TEMPERATURE
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        expected = ((middle * logs).softmax(dim=0) * logs).sum(dim=0).mean()
        if expected < came_true:
            low = middle
        else:
            high = middle
    return min(max(2 / (low + high), LOWEST_TEMPERATURE), HIGHEST_TEMPERATURE)


def inside(pred: Tensor, truth: Tensor, radii: Tensor) -> Tensor:
    """Whether the truth [M, T, 2] is within the radius [T] of a forecast [K, M, T, 2] at each step: bool [M, T]."""
    nearest: Tensor = torch.linalg.vector_norm(pred - truth, dim=-1).min(dim=0).values
    return nearest <= radii


def fit_calibration(
    pred: Tensor,
    truth: Tensor,
    masses: Tensor,
    *,
    num_samples: int,
    steps: int,
    sampler: Literal["posterior", "unmask"],
    select: Literal["centroids", "medoids"],
    smoothing: float = 0.0,
    unit: str,
) -> Calibration:
    """Fit temperature and radii on agents whose future is known and was not trained on.

    The radii hold for an agent drawn as these were. Agents of one scene are alike, and validation scenes have chosen
    the weights too, so expect their probability to be off by a few per cent on other recordings.

    Args:
        pred: forecasts, [K, M, T, 2].
        truth: [M, T, 2].
        masses: of the clusters, [K, M].
        num_samples: N.
        steps, sampler: how samples were drawn, for the record.
        select: what the forecasts are, likewise.
        smoothing: of the samples before they were clustered, likewise.
        unit: of the positions, likewise.

    Reference: Vovk et al., "Algorithmic learning in a random world", 2005 (split conformal prediction).
    """
    pred, truth = pred.double(), truth.double()
    temperature, radii = 1.0, dict[str, list[float] | None](radius_50=None, radius_90=None)
    if len(truth):
        temperature = fit_temperature(masses, nearest_forecast(pred, truth), num_samples)
        for name, level in (("radius_50", 0.5), ("radius_90", 0.9)):
            found = metrics.conformal_radii(pred, truth, level)
            radii[name] = found.tolist() if bool(found.isfinite().all()) else None
    return Calibration.model_validate(
        {
            "temperature": temperature,
            **radii,
            "num_forecasts": len(pred),
            "num_samples": num_samples,
            "steps": steps,
            "sampler": sampler,
            "select": select,
            "smoothing": smoothing,
            "num_agents": len(truth),
            "unit": unit,
        }
    )
