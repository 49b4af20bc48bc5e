"""Recipes in YAML: what they say, what they refuse, and that they repeat a merge from anywhere."""

from pathlib import Path

import pytest
import yaml

from neurocl.config import to_yaml, validate
from neurocl.errors import UserError
from neurocl.merging.recipe import Recipe, parse_bytes, read_recipe, recipe_values, relative_to


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("2G", 2 << 30),
        ("1.5K", 1536),
        ("7", 7),
        ("5GB", 5 << 30),
        ("1 MiB", 1 << 20),
        ("1t", 1 << 40),
    ],
)
def test_sizes_are_powers_of_1024(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1M", "5X", "M", "1e3", "0G"])
def test_other_sizes_are_refused_with_an_example(text):
    with pytest.raises(UserError, match="expected a size such as 512M or 2G"):
        parse_bytes(text)


def test_a_recipe_survives_yaml(tmp_path):
    values = {"method": "ties", "base": "b", "models": [{"path": "m", "weight": 0.5}], "options": {"density": 0.3}}
    recipe = validate(Recipe, values)
    (tmp_path / "r.yaml").write_text(to_yaml(recipe))
    assert read_recipe(tmp_path / "r.yaml") == recipe
    assert recipe.weights == [0.5]


def test_the_short_form_names_the_method_and_what_is_not_at_its_default():
    assert recipe_values(validate(Recipe, {"models": ["m"]})) == {
        "method": "average",
        "models": [{"path": "m"}],
    }


def test_relative_paths_are_looked_for_beside_the_recipe_then_from_here(tmp_path, monkeypatch):
    (tmp_path / "there" / "m").mkdir(parents=True)
    (tmp_path / "here" / "n").mkdir(parents=True)
    (tmp_path / "there" / "r.yaml").write_text("base: m\nmodels: [m, n, /absolute]\n")
    monkeypatch.chdir(tmp_path / "here")
    recipe = read_recipe(Path("../there/r.yaml"))
    assert recipe.base == Path("../there/m")
    assert [entry.path for entry in recipe.models] == [Path("../there/m"), Path("n"), Path("/absolute")]


def test_a_recipe_moved_into_a_folder_points_to_the_same_files(tmp_path, monkeypatch):
    (tmp_path / "a" / "m").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    recipe = validate(Recipe, {"models": [{"path": "m", "statistics": "m/s.safetensors"}, {"path": str(tmp_path)}]})
    moved = relative_to(recipe, Path("../out"))
    (tmp_path / "out" / "merge.yaml").write_text(to_yaml(moved))
    monkeypatch.chdir(tmp_path)
    found = read_recipe(Path("out/merge.yaml"))
    assert found.models[0].path.resolve() == tmp_path / "a" / "m"
    assert found.models[1].path == tmp_path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metod": "ties"}, "unknown key 'metod'; did you mean 'method'"),
        ({"models": []}, "models"),
        ({"models": [{"path": "m", "wieght": 1}]}, "unknown key 'models.0.wieght'"),
        ({"models": [{"path": "a", "weight": 1}, {"path": "b"}]}, "either every model has a weight or none has"),
        ({"shard_size": "big"}, "shard_size: expected a size such as 512M or 2G"),
        ({"dtype": "int8"}, "dtype: "),
        ({"alpha": ".nan"}, "alpha: "),
        ({"alpha": "much"}, "alpha: "),
        ({"on_mismatch": "truncate"}, "on_mismatch: "),
        ({"parameters": {"keep": ["a"]}}, "did you mean 'kept'"),
    ],
)
def test_a_mistake_in_a_recipe_names_the_key(tmp_path, changes, words):
    path = tmp_path / "r.yaml"
    text = yaml.safe_dump({"method": "ties", "models": ["m"], **changes}).replace("'.nan'", ".nan")
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
