"""Random changes to scenes for training: turned, mirrored, resized, shaken, with gaps and without some agents.

``S`` scenes, ``A`` agents, ``T_o`` observed steps. Everything draws on the CPU from the generator given, so that
results are the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from neurocl.errors import UserError
from neurocl.trajectory.scenes import Scenes


def augmented(
    scenes: Scenes,
    generator: torch.Generator,
    *,
    rotation: float = 0.0,
    reflection: bool = False,
    field: Sequence[float] | None = None,
    drop: float = 0.0,
    shorten: float = 0.0,
    jitter: float = 0.0,
    absent: float = 0.0,
    resize: float = 1.0,
) -> Scenes:
    """Several of the changes below, in the order turn, mirror, resize, leave out, shake, drop, shorten.

    Args:
        scenes: a batch; it stays as it is.
        generator: of the random numbers.
        rotation: degrees, see :func:`rotated`; 360 for pedestrians, 0 or a few for sports.
        reflection: mirror scenes, see :func:`reflected`.
        field: length and width of the court or field, for ``reflection``.
        drop: see :func:`dropped`.
        shorten: see :func:`shortened`.
        jitter: see :func:`jittered`.
        absent: see :func:`thinned`.
        resize: see :func:`resized`; 1 for not at all.

    Raises:
        UserError: a probability that is not in 0 to 1, negative degrees or noise, or a largest size below 1.
    """
    for value, what in ((drop, "drop"), (shorten, "shorten"), (absent, "absent")):
        if not 0 <= value <= 1:
            raise UserError(f"{what} must be from 0 to 1, got {value}")
    for value, what in ((rotation, "rotation"), (jitter, "jitter")):
        if not 0 <= value < math.inf:
            raise UserError(f"{what} must be at least 0, got {value}")
    if not 1 <= resize < math.inf:
        raise UserError(f"resize must be at least 1, got {resize}")
    if rotation:
        scenes = rotated(scenes, generator, rotation)
    if reflection:
        scenes = reflected(scenes, generator, field)
    if resize > 1:
        scenes = resized(scenes, generator, resize)
    if absent:
        scenes = thinned(scenes, generator, absent)
    if jitter:
        scenes = jittered(scenes, generator, jitter)
    if drop:
        scenes = dropped(scenes, generator, drop)
    if shorten:
        scenes = shortened(scenes, generator, shorten)
    return scenes


def rotated(scenes: Scenes, generator: torch.Generator, degrees: float = 360.0) -> Scenes:
    """Turn every scene around its centre by an angle from 0 to 360, or from -d to d if ``degrees`` d is less."""
    draw = torch.rand(len(scenes), generator=generator, dtype=torch.float64)
    angle = (draw * 360.0 if degrees >= 360 else (2 * draw - 1) * degrees) * (math.pi / 180)
    cosine, sine = angle.cos(), angle.sin()
    turn = torch.stack([torch.stack([cosine, -sine], dim=1), torch.stack([sine, cosine], dim=1)], dim=1)
    return _moved(scenes, turn, centres(scenes))


def reflected(scenes: Scenes, generator: torch.Generator, field: Sequence[float] | None = None) -> Scenes:
    """Mirror scenes with probability one half: across a line through the centre, or along both axes of a field.

    Args:
        scenes: a batch.
        generator: of the random numbers.
        field: length and width in the unit of the scenes, with the origin in a corner; each direction is mirrored or
            not on its own, and people stay on the field. Without it, y is mirrored at the centre of the scene.
    """
    sign = 1 - 2 * (torch.rand(len(scenes), 2, generator=generator) < 0.5).double()
    if field is None:
        sign[:, 0] = 1
        centre = centres(scenes)
    else:
        centre = torch.tensor([[field[0] / 2, field[1] / 2]], dtype=torch.float64, device=scenes.past.device)
        centre = centre.expand(len(scenes), 2)
    return _moved(scenes, torch.diag_embed(sign), centre)


def resized(scenes: Scenes, generator: torch.Generator, largest: float) -> Scenes:
    """Make every scene smaller or larger around its centre, by a factor from 1 / ``largest`` to ``largest``.

    Smaller and larger are equally likely, the logarithm of the factor is uniform. People then walk at other speeds, as
    in recordings of another place or of another frame rate.
    """
    draw = torch.rand(len(scenes), generator=generator, dtype=torch.float64)
    factor = ((2 * draw - 1) * math.log(largest)).exp()
    return _moved(scenes, torch.diag_embed(factor[:, None].expand(-1, 2)), centres(scenes))


def thinned(scenes: Scenes, generator: torch.Generator, probability: float) -> Scenes:
    """Leave agents out with this probability, as where nobody noticed them; one random target of each scene stays."""
    draw = torch.rand(scenes.agent_mask.shape, generator=generator)
    stays = torch.rand(scenes.agent_mask.shape, generator=generator).masked_fill(~scenes.target_mask.cpu(), -1)
    kept = draw >= probability
    kept.scatter_(1, stays.argmax(dim=1, keepdim=True), True)
    kept = kept.to(scenes.past.device)
    past_mask = scenes.past_mask & kept[..., None]
    future_mask = scenes.future_mask & kept[..., None]
    return replace(
        scenes,
        agent_mask=scenes.agent_mask & kept,
        target_mask=scenes.target_mask & kept,
        past_mask=past_mask,
        future_mask=future_mask,
        past=torch.where(past_mask[..., None], scenes.past, 0.0),
        future=torch.where(future_mask[..., None], scenes.future, 0.0),
    )


def jittered(scenes: Scenes, generator: torch.Generator, deviation: float) -> Scenes:
    """Add Gaussian noise of this standard deviation, in the unit of the scenes, to all observed positions."""
    noise = torch.randn(scenes.past.shape, generator=generator).to(scenes.past.device) * deviation
    return replace(scenes, past=torch.where(scenes.past_mask[..., None], scenes.past + noise, scenes.past))


def dropped(scenes: Scenes, generator: torch.Generator, probability: float) -> Scenes:
    """Hide observed positions with this probability, but never the last one of an agent, from which it is forecast."""
    hidden = torch.rand(scenes.past_mask.shape, generator=generator) < probability
    return _hidden(scenes, hidden.to(scenes.past.device))


def shortened(scenes: Scenes, generator: torch.Generator, probability: float) -> Scenes:
    """With this probability an agent has just come into view: its first steps are hidden, one or more, not its last."""
    scenes_agents = scenes.past_mask.shape[:2]
    chosen = torch.rand(scenes_agents, generator=generator) < probability
    draw = torch.rand(scenes_agents, generator=generator) * (scenes.num_observed - 1)
    length = (draw.floor() + 1) * chosen
    hidden = torch.arange(scenes.num_observed) < length[..., None]
    return _hidden(scenes, hidden.to(scenes.past.device))


def cropped(scenes: Scenes, size: int, generator: torch.Generator) -> Scenes:
    """Scenes of at most ``size`` agents: of fuller ones a random target and those who stand nearest to it.

    Targets still come first.
    """
    if scenes.num_agents <= size:
        return scenes
    draw = torch.rand(scenes.target_mask.shape, generator=generator)
    focus = draw.masked_fill(~scenes.target_mask, -1).argmax(dim=1)
    step = scenes.past_mask * torch.arange(1, scenes.num_observed + 1)
    last = step.argmax(dim=2)[..., None, None].expand(-1, -1, 1, 2)
    place = scenes.past.gather(2, last)[:, :, 0]
    apart = (place - place.gather(1, focus[:, None, None].expand(-1, 1, 2))).square().sum(dim=-1)
    apart = apart.masked_fill(~(scenes.agent_mask & scenes.past_mask.any(dim=2)), torch.inf)
    near = apart.topk(size, dim=1, largest=False).indices.sort(dim=1).values
    changes: dict[str, Any] = {}
    for item in fields(scenes):
        value = getattr(scenes, item.name)
        if isinstance(value, torch.Tensor) and item.name != "start":
            index = near.view(*near.shape, *[1] * (value.ndim - 2)).expand(-1, -1, *value.shape[2:])
            changes[item.name] = value.gather(1, index)
    return replace(scenes, **changes)


def centres(scenes: Scenes) -> torch.Tensor:
    """Mean of the observed positions of each scene, float64 [S, 2]."""
    weight = scenes.past_mask.double()[..., None]
    total = (scenes.past.double() * weight).sum(dim=(1, 2))
    return total / weight.sum(dim=(1, 2)).clamp_min(1)


def _moved(scenes: Scenes, matrix: torch.Tensor, centre: torch.Tensor) -> Scenes:
    """Positions under the linear map ``matrix`` [S, 2, 2] about ``centre`` [S, 2]."""
    matrix = matrix.to(scenes.past.device)
    middle = centre[:, None, None]

    def mapped(points: torch.Tensor) -> torch.Tensor:
        return (torch.einsum("sij,satj->sati", matrix, points.double() - middle) + middle).to(points.dtype)

    return replace(scenes, past=mapped(scenes.past), future=mapped(scenes.future))


def _hidden(scenes: Scenes, hidden: torch.Tensor) -> Scenes:
    last = scenes.past_mask.flip(-1).cumsum(-1).flip(-1) == 1
    mask = scenes.past_mask & (~hidden | last)
    return replace(scenes, past_mask=mask, past=torch.where(mask[..., None], scenes.past, 0.0))
