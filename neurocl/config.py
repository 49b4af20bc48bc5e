"""Typed configurations: YAML in and out, ``a.b=c`` overrides, and errors that name the key and the fix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from neurocl.errors import UserError
from neurocl.registry import did_you_mean

MAX_CONFIG_BYTES = 1 << 20


class Config(BaseModel):
    """Base of every configuration: unknown keys are errors, values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


ConfigT = TypeVar("ConfigT", bound=Config)


def _keys_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the (possibly nested) model that ``path`` leads to."""
    current: Any = model
    for part in path:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            return []
        current = field.annotation
    return list(getattr(current, "model_fields", {}))


def validate(model: type[ConfigT], values: Mapping[str, Any], *, source: str = "configuration") -> ConfigT:
    """Build ``model`` from plain values.

    Raises:
        UserError: the first offending key, what was given, what is allowed.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        path = tuple(first["loc"])
        key = ".".join(str(part) for part in path)
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(str(path[-1]), _keys_at(model, path[:-1]))
            raise UserError(f"{source}: unknown key {key!r}{hint}") from None
        reason = first["msg"].removeprefix("Value error, ")
        reason = reason[:1].lower() + reason[1:]
        given = first.get("input")
        if isinstance(given, Mapping) or not key:
            raise UserError(f"{source}: {key + ': ' if key else ''}{reason}") from None
        raise UserError(f"{source}: {key}: {reason}, got {given!r}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: missing file, larger than 1 MiB, broken YAML, or not a mapping.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes, not a configuration")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of options, found {type(values).__name__}")
    return values


def to_yaml(config: BaseModel) -> str:
    """The configuration as YAML text that :func:`read_yaml` and :func:`validate` turn back into it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """Turn ``["a.b=1", "c=[2, 3]"]`` into ``{"a": {"b": 1}, "c": [2, 3]}``; values are read as YAML.

    Raises:
        UserError: an item without ``=`` or with an empty key.
    """
    result: dict[str, Any] = {}
    for item in assignments:
        key, separator, text = item.partition("=")
        parts = key.strip().replace("-", "_").split(".")
        if not separator or not all(parts):
            raise UserError(f"--set expects key=value such as optimizer.lr=0.01, got {item!r}")
        try:
            value = _scalar(text)
        except yaml.YAMLError:
            raise UserError(f"--set {item!r}: the value is not valid YAML") from None
        node = result
        for part in parts[:-1]:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                raise UserError(f"--set {item!r}: {part!r} was given a plain value before")
            node = child
        node[parts[-1]] = value
    return result


def _scalar(text: str) -> Any:
    """YAML value of ``text``; also ``1e-3``, which YAML 1.1 takes for a word."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings, later layers win key by key."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            if isinstance(value, Mapping) and isinstance(old, Mapping):
                result[key] = merged(old, value)
            else:
                result[key] = value
    return result
