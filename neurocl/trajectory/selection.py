"""From many sampled futures to a few forecasts with probabilities: batched k-means, medoids, whole scenes.

``G`` groups clustered side by side, ``N`` samples, ``K`` clusters, ``D`` values of a sample, ``S`` scenes,
``A`` agents, ``T_p`` predicted steps.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Selection = Literal["samples", "centroids", "medoids"]

COPIES = 4  # smoothed copies of every sample


class Clusters(NamedTuple):
    """Result of :func:`kmeans`.

    Attributes:
        centres: means of the members, [G, K, D]; a cluster that ended empty holds one of the samples.
        assignment: cluster of every sample, int64 [G, N].
        counts: number of members, int64 [G, K]; over K they add up to N.
    """

    centres: Tensor
    assignment: Tensor
    counts: Tensor


class Selected(NamedTuple):
    """Forecasts chosen among samples.

    Attributes:
        trajectories: [K, S, A, T_p, 2].
        probabilities: share of the samples that each forecast stands for, [K, S, A]; over K they add up to 1.
    """

    trajectories: Tensor
    probabilities: Tensor


def uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in [0, 1) on the device of ``like``, drawn where the generator lives."""
    source = like.device if generator is None else generator.device
    dtype = like.dtype if like.is_floating_point() else torch.float32
    return torch.rand(shape, generator=generator, device=source, dtype=dtype).to(like.device)


@torch.no_grad()
def kmeans(
    points: Tensor,
    num_clusters: int,
    *,
    generator: torch.Generator | None = None,
    init: Tensor | None = None,
    max_iterations: int = 25,
    tolerance: float = 1e-4,
) -> Clusters:
    """Lloyd's algorithm on every group at once.

    A group whose centres have settled is left alone while the others go on, so that what it is batched with does not
    matter. An empty cluster takes a random sample of its group.

    Args:
        points: samples, [G, N, D], floating.
        num_clusters: K; may exceed the number of distinct samples, some clusters are then empty.
        generator: of the k-means++ start and of the samples that empty clusters take.
        init: rows of the samples to start from, int64 [G, K]; k-means++ when None.
        max_iterations: of Lloyd.
        tolerance: a group has settled when its squared centre shifts add up to less, in squared units of ``points``.

    Raises:
        ValueError: no samples, no clusters, or shapes that do not fit.

    Reference: Lloyd, "Least squares quantization in PCM", 1982; Arthur & Vassilvitskii, "k-means++", SODA 2007.
    """
    if points.ndim != 3 or points.shape[1] == 0 or num_clusters < 1:
        raise ValueError(f"expected samples [G, N >= 1, D] and K >= 1, got {tuple(points.shape)} and {num_clusters}")
    num_groups, num_points, size = points.shape
    if init is not None and init.shape != (num_groups, num_clusters):
        raise ValueError(f"init must be [G, K] = {(num_groups, num_clusters)}, got {tuple(init.shape)}")
    # Distances come from dot products: around the mean they lose no digits to where the scene lies.
    origin = points.mean(dim=1, keepdim=True)
    points = points - origin
    rows = _plus_plus(points, num_clusters, generator) if init is None else init
    centres = points.gather(1, rows[..., None].expand(-1, -1, size))
    settled = torch.zeros(num_groups, dtype=torch.bool, device=points.device)
    assignment = torch.zeros(num_groups, num_points, dtype=torch.int64, device=points.device)
    counts = torch.zeros(num_groups, num_clusters, dtype=torch.int64, device=points.device)
    members = torch.empty(num_groups, num_points, num_clusters, dtype=points.dtype, device=points.device)
    for _ in range(max_iterations):
        nearest = torch.baddbmm(centres.square().sum(-1)[:, None], points, centres.mT, alpha=-2).argmin(dim=-1)
        members.zero_().scatter_(2, nearest[..., None], 1)
        sizes = members.sum(dim=1)
        moved = torch.bmm(members.mT, points) / sizes.clamp(min=1)[..., None]
        empty = sizes == 0
        if bool(empty.any()):
            drawn = (uniform((num_groups, num_clusters), points, generator) * num_points).long()
            strays = points.gather(1, drawn.clamp(max=num_points - 1)[..., None].expand(-1, -1, size))
            moved = torch.where(empty[..., None], strays, moved)
        going = ~settled
        assignment = torch.where(going[:, None], nearest, assignment)
        counts = torch.where(going[:, None], sizes.long(), counts)
        shift = (moved - centres).square().sum(dim=(1, 2))
        centres = torch.where(going[:, None, None], moved, centres)
        settled = settled | (shift < tolerance)
        if bool(settled.all()):
            break
    return Clusters(centres + origin, assignment, counts)


def _plus_plus(points: Tensor, num_clusters: int, generator: torch.Generator | None) -> Tensor:
    """Rows [G, K] of starting centres, each drawn in proportion to the squared distance from those before."""
    num_groups, num_points, size = points.shape
    draws = uniform((num_groups, num_clusters), points, generator)
    norms = points.square().sum(dim=-1)
    row = (draws[:, 0] * num_points).long().clamp(max=num_points - 1)
    rows = [row]
    closest = torch.full_like(norms, torch.inf)
    for index in range(1, num_clusters):
        centre = points.gather(1, row[:, None, None].expand(-1, 1, size))
        distance = norms - 2 * torch.bmm(points, centre.mT)[..., 0] + norms.gather(1, row[:, None])
        # Samples that coincide with a centre get zero weight, rounding or not.
        distance = torch.where(distance <= 1e-6 * norms, 0, distance)
        closest = torch.minimum(closest, distance).scatter_(1, row[:, None], 0)
        total = closest.cumsum(dim=1)
        # All samples coincide with centres already: any will do.
        total = torch.where(total[:, -1:] > 0, total, torch.arange(1, num_points + 1).to(total))
        aim = draws[:, index, None] * total[:, -1:]
        row = torch.searchsorted(total, aim, right=True)[:, 0].clamp(max=num_points - 1)
        rows.append(row)
    return torch.stack(rows, dim=1)


@torch.no_grad()
def medoids(points: Tensor, clusters: Clusters) -> Tensor:
    """The member nearest to each centre, as rows of ``points``: int64 [G, K].

    Of an empty cluster it is the nearest sample of all.
    """
    distance = torch.cdist(points, clusters.centres)
    own = torch.nn.functional.one_hot(clusters.assignment, clusters.counts.shape[1]).bool()
    allowed = own | (clusters.counts == 0)[:, None]
    return distance.masked_fill(~allowed, torch.inf).argmin(dim=1)


@torch.no_grad()
def smoothed(points: Tensor, strength: float, generator: torch.Generator | None = None) -> Tensor:
    """The samples and, for each, a few more that could have been drawn: a bootstrap that keeps mean and covariance.

    A copy is the sample, drawn a bit towards the mean of its group, plus the difference of two random samples of the
    group. Centres of clusters then depend less on which samples happened to be drawn.

    Args:
        points: [G, N, D].
        strength: h, share of a copy's deviation that is random; the sample's own part is sqrt(1 - h^2).
        generator: of the pairs.

    Returns: [G, (1 + 4) N, D], the samples first.
    Reference: Silverman & Young, "The bootstrap: to smooth or not to smooth?", Biometrika 1987, with differences of
    samples in the place of a kernel.
    """
    groups, count, size = points.shape
    centre = points.mean(dim=1, keepdim=True)
    drawn_in = centre + math.sqrt(1 - strength**2) * (points - centre)
    pairs = (uniform((groups, 2 * COPIES * count), points, generator) * count).long().clamp(max=count - 1)
    ends = points.gather(1, pairs[..., None].expand(-1, -1, size)).view(groups, 2, COPIES * count, size)
    moved = drawn_in.repeat(1, COPIES, 1) + strength / math.sqrt(2) * (ends[:, 0] - ends[:, 1])
    return torch.cat([points, moved], dim=1)


@torch.no_grad()
def select(
    samples: Tensor,
    num_forecasts: int,
    *,
    how: Selection = "centroids",
    joint: bool = False,
    agent_mask: Tensor | None = None,
    smoothing: float = 0.0,
    generator: torch.Generator | None = None,
) -> Selected:
    """K forecasts out of N sampled futures.

    Args:
        samples: [N, S, A, T_p, 2], in any unit.
        num_forecasts: K, at most N.
        how: the first K ``samples``, the ``centroids`` of K clusters, or the ``medoids``, which are real samples.
        joint: cluster whole scenes, so that forecast k of one agent goes with forecast k of the others.
        agent_mask: agents that exist, bool [S, A]; the others have no say in which scenes are alike.
        smoothing: of the samples before centroids are sought, see :func:`smoothed`; 0 for none.
        generator: of the clustering and the smoothing.

    Raises:
        ValueError: fewer samples than forecasts.
    """
    num_samples, num_scenes, num_agents, num_steps, _ = samples.shape
    if not 1 <= num_forecasts <= num_samples:
        raise ValueError(f"cannot choose {num_forecasts} forecasts out of {num_samples} samples")
    if how == "samples" or num_samples == num_forecasts:
        share = samples.new_full((num_forecasts, num_scenes, num_agents), 1 / num_forecasts)
        return Selected(samples[:num_forecasts], share)
    kept = samples if agent_mask is None else samples.masked_fill(~agent_mask[:, :, None, None], 0)
    if joint:
        points = kept.permute(1, 0, 2, 3, 4).reshape(num_scenes, num_samples, -1)
    else:
        points = kept.permute(1, 2, 0, 3, 4).reshape(num_scenes * num_agents, num_samples, -1)
    if smoothing and how == "centroids":
        points = smoothed(points, smoothing, generator)
    clusters = kmeans(points, num_forecasts, generator=generator)
    chosen = clusters.centres
    if how == "medoids":
        chosen = points.gather(1, medoids(points, clusters)[..., None].expand_as(chosen))
    share = clusters.counts.to(samples.dtype) / points.shape[1]
    if joint:
        chosen = chosen.view(num_scenes, num_forecasts, num_agents, num_steps, 2).transpose(0, 1)
        share = share.T[:, :, None].expand(-1, -1, num_agents)
    else:
        chosen = chosen.view(num_scenes, num_agents, num_forecasts, num_steps, 2).permute(2, 0, 1, 3, 4)
        share = share.view(num_scenes, num_agents, num_forecasts).permute(2, 0, 1)
    return Selected(chosen.contiguous(), share.contiguous())
