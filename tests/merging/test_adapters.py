"""Merges of LoRA layers: exactness, PEFT's rules, KnOTS and the core space."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neurocl.errors import UserError
from neurocl.merging.adapters import (
    ADAPTER_MERGES,
    LoraLayer,
    core_space_merge,
    lora_cat,
    lora_dare,
    lora_linear,
    lora_magnitude,
    lora_svd,
    lora_ties,
    merge_adapters,
)
from neurocl.merging.iso import iso_c
from neurocl.merging.knots import core_space, knots, merge_in_core_space, shared_svd
from neurocl.merging.ties import ties
from neurocl.merging.tsv import tsv_merge
from neurocl.merging.wudi import wudi
from tests.conftest import reference


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def lora(outputs: int, inputs: int, rank: int, seed: int, scaling: float = 2.0) -> LoraLayer:
    return LoraLayer(random(rank, inputs, seed=2 * seed), random(outputs, rank, seed=2 * seed + 1), scaling)


def layers(ranks: tuple[int, ...] = (2, 3, 4), outputs: int = 12, inputs: int = 10) -> list[LoraLayer]:
    return [lora(outputs, inputs, rank, seed, 0.5 + seed) for seed, rank in enumerate(ranks)]


def weighted_sum(members: list[LoraLayer], weights: list[float]) -> Tensor:
    return sum((weight * layer.delta() for layer, weight in zip(members, weights, strict=True)), torch.zeros(()))


def close(actual: Tensor, expected: Any, tolerance: float) -> None:
    actual, expected = actual.double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm()


class Case:
    def __init__(self, name: str) -> None:
        data = reference("merging-baselines/lora")
        self.data = {
            key.removeprefix(f"x/{name}/"): value for key, value in data.items() if key.startswith(f"x/{name}/")
        }
        self.weights = [float(weight) for weight in self.data["weights"]]
        self.layers = [
            LoraLayer(torch.from_numpy(self.data[f"A{i}"]), torch.from_numpy(self.data[f"B{i}"]), float(scaling))
            for i, scaling in enumerate(self.data["scaling"])
        ]

    @property
    def rounded(self) -> list[LoraLayer]:
        """The updates as the float64 references started from them: dense products rounded to float32."""
        return [as_layer(layer.delta(torch.float32)) for layer in self.layers]


def as_layer(update: Tensor) -> LoraLayer:
    return LoraLayer(update.double(), torch.eye(len(update), dtype=torch.float64))


@pytest.fixture(params=["l1", "l2"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_cat_reproduces_the_reference(case: Case) -> None:
    merged = lora_cat(case.layers, weights=case.weights)
    close(merged.A, case.data["cat_A"], 1e-6)
    close(merged.B, case.data["cat_B"], 1e-6)
    close(merged.delta(), case.data["cat_delta"], 1e-6)
    assert merged.A.dtype == torch.float32


def test_svd_reproduces_the_best_approximation_of_the_reference(case: Case) -> None:
    rank = max(layer.rank for layer in case.layers)
    expected = case.data[f"svd_best_rank{rank}"]
    close(lora_svd(case.layers, weights=case.weights).delta(), expected, 1e-6)
    total = torch.from_numpy(case.data["cat_delta"])
    close(lora_svd([as_layer(total)], rank=rank).delta(), expected, 1e-10)


def test_linear_ties_and_magnitude_reproduce_peft() -> None:
    case = Case("l1")
    merges = {
        "linear_{}": lora_linear(case.layers, weights=case.weights),
        "ties_{}_total_d0.5": lora_ties(case.layers, weights=case.weights, density=0.5),
        "ties_{}_frequency_d0.5": lora_ties(case.layers, weights=case.weights, density=0.5, sign="frequency"),
        "magprune_{}_d0.5": lora_magnitude(case.layers, weights=case.weights),
    }
    for key, merged in merges.items():
        close(merged.A, case.data[key.format("A")], 1e-6)
        close(merged.B, case.data[key.format("B")], 1e-6)


@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_knots_reproduces_the_reference(case: Case, combine: Any) -> None:
    for members, tolerance in ((case.rounded, 1e-10), (case.layers, 1e-6)):
        close(shared_svd(members)[2], case.data["knots_singular_values"], tolerance)
        [merged] = knots([members], combine=combine)
        close(0.6 * merged.delta(), case.data[f"knots_ties_top20_{combine}_scale0.6"], tolerance)


def test_cat_is_the_exact_sum_of_updates() -> None:
    members, weights = layers(), [0.7, -0.4, 1.1]
    merged = lora_cat(members, weights=weights)
    assert (merged.rank, merged.scaling) == (9, 1.0)
    torch.testing.assert_close(merged.delta(), weighted_sum(members, weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [9, 30])
def test_svd_at_the_sum_of_the_ranks_is_exact(rank: int) -> None:
    members, weights = layers(), [0.7, -0.4, 1.1]
    merged = lora_svd(members, weights=weights, rank=rank)
    assert merged.rank == 9
    torch.testing.assert_close(merged.delta(), weighted_sum(members, weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_error_of_svd_is_the_tail_of_the_spectrum(rank: int) -> None:
    total = weighted_sum(layers(), [1.0] * 3)
    error = (lora_svd(layers(), rank=rank).delta() - total).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(total)[rank:].norm())


def test_svd_has_the_largest_rank_of_the_inputs_by_default() -> None:
    assert lora_svd(layers()).rank == 4


def test_svd_takes_more_factors_than_the_matrix_has_rows() -> None:
    members = layers((4, 4, 4), outputs=5, inputs=7)
    torch.testing.assert_close(lora_svd(members, rank=5).delta(), weighted_sum(members, [1.0] * 3))


EXACT_FOR_ONE = [name for name, merge in ADAPTER_MERGES.items() if merge.returns_single]


@pytest.mark.parametrize("name", EXACT_FOR_ONE)
def test_merging_one_adapter_returns_its_update(name: str) -> None:
    adapter = {"q": lora(12, 10, 3, seed=1)}
    torch.testing.assert_close(merge_adapters([adapter], name)["q"].delta(), adapter["q"].delta())


@pytest.mark.parametrize("name", ["lora-ties", "lora-magnitude", "lora-dare", "knots"])
def test_keeping_every_entry_of_one_adapter_returns_its_update(name: str) -> None:
    adapter = {"q": lora(12, 10, 3, seed=1), "v": lora(5, 4, 2, seed=2)}
    merged = merge_adapters([adapter], name, density=1.0)
    for layer, original in adapter.items():
        torch.testing.assert_close(merged[layer].delta(), original.delta())


def test_the_order_of_the_adapters_matters_only_where_it_is_said_to() -> None:
    adapters = [{"q": layer} for layer in layers((3, 3, 3))]
    assert [name for name, merge in ADAPTER_MERGES.items() if merge.order_matters] == ["lora-dare"]
    for name in ADAPTER_MERGES.keys() - {"lora-dare"}:
        one, other = (merge_adapters(order, name)["q"].delta() for order in (adapters, adapters[::-1]))
        torch.testing.assert_close(one, other, msg=name)


def test_every_merge_of_untrained_adapters_changes_nothing() -> None:
    # B starts at zero in LoRA.
    adapters = [{"q": LoraLayer(random(2, 5), torch.zeros(4, 2, dtype=torch.float64))} for _ in range(2)]
    for name in ADAPTER_MERGES:
        merged = merge_adapters(adapters, name)["q"].delta()
        assert merged.shape == (4, 5), name
        assert not merged.any(), name


def test_linear_has_cross_terms() -> None:
    first, second = layers((2, 2))
    first, second = LoraLayer(first.A, first.B), LoraLayer(second.A, second.B)
    merged = lora_linear([first, second]).delta()
    cross = first.B @ second.A + second.B @ first.A
    torch.testing.assert_close(merged, first.delta() + second.delta() + cross)


def test_a_negative_weight_goes_to_the_factor_a_alone() -> None:
    layer = lora(6, 5, 2, seed=3)
    merged = lora_linear([layer], weights=[-0.5])
    torch.testing.assert_close(merged.delta(), -0.5 * layer.delta())
    torch.testing.assert_close(merged.B, layer.B * (0.5 * layer.scaling) ** 0.5)


def test_dare_is_unbiased_in_each_factor_and_repeats_with_its_seed() -> None:
    layer = lora(6, 5, 2, seed=3, scaling=1.0)
    draws = torch.stack([lora_dare([layer], density=0.25, seed=seed).A for seed in range(800)])
    deviation = layer.A.abs() * (0.75 / 0.25 / 800) ** 0.5
    assert ((draws.mean(dim=0) - layer.A).abs() <= 4 * deviation).all()
    assert torch.equal(lora_dare([layer], seed=7, name="q").B, lora_dare([layer], seed=7, name="q").B)
    assert not torch.equal(lora_dare([layer], seed=7, name="q").B, lora_dare([layer], seed=7, name="v").B)


def test_dare_before_ties_merges_what_was_left() -> None:
    layer = lora(6, 5, 2, seed=3, scaling=1.0)
    plain, elected = lora_dare([layer], density=0.5), lora_dare([layer], density=0.5, then="ties")
    torch.testing.assert_close(elected.A, plain.A)
    assert torch.isin(plain.A, torch.cat([2 * layer.A.flatten(), torch.zeros(1).double()])).all()


def test_layers_of_the_same_adapter_are_dropped_independently_of_each_other() -> None:
    adapter = {"q": lora(6, 5, 2, seed=3), "v": lora(6, 5, 2, seed=4)}
    alone = merge_adapters([{"v": adapter["v"]}], "lora-dare")["v"]
    assert torch.equal(merge_adapters([adapter], "lora-dare")["v"].A, alone.A)


def test_the_shared_basis_holds_every_update() -> None:
    members = layers()
    basis, parts, values = shared_svd(members)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(9, dtype=torch.float64))
    for part, layer in zip(parts, members, strict=True):
        torch.testing.assert_close(basis @ part, layer.delta())
    side_by_side = torch.cat([layer.delta() for layer in members], dim=1)
    torch.testing.assert_close(values, torch.linalg.svdvals(side_by_side)[:9])


def test_knots_trims_all_layers_together() -> None:
    large, small = lora(6, 5, 2, seed=1, scaling=100.0), lora(6, 5, 2, seed=2, scaling=0.01)
    first, second = knots([[large], [small]], density=0.4)
    assert first.delta().any()
    assert not second.delta().any()


def test_knots_of_several_layers_is_ties_on_their_flattened_parts() -> None:
    places = [layers((2, 3)), layers((3, 1), outputs=7, inputs=8)]
    shared = [shared_svd(members) for members in places]
    flat = torch.cat([parts.flatten(1) for _, parts, _ in shared], dim=1)
    merged = ties(torch.zeros_like(flat[0]), flat, weights=torch.tensor([1.0, 0.5]), density=0.3)
    pieces = merged.split([parts[0].numel() for _, parts, _ in shared])
    for layer, (basis, parts, _), piece in zip(
        knots(places, weights=[1.0, 0.5], density=0.3), shared, pieces, strict=True
    ):
        torch.testing.assert_close(layer.delta(), basis @ piece.view_as(parts[0]))


def test_knots_can_drop_entries_at_random_and_limit_the_rank() -> None:
    places = [layers((3, 3))]
    [merged] = knots(places, density=1.0, drop=0.5, combine="sum", rank=2)
    assert merged.rank == 2
    assert torch.equal(merged.A, knots(places, density=1.0, drop=0.5, combine="sum", rank=2)[0].A)
    assert knots([]) == []


def test_the_core_space_loses_nothing() -> None:
    members = layers()
    space = core_space(members)
    assert space.cores.shape == (3, 9, 9)
    for core, layer in zip(space.cores, members, strict=True):
        torch.testing.assert_close(space.lift(core).delta(), layer.delta())


def test_the_core_space_is_no_larger_than_what_the_adapters_reach() -> None:
    layer = lora(12, 10, 3, seed=1)
    assert core_space([layer, layer]).cores.shape == (2, 3, 3)


@pytest.mark.parametrize("function", [tsv_merge, wudi])
def test_merges_that_rotate_with_their_input_agree_in_core_and_full_space(function: Any) -> None:
    members = layers((3, 3, 3))
    options = {"solver": "closed"} if function is wudi else {"rank_fraction": 0.3}
    dense = torch.stack([layer.delta() for layer in members])
    core_options = {"solver": "closed"} if function is wudi else {"rank_fraction": 0.3 * 10 / 9}
    merged = merge_in_core_space(members, function.merge, options=core_options)
    torch.testing.assert_close(merged.delta(), function(torch.zeros_like(dense[0]), dense, **options))


def test_iso_c_in_core_space_is_iso_c_without_the_directions_nobody_uses() -> None:
    members, weights = layers(), [1.0, 0.5, 2.0]
    total = weighted_sum(members, weights)
    merged = core_space_merge(members, weights=weights, merge="iso-c").delta()
    expected = iso_c(torch.zeros_like(total), total.unsqueeze(0), rank_tolerance=1e-9)
    torch.testing.assert_close(merged, expected)
    assert core_space_merge(members, merge="iso-c", rank=2).rank == 2


def test_options_reach_the_merge_in_core_space_and_are_checked() -> None:
    members = layers()
    summed = core_space_merge(members, merge="iso-c", merge_options={"flatten": 0.0})
    torch.testing.assert_close(summed.delta(), weighted_sum(members, [1.0] * 3))
    with pytest.raises(UserError, match="flattn"):
        core_space_merge(members, merge="iso-c", merge_options={"flattn": 0.0})


def test_merged_factors_have_the_dtype_of_the_first_adapter() -> None:
    members = [LoraLayer(layer.A.bfloat16(), layer.B.bfloat16()) for layer in layers((2, 2))]
    for name in ADAPTER_MERGES:
        merged = merge_adapters([{"q": layer} for layer in members], name)["q"]
        assert (merged.A.dtype, merged.B.dtype, merged.scaling) == (torch.bfloat16, torch.bfloat16, 1.0), name


def test_every_merge_says_what_it_is_and_checks_its_options() -> None:
    for name, merge in ADAPTER_MERGES.items():
        assert merge.function.merge is merge  # type: ignore[attr-defined]
        assert merge.name == name
        assert 0 < len(merge.summary) <= 78, name
        assert merge.reference, name
        assert all(field.description for field in merge.options.model_fields.values()), name
    assert ADAPTER_MERGES["lora-ties"].resolve({"density": "0.5"}) == {"density": 0.5, "sign": "total"}
    with pytest.raises(UserError, match="density"):
        ADAPTER_MERGES["lora-ties"].resolve({"density": 0})


def test_what_cannot_be_merged_is_refused_with_the_reason() -> None:
    good, other = {"q": lora(6, 5, 2, seed=1)}, {"q": lora(6, 4, 2, seed=1)}
    with pytest.raises(UserError, match=r"layer 'q'.*6x4, 6x5"):
        merge_adapters([good, other])
    with pytest.raises(UserError, match=r"layer 'q'.*equal ranks, got 2, 3"):
        merge_adapters([good, {"q": lora(6, 5, 3, seed=1)}], "lora-linear")
    with pytest.raises(UserError, match="layer 'v' is adapted by adapter 2 but not by adapter 1"):
        merge_adapters([good, {**good, "v": good["q"]}])
    with pytest.raises(UserError, match="2 weights for 1 LoRA adapters"):
        merge_adapters([good], weights=[1, 2])
    with pytest.raises(UserError, match="did you mean 'lora-svd'"):
        merge_adapters([good], "lora-svdd")
    with pytest.raises(UserError, match="no LoRA adapters"):
        merge_adapters([])
    with pytest.raises(ValueError, match="expected, got"):
        LoraLayer(torch.ones(2, 5), torch.ones(6, 3))


def test_numpy_weights_are_fine() -> None:
    members = layers((2, 2))
    expected = lora_cat(members, weights=[1.0, 0.5]).delta()
    torch.testing.assert_close(lora_cat(members, weights=torch.from_numpy(np.array([1.0, 0.5]))).delta(), expected)
