"""The instance codebook and its quantiser against the released layer, in values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neurocl.trajectory.codebook import (
    GUMBEL_TEMPERATURE,
    InstanceCodebook,
    InstanceQuantiser,
    change_rate,
    code_counts,
    codebook_terms,
    gather_codes,
    perplexity,
)
from tests.conftest import reference

CASES = ["codebook_0", "codebook_1"]
RENAMED = {
    "lora_A": "A",
    "lora_B": "B",
    "embedding.weight": "static",
    "sha.attention.fc_q": "ask_past.query",
    "sha.attention.fc_k": "ask_past.key",
    "sha.attention.fc_v": "ask_past.value",
    "sha.attention.fc_o": "ask_past.out",
    "sha.norm": "norm_past",
    "norm": "norm_past",
    "embedding_sha.attention.fc_q": "ask_rows.query",
    "embedding_sha.attention.fc_k": "ask_rows.key",
    "embedding_sha.attention.fc_v": "ask_rows.value",
    "embedding_sha.attention.fc_o": "ask_rows.out",
    "embedding_sha.norm": "norm_rows",
    "proj": "project",
    "proj_embedding": "project_code",
}


def load(name: str) -> tuple[InstanceCodebook, dict[str, Any]]:
    case = {key: torch.from_numpy(value) for key, value in reference(f"trajectory/{name}").items()}
    rank, width = case["w.lora_B"].shape
    num_codes = len(case["w.embedding.weight"])
    layer = InstanceCodebook(width, case["z"].shape[-1], num_codes, rank, int(case["n_heads"]))
    weights = {}
    for key, value in case.items():
        if key.startswith("w."):
            old = key.removeprefix("w.")
            stem, _, kind = old.rpartition(".")
            weights[RENAMED.get(old) or f"{RENAMED[stem]}.{kind}"] = value
    layer.load_state_dict(weights)
    return layer, case


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_codes_losses_and_gradients_are_those_of_the_released_layer(name: str, strength: float) -> None:
    layer, case = load(name)

    def expected(key: str) -> Tensor:
        value: Tensor = case[f"s{strength}.{key}"]
        return value

    def same(ours: Tensor, key: str) -> None:
        torch.testing.assert_close(ours, expected(key).view_as(ours), rtol=1e-5, atol=1e-5)

    z = case["z"].clone().requires_grad_()
    codebook = layer(case["ctx"][:, None], None, strength)
    same(codebook[:, 0], "codebook")
    quantiser = InstanceQuantiser(z.shape[-1], layer.num_codes)
    found = quantiser(z[:, None], codebook)
    assert torch.equal(found.indices[:, 0], expected("indices"))
    same(found.latents[:, 0], "zq")
    commitment, terms = codebook_terms(z[:, None], found.codes)
    loss = float(case["beta"]) * commitment + terms
    same(loss, "loss")
    assert perplexity(code_counts(found.indices, layer.num_codes)) == pytest.approx(
        float(expected("perplexity")), rel=1e-5
    )
    (loss + found.latents.square().mean()).backward()
    assert z.grad is not None
    same(z.grad, "grad_z")
    assert layer.static.grad is not None
    same(layer.static.grad, "grad_embedding")
    same(torch.zeros_like(layer.A) if layer.A.grad is None else layer.A.grad, "grad_A")


def test_every_part_of_the_codebook_is_trained() -> None:
    layer, case = load("codebook_0")
    found = InstanceQuantiser(8, 16)(case["z"][:, None], layer(case["ctx"][:, None], None, 1.0))
    commitment, terms = codebook_terms(case["z"][:, None], found.codes)
    (commitment + terms).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        # A bias on every key shifts all scores alike and never matters; rounding leaves some dust.
        if not name.endswith("key.bias"):
            assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("estimator", ["ste", "rotation"])
def test_slices_give_what_the_library_gives_for_everything_at_once(estimator: Any) -> None:
    from vector_quantize_pytorch import VectorQuantize

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 50, 12, 8, generator=generator).requires_grad_()
    books = torch.randn(4, 50, 16, 8, generator=generator).requires_grad_()
    ours = InstanceQuantiser(8, 16, estimator)(z, books)
    ours_terms = codebook_terms(z, ours.codes)
    target = torch.randn(4, 50, 12, 8, generator=generator)
    loss = 0.25 * ours_terms[0] + ours_terms[1] + (ours.latents - target).square().mean()
    ours_gradients = torch.autograd.grad(loss, [z, books])

    options: dict[str, Any] = {"dim": 8, "codebook_size": 16, "learnable_codebook": True, "ema_update": False}
    options["commitment_weight"] = 0.0
    codes_only = VectorQuantize(rotation_trick=False, route_gradients_to_input=False, **options)
    routed = VectorQuantize(rotation_trick=estimator == "rotation", **options)

    def per_token(_: Tensor) -> Tensor:
        return books.flatten(0, 1)[None, :, None].expand(1, -1, 12, -1, -1)

    codes, indices, _ = codes_only(z.flatten(0, 1), codebook_transform_fn=per_token)
    latents, _, _ = routed(z.flatten(0, 1), codebook_transform_fn=per_token)
    flat = z.flatten(0, 1)
    loss = 0.25 * (flat - codes.detach()).square().mean() + (codes - flat.detach()).square().mean()
    loss = loss + (latents - target.flatten(0, 1)).square().mean()
    theirs_gradients = torch.autograd.grad(loss, [z, books])
    assert torch.equal(ours.indices.flatten(0, 1), indices)
    torch.testing.assert_close(ours.latents.flatten(0, 1), latents)
    for first, second in zip(ours_gradients, theirs_gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_gumbel_draws_near_codes_in_training_and_takes_the_nearest_afterwards() -> None:
    generator = torch.Generator().manual_seed(0)
    books = torch.randn(2, 3, 4, 8, generator=generator) / 4
    z = torch.randn(2, 3, 1, 8, generator=generator).expand(-1, -1, 20_000, -1) / 4
    quantiser = InstanceQuantiser(8, 4, "gumbel")
    torch.manual_seed(0)
    drawn = quantiser(z, books)
    torch.testing.assert_close(drawn.latents, drawn.codes)
    share = torch.nn.functional.one_hot(drawn.indices, 4).double().mean(dim=2)
    likelihood = (-(z[:, :, :1] - books).square().sum(dim=-1) / GUMBEL_TEMPERATURE).softmax(dim=-1)
    torch.testing.assert_close(share, likelihood.double(), rtol=0, atol=0.02)
    assert bool(((share > 0.02).sum(dim=-1) > 1).any())

    plain, gumbel = InstanceQuantiser(8, 4)(z, books), quantiser.eval()(z, books)
    assert torch.equal(plain.indices, gumbel.indices)
    assert torch.equal(plain.latents, gumbel.latents)


def test_gumbel_takes_the_decoders_gradient_to_latents_and_codes() -> None:
    z, books = torch.randn(1, 2, 5, 8).requires_grad_(), torch.randn(1, 2, 4, 8).requires_grad_()
    for estimator, reached in (("ste", False), ("gumbel", True)):
        found = InstanceQuantiser(8, 4, estimator)(z, books)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(found.latents.square().sum(), [z, books], allow_unused=True)
        assert gradients[0] is not None
        assert (gradients[1] is not None) == reached


def test_dead_codes_begin_again_beside_busy_ones_for_every_agent() -> None:
    torch.manual_seed(0)
    layer, tokens = InstanceCodebook(32, 8, 6, 4, 4), torch.randn(3, 2, 8, 32)
    before = layer(tokens, None, 1.0)
    counts = torch.tensor([50.0, 0.0, 0.0, 50.0, 1.0, 3.0])  # an equal share is 17.3
    assert layer.revive(counts, torch.Generator().manual_seed(0)) == 3
    after = layer(tokens, None, 1.0)
    for code in (0, 3, 5):
        torch.testing.assert_close(after[:, :, code], before[:, :, code])
    apart = (after[:, :, [1, 2, 4], None] - before[:, :, None, [0, 3, 5]]).norm(dim=-1)
    nearest = apart.amin(dim=-1)
    assert (nearest > 0).all()
    assert (nearest < 0.1 * torch.cdist(before, before)[before.new_ones(3, 2, 6, 6).bool()].mean()).all()
    assert (apart.argmin(dim=-1) == apart.argmin(dim=-1)[:1, :1]).all()  # the same one for every agent


def test_nothing_changes_where_no_code_is_dead() -> None:
    layer = InstanceCodebook(32, 8, 6, 0, 4)
    static = layer.static.clone()
    assert layer.revive(torch.full((6,), 7), torch.Generator()) == 0
    assert layer.revive(torch.zeros(6), torch.Generator()) == 0
    assert torch.equal(layer.static, static)


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_the_change_has_the_rank_it_is_given(rank: int) -> None:
    torch.manual_seed(0)
    layer = InstanceCodebook(32, 8, 16, rank, 4)
    change = layer.change(torch.randn(5, 7, 32), None)
    assert (torch.linalg.matrix_rank(change, rtol=1e-4) <= rank).all()


def test_without_strength_or_rank_all_agents_share_one_codebook() -> None:
    tokens = torch.randn(2, 3, 8, 32)
    plain = InstanceCodebook(32, 8, 16, 0, 4)(tokens, None, 1.0)
    layer = InstanceCodebook(32, 8, 16, 4, 4)
    for books in (plain, layer(tokens, None, 0.0)):
        assert books.shape == (2, 3, 16, 8)
        assert torch.equal(books, books[:1, :1].expand(2, 3, -1, -1))
    apart = layer(tokens, None, 1.0)
    assert not torch.allclose(apart[0, 0], apart[1, 2])


def test_steps_that_were_not_seen_do_not_reach_the_codebook() -> None:
    layer = InstanceCodebook(32, 8, 16, 4, 4)
    tokens, mask = torch.randn(1, 2, 8, 32), torch.ones(1, 2, 8, dtype=torch.bool)
    mask[:, :, :3] = False
    spoilt = tokens.clone()
    spoilt[:, :, :3] = 1e3
    torch.testing.assert_close(layer(tokens, mask, 1.0), layer(spoilt, mask, 1.0))
    assert torch.isfinite(layer(tokens, torch.zeros_like(mask), 1.0)).all()


def test_codes_of_samples_are_gathered_from_each_agents_own_codebook() -> None:
    books = torch.randn(2, 3, 16, 8)
    indices = torch.randint(0, 16, (5, 2, 3, 7))
    codes = gather_codes(books, indices)
    for sample, scene, agent, step in ((0, 0, 0, 0), (4, 1, 2, 6), (2, 0, 1, 3)):
        expected = books[scene, agent, indices[sample, scene, agent, step]]
        assert torch.equal(codes[sample, scene, agent, step], expected)


def test_perplexity_counts_codes_in_use_and_the_change_rate_counts_switches() -> None:
    indices = torch.tensor([[[0, 0, 1, 1], [2, 3, 2, 3]]])
    assert perplexity(code_counts(indices, 8)) == pytest.approx(4)
    assert change_rate(indices) == pytest.approx(4 / 6)
    mask = torch.tensor([[[True] * 4, [False] * 4]])
    assert perplexity(code_counts(indices, 8, mask)) == pytest.approx(2)
    assert change_rate(indices, mask) == pytest.approx(1 / 3)


def test_a_rank_above_the_number_of_codes_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be between 0"):
        InstanceCodebook(32, 8, 16, 17, 4)
