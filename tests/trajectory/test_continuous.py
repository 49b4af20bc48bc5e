"""Flow matching and diffusion on diffusers' schedulers: exact with a perfect network, and they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neurocl.trajectory.continuous import ContinuousPrior
from tests.trajectory.scene_examples import context_of, trunk, walks


@pytest.mark.parametrize("process", ["flow", "ddim"])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_a_prior_that_knows_the_answer_arrives_at_it_in_any_number_of_steps(
    process: Any, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = ContinuousPrior(trunk(), 2, process)
    answer = torch.randn(1, 3, 4, 12, 2, generator=torch.Generator().manual_seed(0))

    def perfect(self: ContinuousPrior, x: torch.Tensor, t: torch.Tensor, memory: Any) -> torch.Tensor:
        if process == "flow":
            return (x - answer) / (t / 1000)
        level = self._scheduler.alphas_cumprod[t.long()]
        noise = (x - level.sqrt() * answer) / (1 - level).sqrt()
        return level.sqrt() * noise - (1 - level).sqrt() * answer

    monkeypatch.setattr(ContinuousPrior, "__call__", perfect)
    drawn = prior.sample(None, (6, 3, 4), steps=steps)  # type: ignore[arg-type]
    torch.testing.assert_close(drawn, answer.expand(6, -1, -1, -1, -1), rtol=1e-3, atol=1e-3)


def test_targets_are_brought_to_unit_spread_per_step() -> None:
    prior = ContinuousPrior(trunk(), 8)
    target = torch.randn(5, 4, 12, 8) * torch.arange(1, 13).view(12, 1) + 3
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[0] = False
    target[0] = 1e6
    prior.fit_statistics(target, mask)
    normal = ((target - prior.mean) / prior.deviation)[mask]
    torch.testing.assert_close(normal.mean(dim=0), torch.zeros(12, 8), rtol=0, atol=1e-4)
    torch.testing.assert_close(normal.std(dim=0, unbiased=False), torch.ones(12, 8), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no targets"):
        prior.fit_statistics(target, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="steps must be"):
        prior.sample(None, (1, 1, 1), steps=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("process", ["flow", "ddim"])
def test_a_continuous_prior_learns_where_agents_go(process: Any) -> None:
    torch.manual_seed(0)
    scenes = walks(12, 3)
    context = context_of(scenes, heading=False)
    target = scenes.future - scenes.past[:, :, -1:]
    prior = ContinuousPrior(trunk(), 2, process)
    prior.fit_statistics(target, scenes.target_mask)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(150):
        memory = prior.prepare(context)
        loss = prior.loss(target, memory, mask=scenes.target_mask, per_scene=True, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    prior.eval()
    memory = prior.prepare(context)
    drawn = prior.sample(memory, (20, 12, 3), steps=5, generator=torch.Generator().manual_seed(1))
    error = (drawn - target).norm(dim=-1).mean(dim=-1).min(dim=0).values.mean()
    assert error < 0.5 * target.norm(dim=-1).mean()
    again = prior.sample(memory, (20, 12, 3), steps=5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)
