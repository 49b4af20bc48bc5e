"""mergekit's configurations become recipes with mergekit's meaning; what has no counterpart is refused by name."""

import json

import pytest
import yaml

from neurocl.errors import UserError
from neurocl.merging.memory import merge
from neurocl.merging.recipe import read_recipe
from tests.merging.models import declared, small_models


@pytest.fixture
def read(tmp_path):
    """Read a mergekit configuration given as a mapping."""

    def call(**values):
        path = tmp_path / "mergekit.yaml"
        path.write_text(yaml.safe_dump(values))
        return read_recipe(path)

    return call


def entries(*weights, **parameters):
    return [
        {"model": f"m{index}", "parameters": {"weight": weight, **parameters}} for index, weight in enumerate(weights)
    ]


CASES = {
    "linear": ("average", {}),
    "task_arithmetic": ("task-arithmetic", {}),
    "ties": ("ties", {"trim": "tensor", "count": "exact", "combine": "mean", "density": 1.0}),
    "dare_linear": ("dare", {"drop_rate": 0.0, "rescale": "l1"}),
    "dare_ties": (
        "dare-ties",
        {"trim": "tensor", "density": 1.0, "combine": "sum", "drop_rate": 0.0, "rescale": "l1"},
    ),
    "breadcrumbs": ("breadcrumbs", {"density": 1.0}),
}


@pytest.mark.parametrize("method", CASES)
def test_a_method_is_read_with_mergekits_defaults(read, method):
    base = {} if method == "linear" else {"base_model": "b"}
    recipe = read(merge_method=method, models=entries(0.7, 0.3), dtype="bfloat16", **base)
    name, options = CASES[method]
    assert (recipe.method, recipe.options) == (name, options)
    assert recipe.weights == [0.7, 0.3]
    assert [str(entry.path) for entry in recipe.models] == ["m0", "m1"]
    assert (str(recipe.base) if base else recipe.base) == ("b" if base else None)
    assert (recipe.dtype, recipe.alpha) == ("bfloat16", 1.0)
    declared(name).resolve(recipe.options)


def test_options_shared_or_repeated_for_every_model_are_read(read):
    shared = read(merge_method="ties", base_model="b", models=entries(1, 1), parameters={"density": 0.3, "lambda": 0.7})
    repeated = read(merge_method="ties", base_model="b", models=entries(1, 1, density=0.3, **{"lambda": 0.7}))
    assert shared == repeated
    assert shared.options["density"] == 0.3
    assert shared.alpha == 0.7


def test_ties_without_normalisation_adds(read):
    recipe = read(merge_method="ties", base_model="b", models=entries(1, 1), parameters={"normalize": False})
    assert recipe.options["combine"] == "sum"


def test_breadcrumbs_take_gamma_and_dare_takes_density(read):
    crumbs = read(
        merge_method="breadcrumbs", base_model="b", models=entries(1), parameters={"density": 0.9, "gamma": 0.02}
    )
    assert crumbs.options == {"density": 0.9, "gamma": 0.02}
    dare = read(merge_method="dare_linear", base_model="b", models=entries(1), parameters={"density": 0.3})
    assert dare.options["drop_rate"] == 0.7


def test_the_default_gamma_is_mergekits():
    assert declared("breadcrumbs").resolve({})["gamma"] == 0.01


def test_model_stock_takes_its_models_beside_the_base(read):
    recipe = read(merge_method="model_stock", base_model="b", models=[{"model": m} for m in ("b", "m0", "m1")])
    assert (recipe.method, str(recipe.base)) == ("model-stock", "b")
    assert [str(entry.path) for entry in recipe.models] == ["m0", "m1"]


@pytest.mark.parametrize("order", [["b", "m0"], ["m0", "b"]])
def test_slerp_starts_at_the_base_model_wherever_it_is_listed(read, order):
    recipe = read(merge_method="slerp", base_model="b", models=[{"model": m} for m in order], parameters={"t": 0.25})
    assert (recipe.method, recipe.base, recipe.options) == ("slerp", None, {"t": 0.25})
    assert [str(entry.path) for entry in recipe.models] == ["b", "m0"]


def test_one_slice_of_whole_models_is_the_models(read, tmp_path):
    for name in ("b", "m0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    sources = [{"model": str(tmp_path / name), "layer_range": [0, 4]} for name in ("b", "m0")]
    recipe = read(
        merge_method="slerp", base_model=str(tmp_path / "b"), slices=[{"sources": sources}], parameters={"t": 0.5}
    )
    assert [entry.path.name for entry in recipe.models] == ["b", "m0"]
    sources[1]["layer_range"] = [0, 3]
    with pytest.raises(UserError, match="slices of part of a model"):
        read(merge_method="slerp", base_model=str(tmp_path / "b"), slices=[{"sources": sources}])


def test_linear_weights_are_normalised_as_mergekit_does():
    base, models = small_models(2)
    scaled = merge(base, models, "average", weights=[2, 6])
    plain = merge(base, models, "average", weights=[0.25, 0.75])
    assert all(scaled[name].equal(plain[name]) for name in base)


REFUSED = {
    "an unknown method": ({"merge_method": "passthrough"}, "'passthrough' has no counterpart"),
    "della": ({"merge_method": "della"}, "'della' has no counterpart"),
    "a union of tokenizers": ({"tokenizer_source": "union"}, "tokenizers are not merged"),
    "a tokenizer section": ({"tokenizer": {"source": "union"}}, "tokenizers are not merged"),
    "a gradient": ({"parameters": {"density": [0.1, 0.9]}}, "parameters.density: values that change over layers"),
    "a filter": (
        {"models": [{"model": "m", "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}]},
        "parameters.weight: values that change over layers or filters",
    ),
    "stacked slices": (
        {"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [0, 4]}]}] * 2},
        "slices that stack layers",
    ),
    "part of a model": (
        {"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [0, 4]}]}]},
        "slices of part of a model",
    ),
    "densities that differ": (
        {"models": [{"model": m, "parameters": {"density": d}} for m, d in (("a", 0.1), ("c", 0.2))]},
        "density must be the same for every model",
    ),
    "an unknown key": ({"modules": {}}, "key 'modules'"),
    "an unknown parameter": ({"parameters": {"epsilon": 0.1}}, "parameter 'epsilon' of ties"),
    "rescaled ties": ({"parameters": {"rescale": True}}, "rescale: True is not supported for ties"),
    "a weight of the base": (
        {"models": [{"model": "b", "parameters": {"weight": 0.5}}, {"model": "m"}]},
        "the base model b has a weight of its own",
    ),
    "an adapter with a plus": ({"models": [{"model": "a+lora"}]}, "list the adapter folder itself"),
    "a model that is no path": ({"models": [{"model": {"path": "x"}}]}, "expected the path of a model"),
    "models without the key": ({"models": ["m0"]}, "a list of entries with the key model"),
    "no models": ({"models": []}, "no models to merge"),
    "parameters that are a list": ({"parameters": [1]}, "parameters: expected a mapping"),
    "an unheard-of type": ({"dtype": "int4"}, "dtype"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(read, kind):
    changes, words = REFUSED[kind]
    values = {"merge_method": "ties", "base_model": "b", "models": entries(1, 1), **changes}
    with pytest.raises(UserError) as caught:
        read(**{key: value for key, value in values.items() if value is not None})
    assert words in str(caught.value)
    assert "mergekit.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
