"""Simple forecasters that a learned one has to beat, computed on the same scenes.

``S`` scenes, ``A`` agents, ``T_o`` and ``T_p`` observed and predicted steps, ``K`` forecasts, ``M`` training agents.
Everything but the fits works on whole batches of agents.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Protocol

import torch

from neurocl.errors import UserError
from neurocl.trajectory.scenes import Scenes
from neurocl.trajectory.selection import kmeans

MAX_NEIGHBOURS_SEARCHED = 40_000
NUM_NEIGHBOURS = 200
SPEED_GROUPS = 4


class Baseline(Protocol):
    """Fit on training scenes, then forecast agents one by one."""

    name: str
    deterministic: bool

    @abstractmethod
    def fit(self, scenes: Scenes) -> None:
        """Look at the training scenes."""

    @abstractmethod
    def forecast(self, past: torch.Tensor, num_forecasts: int, generator: torch.Generator) -> torch.Tensor:
        """Past positions [M, T_o, 2] of complete agents -> futures [K, M, T_p, 2]; deterministic ones give K = 1."""


def target_tracks(scenes: Scenes) -> tuple[torch.Tensor, torch.Tensor]:
    """Past [M, T_o, 2] and future [M, T_p, 2] of all agents that metrics count, in float64; gaps in the past filled."""
    chosen = scenes.target_mask
    past, seen = scenes.past[chosen].double(), scenes.past_mask[chosen]
    return past if bool(seen.all()) else filled(past, seen), scenes.future[chosen].double()


def filled(past: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Positions [M, T, 2] with those that were not seen, bool [M, T], on the line between the nearest that were.

    Before the first and after the last one seen it stands still.
    """
    steps = torch.arange(past.shape[1])
    before = torch.where(seen, steps, -1).cummax(dim=1).values
    after = torch.where(seen, steps, len(steps)).flip(1).cummin(dim=1).values.flip(1)
    left = torch.where(before < 0, after, before).clamp(max=len(steps) - 1)
    right = torch.where(after == len(steps), before, after).clamp(min=0)
    share = ((steps - left).double() / (right - left).clamp(min=1))[..., None]
    start, end = (past.gather(1, row[..., None].expand(-1, -1, 2)) for row in (left, right))
    return start + share * (end - start)


class Stationary:
    """Everybody stays where they are."""

    name, deterministic = "stationary", True

    def __init__(self, num_predicted: int) -> None:
        self.num_predicted = num_predicted

    def fit(self, scenes: Scenes) -> None:
        """Nothing to learn."""

    def forecast(self, past: torch.Tensor, num_forecasts: int, generator: torch.Generator) -> torch.Tensor:
        return past[None, :, -1:].expand(1, -1, self.num_predicted, -1).clone()


class ConstantVelocity:
    """The last step, repeated.

    Args:
        num_predicted: T_p.
        heading_noise: standard deviation, in degrees, of a random turn of the whole future; 0 for one forecast.
        velocity_noise: add a Gaussian fitted to the training error of the velocity, instead of turning.

    Reference: Schoeller et al., "What the constant velocity model can teach us about pedestrian motion prediction",
    IEEE RA-L 2020, arXiv 1903.07933.
    """

    def __init__(self, num_predicted: int, *, heading_noise: float = 0.0, velocity_noise: bool = False) -> None:
        self.num_predicted = num_predicted
        self.heading_noise = heading_noise
        self.velocity_noise = velocity_noise
        self.deterministic = heading_noise == 0 and not velocity_noise
        suffix = (
            f" + {heading_noise:g} degrees" if heading_noise else " + fitted velocity noise" if velocity_noise else ""
        )
        self.name = "constant velocity" + suffix
        self._deviation = torch.zeros(2, 2, dtype=torch.float64)

    def fit(self, scenes: Scenes) -> None:
        """Covariance of the mean future velocity around the last one, in the heading frame; for ``velocity_noise``."""
        if not self.velocity_noise:
            return
        past, future = target_tracks(scenes)
        velocity = past[:, -1] - past[:, -2]
        error = (future[:, -1] - past[:, -1]) / self.num_predicted - velocity
        turned = torch.einsum("mij,mj->mi", heading_frame(past), error)
        covariance = turned.T @ turned / max(1, len(turned))
        self._deviation = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(2, dtype=covariance.dtype))

    def forecast(self, past: torch.Tensor, num_forecasts: int, generator: torch.Generator) -> torch.Tensor:
        past = past.double()
        velocity = (past[:, -1] - past[:, -2])[None]
        if self.heading_noise:
            angle = torch.randn(num_forecasts, len(past), generator=generator, dtype=torch.float64)
            velocity = rotated(velocity, angle * math.radians(self.heading_noise))
        elif self.velocity_noise:
            noise = torch.randn(num_forecasts, len(past), 2, generator=generator, dtype=torch.float64)
            frame = heading_frame(past)
            velocity = velocity + torch.einsum("mji,kmj->kmi", frame, noise @ self._deviation.T)
        steps = torch.arange(1, self.num_predicted + 1, dtype=torch.float64)
        futures: torch.Tensor = past[None, :, -1:] + velocity[:, :, None] * steps[:, None]
        return futures


class LeastSquaresLine:
    """The straight line at constant speed that fits the observed steps best."""

    name, deterministic = "least-squares line", True

    def __init__(self, num_predicted: int) -> None:
        self.num_predicted = num_predicted

    def fit(self, scenes: Scenes) -> None:
        """Nothing to learn."""

    def forecast(self, past: torch.Tensor, num_forecasts: int, generator: torch.Generator) -> torch.Tensor:
        past = past.double()
        observed = past.shape[1]
        time = torch.arange(observed, dtype=torch.float64)
        design = torch.stack([torch.ones_like(time), time], dim=1)
        coefficients = torch.linalg.lstsq(design, past.transpose(0, 1).reshape(observed, -1)).solution
        ahead = torch.arange(observed, observed + self.num_predicted, dtype=torch.float64)
        line = torch.stack([torch.ones_like(ahead), ahead], dim=1) @ coefficients
        futures: torch.Tensor = line.view(self.num_predicted, len(past), 2).transpose(0, 1)[None]
        return futures


class Ridge:
    """Ridge regression of the future on the past in the heading frame, alone or with anchors.

    With anchors, the residuals of the training agents are clustered, apart for each quartile of past speed, and the K
    centres are added to the regression: K futures without any neural network.

    Args:
        num_predicted: T_p.
        anchors: add the clustered residuals.
        strength: of the ridge, relative to the mean of the diagonal.
        seed: of the clustering.
    """

    def __init__(self, num_predicted: int, *, anchors: bool = False, strength: float = 1e-3, seed: int = 0) -> None:
        self.num_predicted = num_predicted
        self.anchors = anchors
        self.strength = strength
        self.seed = seed
        self.name = "ridge + anchors" if anchors else "ridge"
        self.deterministic = not anchors
        self._weights: torch.Tensor | None = None
        self._bounds = torch.zeros(SPEED_GROUPS - 1, dtype=torch.float64)
        self._residuals: list[torch.Tensor] = []
        self._centres: dict[int, torch.Tensor] = {}

    def fit(self, scenes: Scenes) -> None:
        past, future = target_tracks(scenes)
        frame, features = heading_frame(past), self._features(past)
        target = torch.einsum("mij,mtj->mti", frame, future - past[:, -1:]).flatten(1)
        gram = features.T @ features
        ridge = self.strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        self._weights = torch.linalg.solve(gram + ridge, features.T @ target)
        if self.anchors:
            residual = target - features @ self._weights
            speed = _speed(past)
            shares = torch.arange(1, SPEED_GROUPS, dtype=torch.float64) / SPEED_GROUPS
            self._bounds = torch.quantile(speed[:: max(1, len(speed) // 1_000_000)], shares)
            group = torch.bucketize(speed, self._bounds)
            self._residuals = [residual[group == index] for index in range(SPEED_GROUPS)]
            self._centres = {}

    def forecast(self, past: torch.Tensor, num_forecasts: int, generator: torch.Generator) -> torch.Tensor:
        if self._weights is None:
            raise UserError("ridge must be fitted before it forecasts")
        past = past.double()
        predicted = (self._features(past) @ self._weights)[None]
        if self.anchors:
            centres = self._centres_of(num_forecasts)
            group = torch.bucketize(_speed(past), self._bounds)
            predicted = predicted + centres[group].transpose(0, 1)
        moves = predicted.view(len(predicted), len(past), self.num_predicted, 2)
        futures: torch.Tensor = past[None, :, -1:] + torch.einsum("mji,kmtj->kmti", heading_frame(past), moves)
        return futures

    def _features(self, past: torch.Tensor) -> torch.Tensor:
        """Past positions in the heading frame, without the last one, which is the origin, and a constant."""
        turned = torch.einsum("mij,mtj->mti", heading_frame(past), past - past[:, -1:])[:, :-1]
        return torch.cat([turned.flatten(1), torch.ones(len(past), 1, dtype=past.dtype)], dim=1)

    def _centres_of(self, count: int) -> torch.Tensor:
        """[groups, K, T_p * 2], clustered once per K."""
        if count not in self._centres:
            generator = torch.Generator().manual_seed(self.seed)
            found = []
            for residual in self._residuals:
                rows = torch.randperm(len(residual), generator=generator)[:20_000]
                if len(rows) < count:
                    raise UserError(f"{count} forecasts need at least {count} training agents per speed group")
                found.append(kmeans(residual[rows][None], count, generator=generator).centres[0])
            self._centres[count] = torch.stack(found)
        return self._centres[count]


class NearestNeighbours:
    """The futures of the training pasts that look most alike, turned into place and clustered to K.

    Args:
        num_predicted: T_p.
        seed: of the choice of training agents and of the clustering.
    """

    name, deterministic = "nearest neighbours + k-means", False

    def __init__(self, num_predicted: int, *, seed: int = 0) -> None:
        self.num_predicted = num_predicted
        self.seed = seed
        self._pasts = torch.empty(0)
        self._futures = torch.empty(0)

    def fit(self, scenes: Scenes) -> None:
        past, future = target_tracks(scenes)
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randperm(len(past), generator=generator)[:MAX_NEIGHBOURS_SEARCHED]
        past, future = past[rows], future[rows]
        frame = heading_frame(past)
        self._pasts = torch.einsum("mij,mtj->mti", frame, past - past[:, -1:]).flatten(1)
        self._futures = torch.einsum("mij,mtj->mti", frame, future - past[:, -1:]).flatten(1)

    def forecast(self, past: torch.Tensor, num_forecasts: int, generator: torch.Generator) -> torch.Tensor:
        if not len(self._pasts):
            raise UserError("nearest neighbours must be fitted before they forecast")
        past = past.double()
        frame = heading_frame(past)
        query = torch.einsum("mij,mtj->mti", frame, past - past[:, -1:]).flatten(1)
        count = min(NUM_NEIGHBOURS, len(self._pasts))
        found = []
        for rows in torch.arange(len(past)).split(512):
            nearest = torch.cdist(query[rows], self._pasts).topk(count, largest=False).indices
            clusters = kmeans(self._futures[nearest], min(num_forecasts, count), generator=generator)
            found.append(clusters.centres)
        moves = torch.cat(found).view(len(past), -1, self.num_predicted, 2)
        return past[None, :, -1:] + torch.einsum("mji,mktj->kmti", frame, moves)


def heading_frame(past: torch.Tensor) -> torch.Tensor:
    """Rotations [M, 2, 2] that turn each agent's way over the observed steps to the positive x axis.

    Who did not move keeps the axes of the recording.
    """
    way = past[:, -1] - past[:, -2]
    overall = past[:, -1] - past[:, 0]
    way = torch.where(way.norm(dim=1, keepdim=True) > 1e-9, way, overall)
    length = way.norm(dim=1, keepdim=True)
    axis = torch.tensor([1.0, 0.0], dtype=past.dtype).expand_as(way)
    unit = torch.where(length > 1e-9, way / length.clamp_min(1e-12), axis)
    return torch.stack([unit, torch.stack([-unit[:, 1], unit[:, 0]], dim=1)], dim=1)


def rotated(vectors: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """``vectors`` [..., 2] turned counter-clockwise by ``angle`` [...] in radians."""
    cosine, sine = angle.cos(), angle.sin()
    x, y = vectors[..., 0], vectors[..., 1]
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y], dim=-1)


def _speed(past: torch.Tensor) -> torch.Tensor:
    speed: torch.Tensor = (past[:, 1:] - past[:, :-1]).norm(dim=-1).mean(dim=1)
    return speed


def all_baselines(num_predicted: int, seed: int = 0) -> list[Baseline]:
    """Every baseline, in the order in which tables list them."""
    return [
        Stationary(num_predicted),
        ConstantVelocity(num_predicted),
        LeastSquaresLine(num_predicted),
        Ridge(num_predicted),
        ConstantVelocity(num_predicted, heading_noise=25.0),
        ConstantVelocity(num_predicted, velocity_noise=True),
        Ridge(num_predicted, anchors=True, seed=seed),
        NearestNeighbours(num_predicted, seed=seed),
    ]
