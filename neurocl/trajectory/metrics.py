"""How good forecasts are: errors, misses, likelihood, diversity, collisions, calibration, and how sure that is.

``K`` forecasts of each agent, ``N`` agents of all scenes together, ``T`` steps, ``G`` scenes. Everything is in the unit
of the positions. Functions return one number per agent (or scene), so that means, medians and intervals are the
caller's choice; agents without any known step give NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MAX_ELEMENTS = 1 << 22
MIN_LOG_DENSITY = -20.0


def errors(
    pred: Tensor, truth: Tensor, mask: Tensor | None = None, horizon: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean distance over the steps, and distance at the last one, of every forecast: [K, N] both.

    Args:
        pred: [K, N, T, 2].
        truth: [N, T, 2].
        mask: steps of the truth that are known, bool [N, T]; the last one counts as the end. None for all.
        horizon: steps to look at, None for all.

    Raises:
        ValueError: shapes that do not fit, or a horizon outside 1 to T.
    """
    if pred.ndim != 4 or pred.shape[1:] != truth.shape:
        raise ValueError(f"expected forecasts [K, N, T, 2] of truths [N, T, 2], got {pred.shape} and {truth.shape}")
    steps = truth.shape[1] if horizon is None else horizon
    if not 1 <= steps <= truth.shape[1]:
        raise ValueError(f"horizon must be between 1 and {truth.shape[1]}, got {horizon}")
    distance = torch.linalg.vector_norm(pred[:, :, :steps] - truth[:, :steps], dim=-1)
    if mask is None:
        return distance.mean(dim=-1), distance[..., -1]
    known = mask[:, :steps]
    total = distance.masked_fill(~known, 0).sum(dim=-1)
    numbers = torch.arange(1, steps + 1, device=known.device)
    last = (known * numbers).max(dim=-1).values
    end = distance.gather(-1, (last - 1).clamp(min=0).expand(len(pred), -1)[..., None])[..., 0]
    return total / known.sum(dim=-1), end.masked_fill(last == 0, torch.nan)


def min_ade(pred: Tensor, truth: Tensor, mask: Tensor | None = None, horizon: int | None = None) -> Tensor:
    """Mean distance of the forecast that has the smallest one, [N]; arguments as in :func:`errors`."""
    return errors(pred, truth, mask, horizon)[0].min(dim=0).values


def min_fde(pred: Tensor, truth: Tensor, mask: Tensor | None = None, horizon: int | None = None) -> Tensor:
    """Final distance of the forecast that has the smallest one, [N]; not always the one of :func:`min_ade`."""
    return errors(pred, truth, mask, horizon)[1].min(dim=0).values


def joint_errors(
    pred: Tensor, truth: Tensor, scene: Tensor, mask: Tensor | None = None, horizon: int | None = None
) -> tuple[Tensor, Tensor]:
    """Smallest over the forecasts of the mean over the agents of a scene, of both :func:`errors`: [G] both.

    Args:
        scene: number of each agent's scene, int64 [N]; scenes come out in the order of their numbers.
    """
    rows, count = _rows(scene)
    smallest = []
    for error in errors(pred, truth, mask, horizon):
        valid = ~error.isnan()
        total = error.new_zeros(len(pred), count).index_add(1, rows, error.nan_to_num())
        known = error.new_zeros(len(pred), count).index_add(1, rows, valid.to(error.dtype))
        smallest.append((total / known).min(dim=0).values)
    return smallest[0], smallest[1]


def misses(pred: Tensor, truth: Tensor, threshold: float = 2.0, mask: Tensor | None = None) -> Tensor:
    """1 for agents whom no forecast meets at the end within ``threshold``, 0 for the others: [N]."""
    distance = min_fde(pred, truth, mask)
    return (distance > threshold).to(distance.dtype).masked_fill(distance.isnan(), torch.nan)


def brier_fde(pred: Tensor, truth: Tensor, probabilities: Tensor, mask: Tensor | None = None) -> Tensor:
    """Smallest final distance plus (1 - p)^2 of the forecast that has it, [N]; ``probabilities`` are [K, N].

    Reference: Wilson et al., "Argoverse 2", NeurIPS 2021 (leaderboard metric brier-minFDE).
    """
    best = errors(pred, truth, mask)[1].min(dim=0)
    share = probabilities.gather(0, best.indices[None])[0]
    return best.values + (1 - share).square()


def kde_nll(pred: Tensor, truth: Tensor, probabilities: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Negative log-likelihood under a Gaussian kernel density of the forecasts of each step, mean over steps: [N].

    The bandwidth is Scott's; log densities count as -20 at least.

    Args:
        probabilities: weights of the forecasts, [K, N], None for equal ones.
        mask: steps that are known, bool [N, T].

    Reference: Ivanovic & Pavone, "The Trajectron", ICCV 2019, arXiv 1810.05993.
    """

    def part(pred: Tensor, truth: Tensor, share: Tensor, known: Tensor) -> Tensor:
        log_density = _kernel_density(pred, share).log_density(truth).clamp(min=MIN_LOG_DENSITY)
        return -log_density.masked_fill(~known, 0).sum(dim=-1) / known.sum(dim=-1)

    share = pred.new_full(pred.shape[:2], 1 / len(pred)) if probabilities is None else probabilities
    known = truth.new_ones(truth.shape[:2], dtype=torch.bool) if mask is None else mask
    return _over_agents(part, pred, truth, share, known, pairs=False)


def energy_score(pred: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean distance to the truth less half the mean distance among forecasts, of whole trajectories: [N].

    Proper: on average the true distribution has the smallest score.

    Reference: Gneiting & Raftery, "Strictly proper scoring rules, prediction, and estimation", JASA 2007.
    """
    known = truth.new_ones(truth.shape[:2], dtype=torch.bool) if mask is None else mask

    def part(pred: Tensor, truth: Tensor, known: Tensor) -> Tensor:
        flat = pred.masked_fill(~known[..., None], 0).flatten(2)
        goal = truth.masked_fill(~known[..., None], 0).flatten(1)
        apart = torch.cdist(flat.transpose(0, 1), flat.transpose(0, 1), compute_mode="donot_use_mm_for_euclid_dist")
        gap = torch.linalg.vector_norm(flat - goal, dim=-1).mean(dim=0)
        score: Tensor = gap - apart.mean(dim=(1, 2)) / 2
        return score.masked_fill(~known.any(dim=-1), torch.nan)

    return _over_agents(part, pred, truth, known, pairs=True)


class Diversity(NamedTuple):
    """How far the forecasts of an agent lie apart, mean over pairs of forecasts, [N] each.

    Attributes:
        apd: norm of the difference of whole trajectories.
        apd_ade: mean distance over the steps.
        fsd: distance at the end.
    """

    apd: Tensor
    apd_ade: Tensor
    fsd: Tensor


def diversity(pred: Tensor) -> Diversity:
    """Diversity of forecasts [K, N, T, 2]; zeros for a single one."""
    count = len(pred)
    if count == 1:
        zeros = pred.new_zeros(pred.shape[1])
        return Diversity(zeros, zeros, zeros)
    first, second = torch.triu_indices(count, count, 1, device=pred.device)

    def part(pred: Tensor) -> Tensor:
        squared = (pred[first] - pred[second]).square().sum(dim=-1)
        step = squared.sqrt()
        return torch.stack([squared.sum(-1).sqrt().mean(0), step.mean(dim=(0, 2)), step[..., -1].mean(0)], dim=1)

    return Diversity(*_over_agents(part, pred, pairs=True).unbind(dim=1))


def collisions(pred: Tensor, scene: Tensor, threshold: float = 0.1) -> tuple[Tensor, Tensor]:
    """Who comes closer than ``threshold`` to somebody else of the same scene in the same forecast.

    Args:
        pred: forecasts that belong together, [K, N, T, 2].
        scene: number of each agent's scene, int64 [N].
    Returns: whether scenes have a collision, bool [K, G], and whether agents do, bool [K, N].
    """
    rows, count = _rows(scene)
    agents = torch.zeros(pred.shape[:2], dtype=torch.bool, device=pred.device)
    order = rows.argsort(stable=True)
    sizes = torch.bincount(rows, minlength=count).tolist()
    per_scene = order.split(sizes)
    # Scenes of one size are compared together.
    for size in sorted(set(sizes) - {0, 1}):
        group = torch.stack([members for members in per_scene if len(members) == size])
        at_once = max(1, MAX_ELEMENTS // (len(pred) * size * size * pred.shape[2]))
        for members in group.split(at_once):
            place = pred[:, members].transpose(2, 3)
            apart = (place[..., :, None, :] - place[..., None, :, :]).square().sum(dim=-1)
            close = apart < threshold**2
            close.diagonal(dim1=-2, dim2=-1).fill_(False)
            agents[:, members] = close.any(dim=-1).any(dim=2)
    scenes = torch.zeros(len(pred), count, device=pred.device).index_add(1, rows, agents.float()) > 0
    return scenes, agents


def outside(pred: Tensor, bounds: tuple[float, float, float, float]) -> Tensor:
    """Share of the forecasts of each agent that leave a field (x from, y from, x to, y to): [N]."""
    x_low, y_low, x_high, y_high = bounds
    low, high = pred.new_tensor([x_low, y_low]), pred.new_tensor([x_high, y_high])
    return ((pred < low) | (pred > high)).flatten(2).any(dim=2).to(pred.dtype).mean(dim=0)


def coverage(
    pred: Tensor,
    truth: Tensor,
    levels: Tensor,
    probabilities: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """How often the truth lies where the forecasts say it does with probability p: [levels].

    The set of probability p of a step is where the kernel density of the forecasts is above the share 1 - p of its
    values at the forecasts themselves, each left out of its own density. Calibrated forecasts give back ``levels``.

    Args:
        levels: probabilities p, [levels].
        probabilities: weights of the forecasts, [K, N], None for equal ones.
        mask: steps that are known, bool [N, T].
    """
    known = truth.new_ones(truth.shape[:2], dtype=torch.bool) if mask is None else mask
    share = pred.new_full(pred.shape[:2], 1 / len(pred)) if probabilities is None else probabilities

    def part(pred: Tensor, truth: Tensor, share: Tensor) -> Tensor:
        density = _kernel_density(pred, share)
        here, at_forecasts = density.log_density(truth), density.left_out()
        # Probability that a draw has a higher density than the truth: inside the set of p when below p.
        return (share[..., None] * (at_forecasts > here)).sum(dim=0)

    above = _over_agents(part, pred, truth, share, pairs=True)[known]
    # Sums of shares that should equal a level miss it by rounding, on either side.
    return (above[:, None] < levels.to(above) - 1e-9).to(pred.dtype).mean(dim=0)


class Reliability(NamedTuple):
    """Predicted against observed probabilities, [bins] each.

    Attributes:
        predicted: mean probability of the forecasts in the bin.
        observed: share of them that were the one closest to the truth.
        num_forecasts: in the bin.
    """

    predicted: Tensor
    observed: Tensor
    num_forecasts: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error: mean gap between both, weighted by their number."""
        gap = (self.predicted - self.observed).abs() * self.num_forecasts
        return float(gap.sum() / self.num_forecasts.sum().clamp(min=1))


def reliability(
    pred: Tensor, truth: Tensor, probabilities: Tensor, num_bins: int = 10, mask: Tensor | None = None
) -> Reliability:
    """Do forecasts of probability p turn out the closest (in mean distance) in a share p of the cases?

    Args:
        probabilities: [K, N].
        num_bins: bins with equal numbers of forecasts.
    """
    distance = errors(pred, truth, mask)[0]
    valid = ~distance.isnan().any(dim=0)
    closest = torch.zeros_like(distance).scatter_(0, distance.argmin(dim=0)[None], 1)[:, valid].flatten()
    share = probabilities[:, valid].to(closest.dtype).flatten()
    ranked = share.argsort()
    bins = [part for part in ranked.tensor_split(num_bins) if len(part)]
    return Reliability(
        torch.stack([share[part].mean() for part in bins]),
        torch.stack([closest[part].mean() for part in bins]),
        torch.tensor([len(part) for part in bins], dtype=share.dtype, device=share.device),
    )


def conformal_radii(pred: Tensor, truth: Tensor, level: float = 0.9) -> Tensor:
    """Radius per step around all forecasts that holds a new truth with probability ``level``: [T].

    Split conformal: take ``pred`` and ``truth`` from a part of the data that was not used for training. Infinite where
    there are too few agents for that level.

    Reference: Vovk et al., "Algorithmic learning in a random world", 2005.
    """
    nearest: Tensor = torch.linalg.vector_norm(pred - truth, dim=-1).min(dim=0).values
    rank = math.ceil((len(nearest) + 1) * level)
    if rank > len(nearest):
        return nearest.new_full((nearest.shape[1],), torch.inf)
    radii: Tensor = nearest.kthvalue(rank, dim=0).values
    return radii


class Interval(NamedTuple):
    """A mean and the interval that holds it with the asked confidence."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: Tensor, scene: Tensor, *, num_resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean over agents, and its interval when whole scenes are drawn again with replacement.

    Args:
        values: one number per agent, [N]; NaN does not count.
        scene: number of each agent's scene, int64 [N].

    Raises:
        ValueError: no value at all.

    Reference: Efron & Tibshirani, "An introduction to the bootstrap", 1993 (percentile interval).
    """
    valid = ~values.isnan()
    if not bool(valid.any()):
        raise ValueError("no values to take a mean of")
    rows, count = _rows(scene[valid])
    totals = torch.zeros(count, dtype=torch.float64).index_add(0, rows.cpu(), values[valid].double().cpu())
    sizes = torch.bincount(rows, minlength=count).double().cpu()
    generator = torch.Generator().manual_seed(seed)
    means = []
    at_once = max(1, MAX_ELEMENTS // count)
    for start in range(0, num_resamples, at_once):
        drawn = torch.randint(count, (min(at_once, num_resamples - start), count), generator=generator)
        means.append(totals[drawn].sum(dim=1) / sizes[drawn].sum(dim=1))
    edges = torch.quantile(torch.cat(means), torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return Interval(float(totals.sum() / sizes.sum()), float(edges[0]), float(edges[1]))


def _rows(scene: Tensor) -> tuple[Tensor, int]:
    """Scenes numbered from 0 without gaps, [N], and their number."""
    names, rows = scene.unique(return_inverse=True)
    return rows, len(names)


def _over_agents(function: Callable[..., Tensor], pred: Tensor, *others: Tensor, pairs: bool) -> Tensor:
    """``function`` on slices of agents, so that K (or K * K) times N * T numbers never exist at once.

    ``others`` have their agents in the dimension after the forecasts if they have as many as ``pred``, else in front.
    """
    per_agent = len(pred) ** (2 if pairs else 1) * pred.shape[2]
    size = max(1, MAX_ELEMENTS // max(1, per_agent))
    found = []
    for start in range(0, max(1, pred.shape[1]), size):
        window = slice(start, start + size)
        rest = [value[:, window] if value.shape == pred.shape[:2] else value[window] for value in others]
        found.append(function(pred[:, window], *rest))
    return torch.cat(found)


class _KernelDensity(NamedTuple):
    """Gaussian kernels on the forecasts of every step, whitened: places [K, N, T, 2], weights [K, N, 1]."""

    places: Tensor
    log_share: Tensor
    whiten: Tensor
    log_scale: Tensor

    def log_density(self, at: Tensor) -> Tensor:
        """Log density [N, T] at positions [N, T, 2]."""
        point = torch.einsum("ntij,ntj->nti", self.whiten, at.to(self.places.dtype))
        exponent = -(point - self.places).square().sum(dim=-1) / 2 + self.log_share
        return exponent.logsumexp(dim=0) + self.log_scale

    def left_out(self) -> Tensor:
        """Log density [K, N, T] at each forecast of the kernels of the others."""
        found = []
        for index in range(len(self.places)):
            exponent = -(self.places - self.places[index]).square().sum(dim=-1) / 2 + self.log_share
            others = torch.cat([exponent[:index], exponent[index + 1 :]])
            rest = torch.log1p(-self.log_share[index].exp().clamp(max=1 - 1e-12))
            found.append(others.logsumexp(dim=0) + self.log_scale - rest)
        return torch.stack(found)


def _kernel_density(pred: Tensor, share: Tensor) -> _KernelDensity:
    """Kernel density with Scott's bandwidth of forecasts [K, N, T, 2] with weights [K, N]."""
    pred, share = pred.double(), share.double()
    share = share / share.sum(dim=0)
    squared = share.square().sum(dim=0)
    weight = share[..., None, None]
    centred = pred - (weight * pred).sum(dim=0)
    spread = torch.einsum("kn,knti,kntj->ntij", share, centred, centred)
    # Unbiased, times Scott's factor for two dimensions; forecasts that coincide still have a density.
    factor = squared ** (1 / 3) / (1 - squared).clamp(min=1e-12)
    tiny = 1e-12 * torch.eye(2, dtype=pred.dtype, device=pred.device)
    spread = spread * factor[:, None, None, None]
    spread = spread + tiny + 1e-9 * spread.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] * torch.eye(2).to(pred)
    whiten = torch.linalg.inv(torch.linalg.cholesky(spread))
    log_scale = whiten.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1) - math.log(2 * math.pi)
    return _KernelDensity(torch.einsum("ntij,kntj->knti", whiten, pred), share.log()[..., None], whiten, log_scale)
