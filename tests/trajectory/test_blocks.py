"""Attention on dense scenes against the same written with flat agents and one block-diagonal mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from neurocl.trajectory.blocks import (
    NUM_RELATIONS,
    AdaptiveNorm,
    Attention,
    GeometryEncoder,
    LayerMemory,
    LinearEmbedding,
    SceneLayer,
    SceneStack,
    relations,
    sinusoidal_positions,
)
from neurocl.trajectory.vqvae import heading_frame


def plain_attention(
    part: Attention, query: Tensor, memory: Tensor, allowed: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Textbook attention over [L, d] and [M, d] with a mask [L, M] and a bias [h, L, M]."""
    size = query.shape[1] // part.heads
    out = []
    for head in range(part.heads):
        rows = slice(head * size, (head + 1) * size)
        q = query @ part.query.weight[rows].T + part.query.bias[rows]
        k = memory @ part.key.weight[rows].T + part.key.bias[rows]
        v = memory @ part.value.weight[rows].T + part.value.bias[rows]
        scores = q @ k.T / math.sqrt(size)
        weights = torch.exp(scores - scores.max()) * allowed
        total = weights.sum(dim=1, keepdim=True)
        out.append(torch.where(total > 0, weights / total.clamp(min=1e-30), 0) @ v)
    return torch.cat(out, dim=1) @ part.out.weight.T + part.out.bias


def test_positions_are_sines_and_cosines() -> None:
    table = sinusoidal_positions(7, 6)
    for position in range(7):
        for pair in range(3):
            angle = position / 10_000 ** (2 * pair / 6)
            assert float(table[position, 2 * pair]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(table[position, 2 * pair + 1]) == pytest.approx(math.cos(angle), abs=1e-6)


def test_embeddings_are_scaled_by_the_root_of_the_width() -> None:
    layer = LinearEmbedding(2, 16, 5)
    x = torch.randn(3, 4, 2)
    expected = layer.linear(x) * 4 + sinusoidal_positions(5, 16)[:4]
    torch.testing.assert_close(layer(x), expected)
    plain = LinearEmbedding(2, 16, 5, scaled=False)
    torch.testing.assert_close(plain(x), plain.linear(x) + sinusoidal_positions(5, 16)[:4])


@pytest.mark.parametrize("absorb", [False, True])
def test_attention_to_a_prepared_memory_is_plain_attention(absorb: bool) -> None:
    torch.manual_seed(0)
    part = Attention(32, 4)
    x, memory = torch.randn(5, 9, 32), torch.randn(5, 7, 32)
    mask = torch.rand(5, 7) < 0.6
    mask[2] = False
    ours = part.attend(x, part.prepare(memory, mask, absorb=absorb))
    unmasked = part.attend(x, part.prepare(memory, None, absorb=absorb))
    for row in range(5):
        expected = plain_attention(part, x[row], memory[row], mask[row].expand(9, -1))
        torch.testing.assert_close(ours[row], expected)
        torch.testing.assert_close(part(x, memory, mask)[row], expected)
        torch.testing.assert_close(unmasked[row], plain_attention(part, x[row], memory[row], torch.ones(9, 7)))
    # Nothing to see: only the bias of the output map is left.
    torch.testing.assert_close(ours[2], part.out.bias.expand(9, -1))


def test_flat_agents_under_a_block_diagonal_mask_give_the_same_numbers() -> None:
    torch.manual_seed(0)
    part = Attention(32, 4)
    sizes = [3, 1, 4]
    scene = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    flat = torch.randn(8, 5, 32)  # agents, time, width
    block = (scene[:, None] == scene[None]).float()
    expected = torch.stack([plain_attention(part, flat[:, t], flat[:, t], block) for t in range(5)], dim=1)

    dense, mask = torch.full((3, 4, 5, 32), 1e3), torch.zeros(3, 4, 1, dtype=torch.bool)
    for index, size in enumerate(sizes):
        dense[index, :size], mask[index, :size] = flat[scene == index], True
    ours = part.among_agents(dense, mask, None)
    for index, size in enumerate(sizes):
        torch.testing.assert_close(ours[index, :size], expected[scene == index])
    assert torch.isfinite(ours).all()


def test_geometry_is_a_bias_on_the_scores_and_a_value_per_pair() -> None:
    torch.manual_seed(0)
    part, encoder = Attention(16, 2), GeometryEncoder(16, 2)
    x = torch.randn(1, 4, 3, 16)
    related = relations(torch.randn(1, 4, 2), torch.randn(1, 4, 2))
    geometry = encoder(related)
    ours = part.among_agents(x, None, geometry)
    for row in range(3):
        rows = x[0, :, row]
        beside = []
        for head in range(2):
            cut = slice(8 * head, 8 * head + 8)
            q = rows @ part.query.weight[cut].T + part.query.bias[cut]
            k = rows @ part.key.weight[cut].T + part.key.bias[cut]
            v = rows @ part.value.weight[cut].T + part.value.bias[cut]
            weights = (q @ k.T / math.sqrt(8) + geometry.bias[0, head]).softmax(dim=1)
            pairs = v[None] + geometry.values[0, head]  # what i hears from j
            beside.append((weights[..., None] * pairs).sum(dim=1))
        expected = torch.cat(beside, dim=1) @ part.out.weight.T + part.out.bias
        torch.testing.assert_close(ours[0, :, row], expected)


def test_relations_are_seen_from_the_first_agent_and_do_not_move_with_the_scene() -> None:
    position, velocity = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    related = relations(position, velocity)
    torch.testing.assert_close(related[0, 0, 1], torch.tensor([3.0, 4.0, 5.0, -1.0, 0.0, 3 / 5.001, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(related[0, 1, 0, :2], torch.tensor([-3.0, -4.0]))
    torch.testing.assert_close(relations(position + 7, velocity), related)


def test_an_agent_looks_at_itself_and_those_nearest_to_it_who_are_there() -> None:
    position = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [2.5, 0.0], [9.0, 0.0], [0.1, 0.0]]])
    present = torch.tensor([[True, True, True, True, False]])
    looks = relations(position, torch.zeros_like(position), present=present, neighbours=2)[0, ..., -1]
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1.0]])
    assert torch.equal(looks[:4, :4], expected)
    assert not bool(looks[:4, 4].any())


def test_whom_one_does_not_look_at_does_not_matter() -> None:
    torch.manual_seed(0)
    layer = SceneLayer(16, 4, 32, 0.0, geometry=True)
    position, velocity = 3 * torch.randn(2, 6, 2), torch.randn(2, 6, 2)
    related = relations(position, velocity, neighbours=3)
    x = torch.randn(2, 6, 1, 4, 16)
    memory = layer.prepare(torch.zeros(2, 6, 1, 16), None, related)
    plain = layer(x, memory=memory)
    for row in range(2):
        unseen = int((related[row, 0, :, -1] == 0).nonzero()[0])
        other = x.clone()
        other[row, unseen] += 1
        changed = layer(other, memory=memory)
        torch.testing.assert_close(changed[row, 0], plain[row, 0], rtol=0, atol=0)
        assert not torch.allclose(changed[row, unseen], plain[row, unseen])


def test_relations_in_the_agents_own_axes_do_not_turn_with_the_scene() -> None:
    position, velocity = torch.randn(2, 5, 2), torch.randn(2, 5, 2)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    first = relations(position, velocity, heading_frame(velocity[:, :, None]))
    turned = velocity @ turn.mT
    second = relations(position @ turn.mT, turned, heading_frame(turned[:, :, None]))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    # Of itself an agent sees that it goes along its own x axis.
    own = first.diagonal(dim1=1, dim2=2)[:, 6:8]
    torch.testing.assert_close(own[:, 0], velocity.norm(dim=-1))
    torch.testing.assert_close(own[:, 1], torch.zeros(2, 5), rtol=0, atol=1e-6)


def layer_options() -> list[dict[str, bool]]:
    return [
        {},
        {"agents": False},
        {"cross": True},
        {"cross": True, "geometry": True},
        {"cross": True, "agents": False, "adaptive": True},
        {"cross": True, "geometry": True, "adaptive": True},
    ]


@pytest.mark.parametrize("options", layer_options())
def test_samples_do_not_influence_each_other(options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stack = SceneStack(2, 16, 4, 32, 0.0, **options)
    x, past = torch.randn(2, 3, 5, 6, 16), torch.randn(2, 3, 4, 16)
    related = relations(torch.randn(2, 3, 2), torch.randn(2, 3, 2))
    condition = torch.randn(16) if options.get("adaptive") else None
    seen = torch.rand(2, 3, 4) < 0.7
    outputs: list[Any] = []
    for absorb in (False, True):
        memory = stack.prepare(past, seen, related, absorb=absorb)
        outputs.append(stack(x, memory, condition=condition))
        outputs.append(torch.cat([stack(one, memory, condition=condition) for one in x.split(1, dim=2)], dim=2))
        monkeypatch.setattr("neurocl.trajectory.blocks.TOKENS_ON_CPU", 72)
        outputs.append(stack(x, memory, condition=condition))
        monkeypatch.undo()
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-5)


def test_a_layer_is_its_parts_in_order_with_the_norm_after_each() -> None:
    torch.manual_seed(0)
    layer = SceneLayer(16, 4, 32, 0.0, cross=True)
    x, past = torch.randn(2, 3, 1, 6, 16), torch.randn(2, 3, 4, 16)
    memory = layer.prepare(past, None, None)
    y = x[:, :, 0]
    assert layer.cross is not None
    assert layer.agents is not None
    norms = list(layer.norms)
    rows = y.flatten(0, 1)
    y = norms[0](y + layer.time(rows, rows).view_as(y))
    y = norms[1](y + layer.cross(y.flatten(0, 1), past.flatten(0, 1)).view_as(y))
    y = norms[2](y + layer.agents.among_agents(y, None, None))
    y = norms[3](y + layer.fall(torch.relu(layer.rise(y))))
    torch.testing.assert_close(layer(x, memory=memory)[:, :, 0], y)
    with pytest.raises(ValueError, match="there is none"):
        layer(x, memory=LayerMemory(None, None))


def test_a_causal_layer_does_not_look_ahead() -> None:
    layer = SceneLayer(16, 4, 32, 0.0, causal=True)
    x = torch.randn(1, 2, 1, 6, 16)
    later = x.clone()
    later[..., 4:, :] += 1
    torch.testing.assert_close(layer(x)[..., :4, :], layer(later)[..., :4, :])
    assert not torch.allclose(layer(x)[..., 4:, :], layer(later)[..., 4:, :])


def test_one_condition_for_all_is_the_same_as_one_for_each() -> None:
    norm = AdaptiveNorm(16)
    x, condition = torch.randn(2, 3, 4, 5, 16), torch.randn(16)
    torch.testing.assert_close(norm(x, condition), norm(x, condition.expand(2, 3, 1, 1, -1)))


def test_masked_steps_and_agents_give_no_nan_and_no_gradient_trouble() -> None:
    layer = SceneLayer(16, 4, 32, 0.0, cross=True, geometry=True)
    x, past = torch.randn(2, 3, 1, 6, 16, requires_grad=True), torch.randn(2, 3, 4, 16)
    nothing = torch.zeros(2, 3, 6, dtype=torch.bool)
    memory = layer.prepare(past, nothing[..., :4], torch.randn(2, 3, 3, NUM_RELATIONS + 1))
    out = layer(x, time_mask=nothing, agent_mask=nothing, memory=memory)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="heads must divide"):
        Attention(16, 3)
