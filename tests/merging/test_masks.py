"""TALL masks, consensus, EMR and experts compressed with them."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neurocl.errors import UserError
from neurocl.merging.arithmetic import task_arithmetic
from neurocl.merging.masks import (
    CompressedExperts,
    compress,
    consensus,
    emr,
    emr_mask,
    emr_rescaler,
    emr_unified,
    pack_bits,
    tall_mask,
    unpack_bits,
)
from neurocl.merging.ties import ties
from tests.conftest import reference
from tests.merging.pieces import merged_in_pieces, random_models

NAMES = ("a.weight", "a.bias", "b.weight", "ln.weight")
LAMBDAS = (0.2, 0.4, 0.6, 1.0)


def tall_reference() -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in reference("merging-baselines/tall_masks").items()}


def multitask_model(stored: dict[str, Tensor], multitask: str) -> Tensor:
    """The merged model of the reference, made from its task vectors in float32."""
    vectors = stored["tv"]
    if multitask == "sum":
        return stored["ptm"] + vectors.sum(dim=0)
    return stored["ptm"] + ties(torch.zeros_like(vectors[0]), vectors, combine="sum")


def two_tensor_models(num_models: int = 3, dtype: torch.dtype = torch.float32) -> tuple[dict, list[dict]]:  # type: ignore[type-arg]
    """State dicts with a matrix, a bias whose size is no multiple of eight, and a counter."""
    weight, weights = random_models(num_models, 6, 8, seed=1)
    bias, biases = random_models(num_models, 5, seed=2)
    count = torch.tensor(3)
    base = {"weight": weight.to(dtype), "bias": bias.to(dtype), "count": count}
    models = [
        {"weight": weights[index].to(dtype), "bias": biases[index].to(dtype), "count": count + index}
        for index in range(num_models)
    ]
    return base, models


@pytest.mark.parametrize(("multitask", "threshold"), list(product(["sum", "ties_sum"], LAMBDAS)))
def test_reference_tall_masks_are_reproduced(multitask: str, threshold: float) -> None:
    stored = tall_reference()
    merged = multitask_model(stored, multitask)
    for model, expected in zip(stored["ft"], stored[f"tall_{multitask}_lam{threshold}"], strict=True):
        assert torch.equal(tall_mask(stored["ptm"], model, merged, threshold), expected)


@pytest.mark.parametrize(
    ("multitask", "threshold", "min_tasks"), list(product(["sum", "ties_sum"], LAMBDAS, [1, 2, 4]))
)
def test_reference_consensus_vectors_are_reproduced(multitask: str, threshold: float, min_tasks: int) -> None:
    stored = tall_reference()
    zero = torch.zeros_like(stored["ptm"])
    merged = consensus(
        zero, stored["tv"], multitask=multitask.replace("_", "-"), threshold=threshold, min_tasks=min_tasks
    )  # type: ignore[arg-type]
    expected = stored[f"consensus_tv_{multitask}_lam{threshold}_k{min_tasks}"]
    kept = stored[f"consensus_{multitask}_lam{threshold}_k{min_tasks}"]
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-9)
    assert not merged[~kept].any()


def test_magnitude_masks_of_the_reference_are_those_of_the_ties_trim() -> None:
    stored = tall_reference()
    for vector, expected in zip(stored["tv"], stored["mag_mask_K10"], strict=True):
        assert torch.equal(ties(torch.zeros_like(vector), vector[None], density=0.1) != 0, expected)


@pytest.mark.parametrize("multitask", ["sum", "ties-sum"])
def test_consensus_of_no_task_is_the_merge_and_of_too_many_the_base(multitask: str) -> None:
    base, models = random_models(3, 300)
    whole = task_arithmetic(base, models) if multitask == "sum" else ties(base, models, combine="sum")
    assert torch.equal(consensus(base, models, multitask=multitask, min_tasks=0), whole)  # type: ignore[arg-type]
    assert torch.equal(consensus(base, models, multitask=multitask, min_tasks=4), base)  # type: ignore[arg-type]


@pytest.mark.parametrize("multitask", ["sum", "ties-sum"])
def test_consensus_of_pieces_has_the_bits_of_the_whole(multitask: str) -> None:
    base, models = random_models(3, 1003)
    weights = torch.tensor([0.2, 0.3, 0.9], dtype=torch.float64)
    whole = consensus(base, models, weights=weights, multitask=multitask)  # type: ignore[arg-type]
    pieces = merged_in_pieces(consensus, base, models, [1, 5, 600], weights=weights, multitask=multitask)
    assert torch.equal(pieces, whole)


def test_reference_emr_is_reproduced() -> None:
    stored = {key: torch.from_numpy(value) for key, value in reference("merging-baselines/emr").items()}
    unified = {}
    for name in NAMES:
        unified[name] = emr_unified(torch.stack([stored[f"tv{task}/{name}"] for task in range(3)]))
        torch.testing.assert_close(unified[name], stored[f"unified/{name}"], rtol=1e-6, atol=0)
    for task in range(3):
        vectors = {name: stored[f"tv{task}/{name}"] for name in NAMES}
        for name in NAMES:
            assert torch.equal(emr_mask(vectors[name], unified[name]), stored[f"mask{task}/{name}"])
        assert emr_rescaler(vectors, unified) == pytest.approx(float(stored["rescalers"][task]), rel=1e-6)


def test_a_vanishing_sum_elects_minus() -> None:
    vectors = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    assert emr_unified(vectors).tolist() == [-1.0, 2.0]


def test_emr_without_masks_adds_the_shared_task_vector() -> None:
    base, models = random_models(3, 300)
    assert torch.equal(emr(base, models), base + emr_unified(models - base))
    assert torch.equal(merged_in_pieces(emr, base, models, [1, 5, 100]), emr(base, models))


def test_emr_of_one_expert_returns_it() -> None:
    base, models = random_models(1, 300)
    base, models = base.bfloat16().double(), models.bfloat16().double()
    assert torch.equal(emr(base, models), models[0])


def test_emr_weights_scale_the_task_vectors() -> None:
    base, models = random_models(2, 300)
    scaled = torch.stack([base + 2 * (models[0] - base), models[1]])
    merged = emr(base, models, weights=torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(merged, emr(base, scaled), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("function", [emr, consensus])
def test_models_equal_to_the_base_and_empty_tensors_pass(function: object) -> None:
    base, _ = random_models(1, 40)
    assert torch.equal(function(base, base.expand(3, -1)), base)  # type: ignore[operator]
    assert function(torch.empty(0), torch.empty(2, 0)).shape == (0,)  # type: ignore[operator]


@pytest.mark.parametrize("num_entries", [0, 1, 7, 8, 9, 1000])
def test_bits_survive_packing(num_entries: int) -> None:
    mask = torch.rand(num_entries, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack_bits(mask)
    assert packed.numel() == (num_entries + 7) // 8
    assert torch.equal(unpack_bits(packed, num_entries), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["emr", "tall"])
def test_one_expert_compressed_alone_comes_back_bit_for_bit(method: str, dtype: torch.dtype) -> None:
    base, models = two_tensor_models(1, dtype)
    expert = compress(base, models, method).expert(0)  # type: ignore[arg-type]
    for name in ("weight", "bias"):
        assert expert[name].dtype == dtype
        assert torch.equal(expert[name], models[0][name])
    assert torch.equal(expert["count"], base["count"])


def test_emr_experts_follow_their_definition() -> None:
    base, models = two_tensor_models()
    experts = compress(base, models, "emr")
    names = ("weight", "bias")
    unified = {
        name: emr_unified(torch.stack([model[name].double() - base[name].double() for model in models]))
        for name in names
    }
    for index, model in enumerate(models):
        vectors = {name: model[name].double() - base[name].double() for name in names}
        rescaler = emr_rescaler(vectors, unified)
        assert float(experts.rescalers[index]) == pytest.approx(rescaler, rel=1e-14)
        for name in names:
            own = base[name] + rescaler * emr_mask(vectors[name], unified[name]) * unified[name]
            torch.testing.assert_close(experts.expert(index)[name], own.float(), rtol=1e-6, atol=1e-7)


def test_tall_experts_follow_their_definition_with_a_threshold_each() -> None:
    base, models = two_tensor_models()
    thresholds = [0.2, 0.5, 0.9]
    experts = compress(base, models, "tall", threshold=thresholds)
    for index, threshold in enumerate(thresholds):
        for name in ("weight", "bias"):
            stacked = torch.stack([model[name].double() for model in models])
            merged = task_arithmetic(base[name].double(), stacked)
            mask = tall_mask(base[name].double(), stacked[index], merged, threshold)
            assert torch.equal(experts.mask(index, name), mask)
            own = torch.where(mask, merged, base[name].double())
            torch.testing.assert_close(experts.expert(index)[name], own.float(), rtol=1e-6, atol=1e-7)


def test_tall_masks_of_ties_trim_over_the_whole_model() -> None:
    base, models = two_tensor_models()
    experts = compress(base, models, "tall", multitask="ties-sum")
    names = ("bias", "weight")
    flat = torch.cat([base[name].reshape(-1) for name in names]).double()
    tuned = torch.stack([torch.cat([model[name].reshape(-1) for name in names]) for model in models]).double()
    expected = ties(flat, tuned, combine="sum") - flat
    found = torch.cat([experts.unified[name].reshape(-1) for name in names])
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["emr", "tall"])
def test_a_saved_file_gives_the_same_experts(method: str, tmp_path: Path) -> None:
    base, models = two_tensor_models(3, torch.bfloat16)
    base["tied"] = base["weight"]
    for model in models:
        model["tied"] = model["weight"]
    experts = compress(base, models, method)  # type: ignore[arg-type]
    experts.save(tmp_path / "new" / "experts.safetensors")
    loaded = CompressedExperts.load(tmp_path / "new" / "experts.safetensors")
    assert loaded.method == method
    assert loaded.sizes() == experts.sizes()
    for index in range(3):
        own, again = experts.expert(index), loaded.expert(index)
        assert own.keys() == again.keys()
        assert all(torch.equal(own[name], again[name]) for name in own)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["experts.safetensors"]


def test_sizes_count_every_byte() -> None:
    base, models = two_tensor_models()
    sizes = compress(base, models).sizes()
    assert sizes == {
        "base": 4 * 53 + 8,
        "unified": 4 * 53,
        "masks": 3 * (48 // 8 + 1),
        "rescalers": 3 * 8,
        "total": 4 * 53 + 8 + 4 * 53 + 21 + 24,
        "separate": 4 * (4 * 53 + 8),
    }
    assert compress(base, models, dtype=torch.bfloat16).sizes()["unified"] == 2 * 53


def test_models_that_do_not_fit_are_named() -> None:
    base, models = two_tensor_models()
    with pytest.raises(UserError, match="no experts"):
        compress(base, [])
    del models[1]["bias"]
    with pytest.raises(UserError, match=r"tensor 'bias' is \[5\] in the base, missing in expert 1"):
        compress(base, models)
    models[1]["bias"] = torch.zeros(4)
    with pytest.raises(UserError, match=r"\[4\] in expert 1"):
        compress(base, models)


def test_wrong_arguments_are_refused() -> None:
    base, models = two_tensor_models()
    with pytest.raises(ValueError, match="2 thresholds for 3 experts"):
        compress(base, models, "tall", threshold=[0.1, 0.2])
    for index in (-1, 3):
        with pytest.raises(ValueError, match="expert must be in"):
            compress(base, models).expert(index)


def test_broken_files_are_named_with_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "experts.safetensors"
    with pytest.raises(UserError, match="no such file"):
        CompressedExperts.load(path)
    path.write_bytes(b"not a tensor file")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        CompressedExperts.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="holds no compressed experts"):
        CompressedExperts.load(path)


def test_a_file_with_parts_that_do_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "experts.safetensors"
    base, models = two_tensor_models()
    experts = compress(base, models)
    experts.masks["bias"] = experts.masks["bias"][:, :0]
    experts.save(path)
    with pytest.raises(UserError, match="parts of tensor 'bias' do not fit"):
        CompressedExperts.load(path)
    del experts.masks["bias"]
    experts.save(path)
    with pytest.raises(UserError, match="not of the same tensors"):
        CompressedExperts.load(path)
    tensors = load_file(path)
    save_file(tensors, path, metadata={"format": "neurocl-compressed-experts"})
    with pytest.raises(UserError, match="how many entries"):
        CompressedExperts.load(path)
