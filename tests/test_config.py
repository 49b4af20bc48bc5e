"""Configurations: YAML round trip, overrides, and messages that name key, value and fix."""

import pytest
from pydantic import Field

from neurocl.config import Config, merged, parse_overrides, read_yaml, to_yaml, validate
from neurocl.errors import UserError


class Inner(Config):
    rate: float = Field(0.1, gt=0)


class Outer(Config):
    inner: Inner = Inner()
    name: str = "a"
    sizes: tuple[int, ...] = (1, 2)


def test_yaml_round_trip(tmp_path):
    config = Outer(inner=Inner(rate=1e-4), name="üñí", sizes=(3,))
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert validate(Outer, read_yaml(path)) == config


def test_overrides_are_nested_and_typed():
    values = parse_overrides(["inner.rate=1e-3", "name=staer", "sizes=[1, 2]", "flag=true", "back-end=null"])
    assert values == {"inner": {"rate": 0.001}, "name": "staer", "sizes": [1, 2], "flag": True, "back_end": None}


@pytest.mark.parametrize("item", ["a", "=3", "a..b=1", ".a=1", "a=[1"])
def test_a_broken_override_is_named(item):
    with pytest.raises(UserError, match="--set"):
        parse_overrides([item])


def test_a_value_and_a_group_of_the_same_name_clash():
    with pytest.raises(UserError, match="plain value before"):
        parse_overrides(["a=1", "a.b=2"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nmae": "x"}, r"unknown key 'nmae'; did you mean 'name'\?"),
        ({"inner": {"rat": 1}}, r"unknown key 'inner.rat'; did you mean 'rate'\?"),
        ({"inner": {"rate": -1}}, "inner.rate: input should be greater than 0, got -1"),
        ({"sizes": "many"}, "sizes: input should be a valid tuple, got 'many'"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(UserError, match=message):
        validate(Outer, values)


def test_merging_goes_key_by_key():
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}) == {"a": {"b": 3, "c": 2}, "d": 4}


def test_unreadable_files_are_named(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(path)
    path.write_text("a: " + "x" * (1 << 20))
    with pytest.raises(UserError, match="larger than"):
        read_yaml(path)
