"""The loop over tensors: identities that hold for every merge of weights, however the data is cut and stored."""

import math

import pytest
import torch

from neurocl.errors import UserError
from neurocl.merging.engine import Merger, tied_names
from neurocl.merging.memory import merge
from neurocl.merging.parameters import ParameterRules
from tests.merging.models import WEIGHT_MERGES, assert_same_bits, declared, needed_statistics, num_models, small_models
from tests.merging.test_rounding import nearest

RETURNS_SINGLE = [name for name in WEIGHT_MERGES if declared(name).returns_single and declared(name).min_models == 1]
UNORDERED = [name for name in WEIGHT_MERGES if not declared(name).order_matters]
ON_MATRICES = [name for name in WEIGHT_MERGES if declared(name).scope == "matrix"]
INTEGERS = ("norm.num_batches_tracked", "position_ids")
STATISTICS = ("norm.running_mean", "norm.running_var")


def merged(name, base, models, **options):
    statistics = options.pop("statistics", needed_statistics(name, models))
    return merge(base, models, name, statistics=statistics, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RETURNS_SINGLE)
def test_one_model_merged_alone_comes_back_bit_for_bit(name, dtype):
    base, models = small_models(1, dtype)
    result = merged(name, base, models)
    expected = models[0] | {key: base[key] for key in INTEGERS}
    assert_same_bits(result, expected)


@pytest.mark.parametrize("name", UNORDERED)
def test_the_order_of_the_models_changes_nothing(name):
    base, models = small_models(num_models(name))
    statistics = needed_statistics(name, models)
    forward = merged(name, base, models, statistics=statistics)
    backward = merged(name, base, models[::-1], statistics=statistics and statistics[::-1])
    if declared(name).scope == "elements":
        assert_same_bits(forward, backward)
    else:
        for key, value in forward.items():
            torch.testing.assert_close(backward[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("alpha", [1.0, 0.7])
@pytest.mark.parametrize("name", WEIGHT_MERGES)
def test_bfloat16_models_give_the_float64_result_rounded_once(name, alpha):
    base, models = small_models(num_models(name), torch.bfloat16)
    options = {"statistics": needed_statistics(name, models), "alpha": alpha}
    exact = merged(name, upcast(base), [upcast(model) for model in models], **options)
    result = merged(name, base, models, **options)
    for key, value in result.items():
        if value.is_floating_point() and value.numel():
            expected = nearest(exact[key].reshape(-1), torch.bfloat16).view(value.shape)
            assert torch.equal(value, expected), key


def upcast(model):
    return {key: value.double() if value.is_floating_point() else value for key, value in model.items()}


@pytest.mark.parametrize("size", [1, 7, 13])
@pytest.mark.parametrize("name", [name for name in WEIGHT_MERGES if declared(name).scope == "elements"])
def test_the_size_of_the_slices_changes_no_bit(name, size, monkeypatch):
    # of nine models a reduction over single entries adds in another order than one over rows
    base, models = small_models(declared(name).num_models or 9, torch.float64)
    whole = merged(name, base, models)
    monkeypatch.setattr(Merger, "piece", lambda self: size)
    assert_same_bits(merged(name, base, models), whole)


@pytest.mark.parametrize("name", WEIGHT_MERGES)
def test_the_number_of_threads_changes_nothing(name):
    generator = torch.Generator().manual_seed(3)
    base = {"layer.weight": torch.randn(40, 24, generator=generator), "bias": torch.randn(40_000, generator=generator)}
    models = [
        {key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in base.items()}
        for _ in range(num_models(name))
    ]
    statistics = needed_statistics(name, models)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(merged(name, base, models, statistics=statistics))
    finally:
        torch.set_num_threads(before)
    if declared(name).scope == "elements":
        assert_same_bits(results[1], results[0])
    else:
        for key, value in results[0].items():
            torch.testing.assert_close(results[1][key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ON_MATRICES)
def test_merges_of_matrices_average_what_is_no_matrix(name):
    base, models = small_models(num_models(name), torch.float64)
    result = merged(name, base, models)
    for key in ("blocks.0.bias", "conv.weight", "scale", "embed_tokens.weight", "text_projection.weight"):
        torch.testing.assert_close(result[key], torch.stack([model[key] for model in models]).mean(dim=0))
    assert not torch.allclose(result["blocks.0.weight"], torch.stack([m["blocks.0.weight"] for m in models]).mean(0))


@pytest.mark.parametrize("name", ON_MATRICES)
def test_rules_make_a_matrix_of_an_embedding_and_a_mean_of_a_matrix(name):
    base, models = small_models(num_models(name), torch.float64)
    plain = merged(name, base, models)
    rules = ParameterRules(matrices=("embed*",), averaged=("blocks.0.*",), kept=("blocks.1.*",))
    result = merged(name, base, models, parameters=rules)
    assert not torch.allclose(result["embed_tokens.weight"], plain["embed_tokens.weight"])
    mean = torch.stack([model["blocks.0.weight"] for model in models]).mean(dim=0)
    torch.testing.assert_close(result["blocks.0.weight"], mean)
    assert torch.equal(result["blocks.1.weight"], base["blocks.1.weight"])


@pytest.mark.parametrize("alpha", [1.0, 3.0])
@pytest.mark.parametrize("name", WEIGHT_MERGES)
def test_running_statistics_of_batch_norm_are_averaged_whatever_the_scale(name, alpha):
    base, models = small_models(num_models(name), torch.float64)
    result = merged(name, base, models, alpha=alpha)
    for key in STATISTICS:
        torch.testing.assert_close(result[key], torch.stack([model[key] for model in models]).mean(dim=0))


@pytest.mark.parametrize("name", WEIGHT_MERGES)
def test_buffers_and_empty_tensors_are_copied_from_the_base(name):
    base, models = small_models(num_models(name))
    result = merged(name, base, models)
    assert list(result) == list(base)
    for key in (*INTEGERS, "empty"):
        assert torch.equal(result[key], base[key])


@pytest.mark.parametrize("name", WEIGHT_MERGES)
def test_alpha_scales_the_way_from_the_base(name):
    base, models = small_models(num_models(name), torch.float64)
    whole, half = merged(name, base, models), merged(name, base, models, alpha=0.5)
    for key, value in base.items():
        if value.is_floating_point() and key not in STATISTICS:
            torch.testing.assert_close(half[key], value + 0.5 * (whole[key] - value))
    nothing = merged(name, base, models, alpha=0.0)
    assert_same_bits(nothing, base | {key: whole[key] for key in STATISTICS})


@pytest.mark.parametrize("name", WEIGHT_MERGES)
def test_the_inputs_are_left_as_they_were(name):
    base, models = small_models(num_models(name), torch.float64)
    merged(name, base, models)
    untouched_base, untouched = small_models(num_models(name), torch.float64)
    for found, expected in zip([base, *models], [untouched_base, *untouched], strict=True):
        assert_same_bits(found, expected)


@pytest.mark.parametrize("name", WEIGHT_MERGES)
def test_tied_tensors_stay_tied(name):
    base, models = small_models(num_models(name))
    for model in (base, *models):
        model["lm_head.weight"] = model["embed_tokens.weight"]
    result = merged(name, base, models)
    assert result["lm_head.weight"] is result["embed_tokens.weight"]


def test_a_tie_of_the_base_that_a_model_has_cut_is_cut_in_the_result():
    base, models = small_models(2, torch.float64)
    for model in (base, *models):
        model["lm_head.weight"] = model["embed_tokens.weight"]
    assert tied_names(base, models) == {"lm_head.weight": "embed_tokens.weight"}
    models[1]["lm_head.weight"] = models[1]["embed_tokens.weight"] + 1
    result = merge(base, models, "average")
    torch.testing.assert_close(result["lm_head.weight"], result["embed_tokens.weight"] + 0.5)


def test_a_tensor_that_is_tied_counts_once_in_what_is_measured_over_the_model():
    base, models = small_models(3, torch.float64)
    alone = merge(base, models, "ties")
    for model in (base, *models):
        model["lm_head.weight"] = model["embed_tokens.weight"]
    tied = merge(base, models, "ties")
    assert_same_bits({key: tied[key] for key in alone}, alone)


def naive_ties(base, models, density):
    """The published algorithm on vectors: trim each, elect a sign, average what agrees."""
    vectors = torch.stack([model - base for model in models])
    size = base.numel()
    thresholds = vectors.abs().kthvalue(size - int(size * density), dim=1).values
    trimmed = torch.where(vectors.abs() >= thresholds[:, None], vectors, 0)
    signs = trimmed.sum(dim=0).sign()
    signs[signs == 0] = signs.sum().sign()
    agrees = (trimmed * signs > 0).double()
    return base + (trimmed * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7])
def test_ties_over_a_model_equals_ties_on_the_flattened_model(density, monkeypatch):
    monkeypatch.setattr(Merger, "piece", lambda self: 11)
    base, models = small_models(4, torch.float64)
    names = sorted(key for key, value in base.items() if value.is_floating_point() and key not in STATISTICS)
    flat = [torch.cat([model[key].reshape(-1) for key in names]) for model in (base, *models)]
    expected = naive_ties(flat[0], flat[1:], density).split([base[key].numel() for key in names])
    result = merge(base, models, "ties", density=density)
    for key, value in zip(names, expected, strict=True):
        torch.testing.assert_close(result[key].reshape(-1), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named_with_its_model(where, value):
    base, models = small_models(2)
    [base, *models][where]["blocks.0.bias"][3] = value
    label = ["the base", "model 0", "model 1"][where]
    with pytest.raises(UserError, match=f"'blocks.0.bias' of {label} contains NaN or infinity"):
        merge(base, models, "task-arithmetic")


def test_a_result_that_the_output_cannot_hold_is_refused():
    base, models = small_models(2)
    with pytest.raises(UserError, match=r"tensor '\S+' of the merged model would reach .* float16 cannot hold"):
        merge(base, models, "task-arithmetic", alpha=1e7, dtype=torch.float16)


@pytest.mark.parametrize("options", [{"alpha": math.nan}, {"alpha": math.inf}, {"weights": [math.nan, 1.0]}])
def test_scales_that_are_not_finite_are_refused(options):
    base, models = small_models(2)
    with pytest.raises(UserError, match="finite"):
        merge(base, models, "task-arithmetic", **options)


def test_a_model_without_a_tensor_counts_as_equal_to_the_base_if_asked():
    base, models = small_models(2, torch.float64)
    complete = [dict(models[0]), models[1] | {"blocks.0.bias": base["blocks.0.bias"]}]
    del models[1]["blocks.0.bias"]
    models[1]["extra"] = torch.ones(2)
    models[0]["blocks.1.weight"] = torch.ones(3, 3)
    complete[0]["blocks.1.weight"] = base["blocks.1.weight"]
    assert_same_bits(merge(base, models, on_mismatch="base"), merge(base, complete))


def test_a_slice_can_end_the_merge(monkeypatch):
    from neurocl.merging.engine import MemorySink, MemorySource

    base, models = small_models(2)
    calls = []

    def pulse():
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt

    sources = [MemorySource(model, "a model") for model in (base, *models)]
    merger = Merger(declared("ties"), declared("ties").resolve({}), sources[0], sources[1:], pulse=pulse)
    sink = MemorySink({step.name: step.spec for step in merger.plan().steps}, torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt):
        merger.run(merger.plan().steps, sink)
    assert not sink.values, "measuring can be interrupted before anything is merged"
