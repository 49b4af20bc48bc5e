"""Scenes made of noisy straight walks and small models of them, for the tests of the models."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from neurocl.trajectory.denoiser import TrunkConfig
from neurocl.trajectory.scenes import Scenes
from neurocl.trajectory.vqvae import Context, TrajectoryVqVae, VqVaeConfig

NUM_CODES = 16


def walks(
    num_scenes: int = 3, num_agents: int = 4, num_observed: int = 8, num_predicted: int = 12, seed: int = 0
) -> Scenes:
    """Complete scenes of agents that walk roughly straight."""
    generator = torch.Generator().manual_seed(seed)
    steps = num_observed + num_predicted
    velocity = 0.4 * torch.randn(num_scenes, num_agents, 1, 2, generator=generator)
    start = 4 * torch.randn(num_scenes, num_agents, 1, 2, generator=generator)
    noise = 0.05 * torch.randn(num_scenes, num_agents, steps, 2, generator=generator).cumsum(dim=2)
    track = start + velocity * torch.arange(steps)[:, None] + noise
    mask = torch.ones(num_scenes, num_agents, dtype=torch.bool)
    return Scenes(
        past=track[:, :, :num_observed],
        future=track[:, :, num_observed:],
        agent_mask=mask,
        past_mask=mask[..., None].repeat(1, 1, num_observed),
        future_mask=mask[..., None].repeat(1, 1, num_predicted),
        target_mask=mask.clone(),
        kind=torch.randint(0, 3, (num_scenes, num_agents), generator=generator),
        agent_id=torch.arange(num_agents).repeat(num_scenes, 1),
        start=torch.arange(num_scenes),
        recording=("walks",) * num_scenes,
        unit="m",
        hz=2.5,
        name="walks",
    )


def permuted(scenes: Scenes, order: torch.Tensor) -> Scenes:
    """The same scenes with their agents in another order."""
    return _changed(scenes, lambda value: value[:, order])


def padded(scenes: Scenes, extra: int) -> Scenes:
    """The same scenes with agents that do not exist, and nonsense in their place."""

    def widen(value: torch.Tensor) -> torch.Tensor:
        shape = (len(value), extra, *value.shape[2:])
        filler = value.new_full(shape, torch.nan) if value.is_floating_point() else value.new_zeros(shape)
        return torch.cat([value, filler], dim=1)

    return _changed(scenes, widen)


def _changed(scenes: Scenes, change: Any) -> Scenes:
    per_agent = {
        item.name: change(getattr(scenes, item.name))
        for item in fields(scenes)
        if isinstance(getattr(scenes, item.name), torch.Tensor) and item.name != "start"
    }
    return replace(scenes, **per_agent)


def context_of(scenes: Scenes, seed: int = 0, **options: Any) -> Context:
    """What an untrained small stage 1 knows of the scenes."""
    torch.manual_seed(seed)
    sizes = {"width": 32, "heads": 4, "hidden": 48, "rank": 4, "num_codes": NUM_CODES, "dropout": 0.0}
    config = VqVaeConfig(**sizes, **options)
    with torch.no_grad():
        return TrajectoryVqVae(config).eval().encode_context(scenes).detach()


def trunk(**options: Any) -> TrunkConfig:
    """A small stage 2 that fits :func:`context_of`."""
    return TrunkConfig(**({"context_width": 32, "width": 32, "hidden": 48} | options))
