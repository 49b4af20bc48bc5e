"""The denoiser: memory computed once, symmetries, masks, independence, and that it learns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from neurocl.trajectory.denoiser import CodeDenoiser, CodeEmbedding, TrunkConfig
from neurocl.trajectory.diffusion import MaskReplaceDiffusion
from neurocl.trajectory.vqvae import TrajectoryVqVae, VqVaeConfig
from tests.trajectory.scene_examples import NUM_CODES, context_of, padded, permuted, trunk, walks


def denoiser(seed: int = 0, **options: Any) -> CodeDenoiser:
    torch.manual_seed(seed)
    return CodeDenoiser(trunk(**options), NUM_CODES, 50)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, NUM_CODES + 1, shape, generator=torch.Generator().manual_seed(1))


def test_the_prior_of_the_paper_has_about_as_many_parameters_as_its_clean_version() -> None:
    network = CodeDenoiser(TrunkConfig.faithful(), 16)
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(130_000, rel=0.15)


@pytest.mark.parametrize("options", [{}, {"agent_attention": False}, {"layers": 2, "width": 48}])
def test_sampling_from_an_absorbed_memory_gives_the_logits_of_training(options: dict[str, Any]) -> None:
    network, context = denoiser(**options), context_of(walks())
    x = tokens(6, 3, 4, 12)
    with torch.no_grad():
        plain = network.train()(x, torch.tensor(7), network.prepare(context))
        absorbed = network.eval()(x, torch.tensor(7), network.prepare(context))
        one_by_one = torch.stack([network(part, torch.full((3, 1), 7), network.train().prepare(context)) for part in x])
    assert plain.shape == (6, 3, 4, 12, NUM_CODES)
    torch.testing.assert_close(absorbed, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one_by_one, plain, rtol=1e-4, atol=1e-5)


def test_the_memory_does_not_grow_with_the_number_of_samples() -> None:
    network, context = denoiser().eval(), context_of(walks())
    memory = network.prepare(context)
    cross = memory.layers[0].cross
    assert cross is not None
    assert cross.keys.shape == (3 * 4, 4 * 8, 32)
    assert network(tokens(9, 3, 4, 12), torch.tensor(3), memory).shape[0] == 9


@pytest.mark.parametrize("options", [{}, {"agent_attention": False, "geometry": False}])
def test_agents_may_be_reordered_and_padded(options: dict[str, Any]) -> None:
    network, scenes, x = denoiser(**options).eval(), walks(), tokens(2, 3, 4, 12)
    order = torch.tensor([3, 1, 0, 2])
    t = torch.tensor(20)
    plain = network(x, t, network.prepare(context_of(scenes)))
    turned = network(x[:, :, order], t, network.prepare(context_of(permuted(scenes, order))))
    torch.testing.assert_close(turned, plain[:, :, order], rtol=1e-4, atol=1e-5)
    more = network(x, t, network.prepare(context_of(padded(scenes, 2))))
    torch.testing.assert_close(more, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("agent_attention", [True, False])
def test_agents_see_each_others_codes_only_when_asked(agent_attention: bool) -> None:
    network, context = denoiser(agent_attention=agent_attention).eval(), context_of(walks())
    x = tokens(1, 3, 4, 12)
    other = x.clone()
    other[:, :, 0] = (other[:, :, 0] + 1) % NUM_CODES
    memory = network.prepare(context)
    first, second = (network(value, torch.tensor(5), memory) for value in (x, other))
    assert torch.allclose(first[:, :, 1:], second[:, :, 1:]) != agent_attention
    assert not torch.allclose(first[:, :, 0], second[:, :, 0])


def test_times_may_differ_between_agents_and_scenes() -> None:
    network, context, x = denoiser(agent_attention=False), context_of(walks()), tokens(3, 4, 12)
    memory = network.prepare(context)
    t = torch.arange(12).view(3, 4)
    mixed = network(x, t, memory)
    for value in (0, 5, 11):
        same = network(x, torch.tensor(value), memory)
        scene, agent = divmod(value, 4)
        torch.testing.assert_close(mixed[scene, agent], same[scene, agent], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(mixed[(scene + 1) % 3, agent], same[(scene + 1) % 3, agent])


def test_hidden_pasts_are_not_seen() -> None:
    network, scenes, x = denoiser(agent_attention=False).eval(), walks(), tokens(1, 3, 4, 12)
    other = replace(scenes, past=scenes.past * 3)
    hidden = torch.tensor([True, True, False])
    first, second = (
        network(x, torch.tensor(5), network.prepare(context_of(value), hidden)) for value in (scenes, other)
    )
    torch.testing.assert_close(first[:, :2], second[:, :2])
    assert not torch.allclose(first[:, 2], second[:, 2])


def test_embeddings_worked_out_per_code_are_those_of_each_token() -> None:
    part = CodeEmbedding(5, 16)
    codes = torch.randint(0, 5, (3, 7))
    torch.testing.assert_close(part(codes), part.linear(part.table(codes)) * 4)


def test_stage_two_does_not_touch_stage_one() -> None:
    torch.manual_seed(0)
    scenes = walks()
    first = TrajectoryVqVae(VqVaeConfig(width=32, heads=4, hidden=48, rank=4, num_codes=NUM_CODES))
    indices, context = first.eval().indices(scenes)
    process, network = MaskReplaceDiffusion(NUM_CODES, 50), denoiser()
    memory = network.prepare(context)
    process.training_loss(lambda x, t: network(x, t, memory), indices, mask=scenes.target_mask).backward()
    assert all(parameter.grad is None for parameter in first.parameters())
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("joint", [True, False])
def test_the_denoiser_learns_codes_that_follow_from_the_past(joint: bool) -> None:
    scenes = walks(12, 3)
    context = context_of(scenes, heading=False)
    # One code for everybody who goes right, another one for who goes left.
    goes_right = scenes.past[:, :, -1, 0] > scenes.past[:, :, 0, 0]
    codes = torch.where(goes_right, 3, 11)[..., None].expand(-1, -1, 12).contiguous()
    process, network = MaskReplaceDiffusion(NUM_CODES, 50), denoiser(agent_attention=joint)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        memory = network.prepare(context)
        loss = process.training_loss(
            lambda x, t, memory=memory: network(x, t, memory), codes, per_scene=joint, generator=generator
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    memory = network.prepare(context)
    for sampler in (process.sample, process.unmask):
        drawn = sampler(lambda x, t: network(x, t, memory), (4, 12, 3, 12), steps=5, generator=generator)
        assert (drawn == codes).float().mean() > 0.9


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="heads must divide"):
        trunk(heads=5)
