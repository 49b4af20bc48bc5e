"""Stage 1: symmetries, masks, units, gradients, and that it learns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from neurocl.config import validate
from neurocl.errors import UserError
from neurocl.trajectory.scenes import Scenes
from neurocl.trajectory.vqvae import (
    Context,
    TrajectoryVqVae,
    VqVaeConfig,
    heading_frame,
    last_seen,
    reconstruction,
    steps_between,
)
from tests.trajectory.scene_examples import padded, permuted, walks

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "faithful": {"num_codes": 16, "decoder_cross_attention": False, "geometry": False, "heading": False},
    "static": {"rank": 0},
    "sports": {"absolute": True, "heading": False, "layers": 2},
}


def model(seed: int = 0, **options: Any) -> TrajectoryVqVae:
    torch.manual_seed(seed)
    small: dict[str, Any] = {"width": 32, "heads": 4, "hidden": 48, "rank": 4, "dropout": 0.0}
    return TrajectoryVqVae(VqVaeConfig(**(small | options)))


def with_gaps(scenes: Scenes) -> Scenes:
    """One agent appears late, one has a gap in the middle, one leaves and has no future."""
    past_mask, future_mask = scenes.past_mask.clone(), scenes.future_mask.clone()
    past_mask[0, 0, :5] = False
    past_mask[0, 1, 3:5] = False
    past_mask[1, 0, 6:] = False
    future_mask[1, 0] = False
    target_mask = scenes.target_mask.clone()
    target_mask[0, 0] = target_mask[1, 0] = False
    return replace(scenes, past_mask=past_mask, future_mask=future_mask, target_mask=target_mask)


def test_the_model_of_the_paper_has_about_as_many_parameters_as_its_clean_version() -> None:
    network = TrajectoryVqVae(VqVaeConfig.faithful())
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert trained == pytest.approx(220_000, rel=0.15)
    config = VqVaeConfig.faithful(rank=4)
    assert (config.num_codes, config.rank, config.geometry, config.decoder_cross_attention) == (16, 4, False, False)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_in_use_gets_a_gradient(name: str) -> None:
    network = model(**VARIANTS[name])
    sum(network(walks()).losses.values()).backward()  # type: ignore[attr-defined]
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key
    if network.codebook.rank:
        for part in (network.codebook.A, network.codebook.B, network.codebook.ask_past.query.weight):
            assert part.grad is not None
            assert part.grad.abs().max() > 0
    assert network.codebook.static.grad is not None
    assert network.codebook.static.grad.abs().max() > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_agents_in_another_order_come_out_in_that_order(name: str) -> None:
    network, scenes = model(**VARIANTS[name]).eval(), with_gaps(walks())
    order = torch.tensor([2, 0, 3, 1])
    first, second = network(scenes), network(permuted(scenes, order))
    torch.testing.assert_close(first.reconstruction[:, order], second.reconstruction, rtol=1e-4, atol=1e-5)
    assert torch.equal(first.indices[:, order], second.indices)
    for key, value in first.losses.items():
        torch.testing.assert_close(value, second.losses[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_agents_that_do_not_exist_change_nothing(name: str) -> None:
    network, scenes = model(**VARIANTS[name]).eval(), with_gaps(walks())
    first, second = network(scenes), network(padded(scenes, 3))
    torch.testing.assert_close(first.reconstruction, second.reconstruction[:, :4], rtol=1e-4, atol=1e-5)
    for key, value in first.losses.items():
        torch.testing.assert_close(value, second.losses[key], rtol=1e-4, atol=1e-6)
    assert torch.equal(first.counts, second.counts)
    assert torch.isfinite(second.reconstruction).all()


def test_a_scene_alone_gives_what_it_gives_in_a_batch() -> None:
    network, scenes = model().eval(), walks()
    together = network(scenes).reconstruction
    alone = torch.cat([network(scenes.subset([row])).reconstruction for row in range(len(scenes))])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "moves"), [("default", True), ("faithful", True), ("sports", False)])
def test_moving_a_scene_moves_its_forecast_unless_the_field_matters(name: str, moves: bool) -> None:
    network, scenes = model(**VARIANTS[name]).eval(), walks()
    shift = torch.tensor([8.0, -4.0])
    moved = replace(scenes, past=scenes.past + shift, future=scenes.future + shift)
    first, second = network.encode_context(scenes), network.encode_context(moved)
    torch.testing.assert_close(second.anchor, first.anchor + shift)
    assert torch.allclose(first.codebook, second.codebook, atol=1e-4) == moves


@pytest.mark.parametrize(("name", "turns"), [("default", True), ("faithful", False), ("sports", False)])
def test_turning_a_scene_turns_its_reconstruction_unless_axes_matter(name: str, turns: bool) -> None:
    network, scenes = model(**VARIANTS[name]).eval(), walks()
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    turned = replace(scenes, past=scenes.past @ turn.mT, future=scenes.future @ turn.mT)
    first, second = network(scenes), network(turned)
    assert torch.equal(first.indices, second.indices) == turns
    if turns:
        torch.testing.assert_close(first.reconstruction @ turn.mT, second.reconstruction, rtol=1e-3, atol=1e-4)


def test_an_agent_has_the_heading_of_its_last_moves() -> None:
    moves = torch.tensor(
        [[[[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], [[0.0, 0.0]] * 3, [[9.0, 0.0], [0.0, 0.0], [0.0, 9.0]]]]
    )
    frame = heading_frame(moves)
    torch.testing.assert_close(frame[0, 0], torch.tensor([[0.6, 0.8], [-0.8, 0.6]]))
    torch.testing.assert_close(frame[0, 1], torch.eye(2))
    torch.testing.assert_close(frame[0, 2, 0], torch.tensor([1.0, 4.0]) / 17**0.5)
    torch.testing.assert_close(frame @ frame.mT, torch.eye(2).expand_as(frame))


def test_reconstruction_is_the_mean_over_all_agents_however_they_are_batched() -> None:
    network, scenes = model().eval(), with_gaps(walks(7))
    whole = network(scenes)
    known = scenes.future_mask & scenes.target_mask[..., None]
    missed = (whole.reconstruction + last_seen(scenes.past, scenes.past_mask)[:, :, None] - scenes.future).norm(dim=-1)
    for size in (2, 7):
        found = reconstruction(network, scenes, batch_size=size)
        assert found.ade == pytest.approx(float(missed[known].mean()), rel=1e-5)
        assert found.fde == pytest.approx(float(missed[..., -1][known[..., -1]].mean()), rel=1e-5)
        share = whole.indices[known].bincount(minlength=64).double() / known.sum()
        assert found.perplexity == pytest.approx(float(torch.exp(torch.special.entr(share).sum())), rel=1e-9)


def test_only_targets_are_forecast_and_the_others_are_seen() -> None:
    network, scenes = model().eval(), walks()
    targets = scenes.target_mask.clone()
    targets[:, 2:] = False
    few = replace(scenes, target_mask=targets)
    output = network(few)
    assert output.reconstruction.shape[1] == 2
    unknown = replace(few, future=few.future.index_fill(1, torch.tensor([2, 3]), torch.nan))
    torch.testing.assert_close(network(unknown).reconstruction, output.reconstruction)
    elsewhere = replace(few, past=few.past + torch.tensor([0.0, 0.0, 5.0, 5.0])[:, None, None])
    assert not torch.allclose(network(elsewhere).reconstruction, output.reconstruction)


def test_the_faithful_model_does_not_see_where_agents_stand_to_each_other() -> None:
    scenes = walks()
    apart = scenes.past.clone()
    apart[:, 1] += 50
    for name, blind in (("faithful", True), ("default", False)):
        network = model(**VARIANTS[name]).eval()
        first, second = (network.encode_context(replace(scenes, past=past)) for past in (scenes.past, apart))
        assert torch.allclose(first.tokens, second.tokens, atol=1e-4) == blind


def test_values_that_were_not_seen_do_not_matter() -> None:
    network, scenes = model().eval(), with_gaps(walks())
    spoilt = replace(
        scenes,
        past=torch.where(scenes.past_mask[..., None], scenes.past, torch.tensor(torch.nan)),
        future=torch.where(scenes.future_mask[..., None], scenes.future, torch.tensor(torch.nan)),
    )
    first, second = network(scenes), network(spoilt)
    torch.testing.assert_close(first.losses, second.losses)
    torch.testing.assert_close(first.reconstruction, second.reconstruction)


def test_an_agent_nobody_saw_gives_finite_numbers_and_gradients() -> None:
    network, scenes = model(), walks()
    scenes = replace(scenes, past_mask=scenes.past_mask.clone(), target_mask=scenes.target_mask.clone())
    scenes.past_mask[0, 2] = False
    scenes.target_mask[0, 2] = False
    out = network(scenes)
    sum(out.losses.values()).backward()
    assert torch.isfinite(out.reconstruction).all()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_a_batch_without_targets_has_no_loss() -> None:
    scenes = walks()
    out = model()(replace(scenes, target_mask=torch.zeros_like(scenes.target_mask)))
    assert all(value.item() == 0 for value in out.losses.values())


def test_the_scale_changes_units_and_nothing_else() -> None:
    scenes = walks()
    large = replace(scenes, past=scenes.past * 50, future=scenes.future * 50)
    first, second = model()(scenes), model(scale=50.0)(large)
    torch.testing.assert_close(second.reconstruction, first.reconstruction * 50, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(second.losses, first.losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second.ade, first.ade * 50, rtol=1e-4, atol=1e-4)


def test_losses_are_those_of_the_definition() -> None:
    network, scenes = model().eval(), walks()
    out = network(scenes, strength=0.7, weight=0.3)
    context = network.encode_context(scenes, 0.7)
    latents = network.encode_future(scenes, context)
    codes = network.quantise(latents, context).codes
    truth = scenes.future - scenes.past[:, :, -1:]
    expected = {
        "reconstruction": (out.reconstruction - truth).norm(dim=-1).mean(),
        "commitment": 0.3 * 0.25 * (latents - codes).square().mean(),
        "codebook": 0.3 * (latents - codes).square().mean(),
    }
    torch.testing.assert_close(out.losses, expected)


def test_without_strength_the_context_gives_one_codebook_to_all() -> None:
    books = model().eval().encode_context(walks(), strength=0.0).codebook
    assert torch.equal(books, books[:1, :1].expand_as(books))


def test_sampled_codes_are_decoded_as_the_encoder_meant_them() -> None:
    network, scenes = model().eval(), walks()
    indices, context = network.indices(scenes)
    out = network(scenes)
    assert torch.equal(indices, out.indices)
    samples = torch.stack([indices, (indices + 1) % 64, indices])
    decoded = network.decode_indices(samples, context)
    torch.testing.assert_close(decoded[0], out.reconstruction, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoded[2], decoded[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(decoded[1], decoded[0])


def test_a_detached_context_keeps_gradients_out_of_stage_one() -> None:
    context = model().encode_context(walks()).detach()
    assert isinstance(context, Context)
    assert not any(value.requires_grad for value in vars(context).values() if isinstance(value, torch.Tensor))


def test_the_state_of_the_model_can_be_loaded_again() -> None:
    first, second = model(0), model(1)
    second.load_state_dict(first.state_dict())
    scenes = walks()
    torch.testing.assert_close(first(scenes).reconstruction, second(scenes).reconstruction)


def test_the_last_step_seen_and_the_moves_between_steps() -> None:
    position = torch.arange(10.0).view(1, 1, 5, 2)
    seen = torch.tensor([[[True, True, False, True, False]]])
    assert last_seen(position, seen).tolist() == [[[6.0, 7.0]]]
    assert last_seen(position, torch.zeros_like(seen)).tolist() == [[[0.0, 0.0]]]
    assert steps_between(position, seen)[0, 0].tolist() == [[0, 0], [2, 2], [0, 0], [0, 0], [0, 0]]


def test_a_short_training_reconstructs_better_and_uses_many_codes() -> None:
    network, scenes = model(num_codes=32), walks(8, 4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, betas=(0.5, 0.9))
    history = []
    for _ in range(80):
        out = network(scenes)
        loss = sum(out.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(out.ade))
    assert history[-1] < 0.25 * history[0]
    assert int((out.counts > 0).sum()) > 4


@pytest.mark.parametrize(
    ("options", "message"),
    [({"width": 30, "heads": 4}, "heads must divide"), ({"num_codes": 4, "rank": 5}, "rank must be at most")],
)
def test_shapes_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(VqVaeConfig, options)
