"""DARE, alone and before TIES."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neurocl.merging.arithmetic import task_arithmetic
from neurocl.merging.average import average
from neurocl.merging.dare import (
    DareMeasurement,
    DareTiesMeasurement,
    dare,
    dare_ties,
    dropped,
    keep_mask,
    scaled_where,
)
from neurocl.merging.ties import ties
from tests.conftest import reference
from tests.merging.pieces import merged_in_pieces, random_models


@pytest.mark.parametrize("drop_rate", [0.5, 0.9])
def test_reference_vectors_are_reproduced_from_their_masks(drop_rate: float) -> None:
    stored = reference("merging-baselines/dare")
    scale = DareMeasurement(3, drop_rate).scale("", 0)
    for task in range(3):
        for name in ("a.weight", "a.bias", "b.weight", "ln.weight"):
            vector = torch.from_numpy(stored[f"tv{task}/{name}"])
            kept = torch.from_numpy(stored[f"x/mask_p{drop_rate}/{task}/{name}"])
            expected = torch.from_numpy(stored[f"x/dare_p{drop_rate}/{task}/{name}"])
            torch.testing.assert_close(scaled_where(vector, kept, scale), expected, rtol=1e-6, atol=0)


def test_dropping_nothing_is_task_arithmetic_or_the_average() -> None:
    base, models = random_models(3, 400)
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    merged = dare(base, models, weights=weights, drop_rate=0.0)
    assert torch.equal(merged, task_arithmetic(base, models, weights=weights))
    merged = dare(base, models, weights=weights, drop_rate=0.0, then="average")
    torch.testing.assert_close(merged, average(base, models, weights=weights), rtol=1e-14, atol=1e-15)
    merged = dare(base, models, drop_rate=0.0, then="average")
    torch.testing.assert_close(merged, average(base, models), rtol=1e-14, atol=1e-15)


def test_dropping_nothing_before_ties_is_ties() -> None:
    _, models = random_models(3, 400)
    zero = torch.zeros(400, dtype=torch.float64)
    assert torch.equal(dare_ties(zero, models, drop_rate=0.0), ties(zero, models))


def test_every_slice_of_the_mask_is_the_same_row_of_decisions() -> None:
    whole = keep_mask(torch.empty(1000), 0.5, seed=3, name="layer.weight", index=1)
    for start in (0, 1, 4, 7, 8, 9, 500, 993):
        part = keep_mask(torch.empty(1000 - start), 0.5, seed=3, name="layer.weight", index=1, offset=start)
        assert torch.equal(part, whole[start:])


def test_the_mask_is_a_fixed_function_of_its_arguments() -> None:
    row = keep_mask(torch.empty(32), 0.5, seed=0, name="w", index=0)
    generator = np.random.Generator(np.random.Philox(key=FIRST_KEY))
    draws = generator.integers(0, 2**32, size=32, dtype=np.uint32)
    assert row.tolist() == (draws >= 2**31).tolist()


# blake2b of "0/0/w" in 16 bytes, read as a little-endian number
FIRST_KEY = 0x52CF18BE53E1B5219130FD7F4465BEC1


@pytest.mark.parametrize("changed", [{"seed": 4}, {"name": "other"}, {"index": 2}])
def test_seed_tensor_and_model_have_masks_of_their_own(changed: dict[str, object]) -> None:
    arguments = {"seed": 3, "name": "layer.weight", "index": 1}
    first = keep_mask(torch.empty(4000), 0.5, **arguments)  # type: ignore[arg-type]
    second = keep_mask(torch.empty(4000), 0.5, **{**arguments, **changed})  # type: ignore[arg-type]
    # independent decisions agree in half of the places: 2000, with a standard deviation of 32
    assert abs(int((first == second).sum()) - 2000) < 5 * 32


@pytest.mark.parametrize("drop_rate", [0.1, 0.9, 0.999])
def test_the_share_of_dropped_entries_is_the_drop_rate(drop_rate: float) -> None:
    number = 400_000
    kept = int(keep_mask(torch.empty(number), drop_rate, seed=0, name="w", index=0).sum())
    deviation = (number * drop_rate * (1 - drop_rate)) ** 0.5
    assert abs(kept - number * (1 - drop_rate)) < 4 * deviation


def test_the_mean_over_seeds_is_the_task_vector() -> None:
    base, models = torch.zeros(50, dtype=torch.float64), torch.randn(1, 50, dtype=torch.float64).abs() + 0.1
    seeds = 2000
    mean = sum(dare(base, models, drop_rate=0.7, seed=seed) for seed in range(seeds)) / seeds
    deviation = models[0] * (0.7 / 0.3 / seeds) ** 0.5
    assert isinstance(mean, torch.Tensor)
    assert ((mean - models[0]).abs() < 4.5 * deviation).all()


def test_l1_rescaling_keeps_the_l1_norm_of_every_task_vector() -> None:
    base, models = random_models(2, 3000)
    measured = DareMeasurement(2, 0.8, "l1")
    measured.update(base, models, name="w", offset=0)
    assert not measured.another_pass()
    left = dropped(base, models, measured, 0.8, 0, "w", 0)
    torch.testing.assert_close(left.abs().sum(1), (models - base).abs().sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rescale", ["probability", "l1"])
def test_pieces_give_the_bits_of_the_whole(rescale: str) -> None:
    base, models = random_models(3, 10_007)
    weights = torch.tensor([0.2, 0.3, 0.9], dtype=torch.float64)
    options = {"rescale": rescale, "drop_rate": 0.6, "seed": 5}
    cuts = [1, 5, 4096, 4097, 9000]
    whole = dare(base, models, weights=weights, name="layer", **options)  # type: ignore[arg-type]
    assert torch.equal(merged_in_pieces(dare, base, models, cuts, weights=weights, name="layer", **options), whole)
    whole = dare_ties(base, models, weights=weights, name="layer", **options)  # type: ignore[arg-type]
    assert torch.equal(merged_in_pieces(dare_ties, base, models, cuts, weights=weights, name="layer", **options), whole)


def test_model_wide_measurement_gives_every_tensor_its_own_l1_scale() -> None:
    base, models = random_models(2, 600)
    measured = DareTiesMeasurement(2, 0.5, "l1", density=1.0)
    while True:
        for name, start, stop in (("a", 0, 100), ("b", 100, 600)):
            measured.update(base[start:stop], models[:, start:stop], name=name, offset=0)
        if not measured.another_pass():
            break
    alone = DareMeasurement(2, 0.5, "l1")
    alone.update(base[100:], models[:, 100:], name="b", offset=0)
    alone.another_pass()
    assert measured.dare.scale("b", 1) == alone.scale("b", 1) != measured.dare.scale("a", 1)


@pytest.mark.parametrize("function", [dare, dare_ties])
def test_no_entry_is_invented(function: object) -> None:
    base, models = random_models(3, 2000)
    merged = function(base, models, drop_rate=0.3)  # type: ignore[operator]
    assert not (merged != base)[(models == base).all(dim=0)].any()


@pytest.mark.parametrize("rescale", ["probability", "l1"])
@pytest.mark.parametrize("function", [dare, dare_ties])
def test_models_equal_to_the_base_and_tiny_tensors_pass(function: object, rescale: str) -> None:
    base, _ = random_models(1, 40)
    assert torch.equal(function(base, base.expand(3, -1), rescale=rescale), base)  # type: ignore[operator]
    assert function(torch.empty(0), torch.empty(2, 0), rescale=rescale).shape == (0,)  # type: ignore[operator]
    # with one entry everything may be dropped, and then there is nothing to scale
    for seed in range(20):
        merged = function(torch.zeros(1), torch.ones(2, 1), rescale=rescale, seed=seed)  # type: ignore[operator]
        assert torch.isfinite(merged).all()
