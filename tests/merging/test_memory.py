"""Merging state dicts from Python: what can be asked for, and what is said about mistakes."""

import pytest
import torch
from torch import nn

from neurocl.errors import UserError
from neurocl.merging.memory import find_method, merge
from tests.merging.models import small_models, statistics_of


def test_a_network_loads_the_merge_of_its_state_dicts():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    states = [{key: value.clone() for key, value in network.state_dict().items()}]
    for _ in range(2):
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        states.append({key: value.clone() for key, value in network.state_dict().items()})
    network.load_state_dict(merge(states[0], states[1:], "task-arithmetic", alpha=0.3))
    expected = states[0]["0.weight"] + 0.3 * sum(state["0.weight"] - states[0]["0.weight"] for state in states[1:])
    torch.testing.assert_close(network[0].weight.data, expected)


def test_parameters_that_require_gradients_are_merged_without_them():
    base, models = small_models(2)
    models = [{k: nn.Parameter(v) if v.is_floating_point() else v for k, v in model.items()} for model in models]
    assert not merge(base, models)["blocks.0.weight"].requires_grad


def test_slices_and_transposes_of_other_tensors_are_merged_by_value():
    base, models = small_models(2)
    turned = [{k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in model.items()} for model in models]
    for key, value in merge(base, turned, "ties").items():
        assert torch.equal(value, merge(base, models, "ties")[key])


def test_models_of_other_types_than_the_base_are_merged_into_its_types():
    base, models = small_models(2, torch.bfloat16)
    wide = [{k: v.float() if v.is_floating_point() else v for k, v in model.items()} for model in models]
    result = merge(base, wide)
    assert {value.dtype for value in result.values()} == {torch.bfloat16, torch.int64}
    for key, value in merge(base, models).items():
        assert torch.equal(value, result[key])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_changes_floating_tensors_only(dtype):
    base, models = small_models(2)
    result = merge(base, models, dtype=dtype)
    assert result["blocks.0.weight"].dtype == dtype
    assert result["position_ids"].dtype == torch.int64


def test_the_default_arithmetic_is_closer_to_the_truth_than_float32():
    base, models = small_models(3)
    exact = merge(base, models, "iso-c", dtype=torch.float64)["blocks.0.weight"]
    single = merge(base, models, "iso-c", dtype=torch.float64, compute_dtype=torch.float32)["blocks.0.weight"]
    assert 0 < (single - exact).abs().max() < 1e-4


def test_weights_of_one_model_alone_are_that_model():
    base, models = small_models(3, torch.float64)
    result = merge(base, models, "average", weights=[0, 1, 0])
    torch.testing.assert_close(result["blocks.0.weight"], models[1]["blocks.0.weight"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "tiess"}, "did you mean 'ties'"),
        ({"method": "lora-svd"}, "use merge_adapters"),
        ({"method": "com"}, "its own function"),
        ({"method": "ties", "densty": 0.3}, "unknown key 'densty'; did you mean 'density'"),
        ({"method": "ties", "density": 1.5}, "density: input should be less than or equal to 1, got 1.5"),
        ({"method": "average", "weights": [1.0]}, "1 weights for 2 models"),
        ({"method": "model-stock", "weights": [1.0, 2.0]}, "model-stock takes no per-model weights"),
        ({"method": "slerp", "models": 3}, "slerp merges exactly 2 models, got 3"),
        ({"method": "model-stock", "models": 1}, "model-stock needs at least 2 models, got 1"),
        ({"method": "average", "models": 0}, "average needs at least 1 model"),
        ({"method": "ties", "base": None}, "ties needs the base model"),
        ({"method": "average", "base": None, "alpha": 0.5}, "give the base model too"),
        ({"method": "regmean"}, "regmean needs the gram statistics of each of the 2 models"),
        ({"method": "average", "device": "abacus"}, "device must be"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(changes, words):
    base, models = small_models(changes.pop("models", 2))
    with pytest.raises(UserError) as caught:
        merge(changes.pop("base", base), models, **changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_statistics_of_another_shape_are_refused_with_the_tensor():
    base, models = small_models(2)
    _, others = small_models(2, width=4)
    with pytest.raises(UserError, match=r"gram statistics of 'blocks.0.weight' are \[4, 4\].*\[6, 6\]"):
        merge(base, models, "regmean", statistics=statistics_of(others))


def test_a_declaration_is_found_by_name():
    assert find_method("ties").name == "ties"
