"""Reading mergekit's YAML for the methods that both know, with mergekit's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neurocl.errors import UserError
from neurocl.runs import read_json

# Names of methods, and per method the options that carry mergekit's meaning here.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("average", {}),
    "task_arithmetic": ("task-arithmetic", {}),
    "ties": ("ties", {"trim": "tensor", "count": "exact"}),
    "dare_linear": ("dare", {}),
    "dare_ties": ("dare-ties", {"trim": "tensor", "density": 1.0}),
    "breadcrumbs": ("breadcrumbs", {}),
    "model_stock": ("model-stock", {}),
    "slerp": ("slerp", {}),
}
NORMALIZED = frozenset({"linear", "ties"})
IGNORED = frozenset({"int8_mask"})  # how mergekit stores a mask, not what it computes
IRRELEVANT_KEYS = frozenset({"tokenizer_source", "tokenizer", "chat_template", "name", "out_dtype"})


def translated(values: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """A mergekit configuration as the values of a :class:`neurocl.merging.recipe.Recipe`.

    Args:
        values: the mapping read from YAML.
        source: what errors call it.

    Raises:
        UserError: a method, key or form that has no counterpart here; nothing is dropped in silence.
    """
    method = str(values["merge_method"])
    if method not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise UserError(f"{source}: mergekit's method {method!r} has no counterpart here (it reads {known})")
    known_keys = {"merge_method", "models", "slices", "base_model", "parameters", "dtype"} | IRRELEVANT_KEYS
    unknown = values.keys() - known_keys
    if unknown:
        raise UserError(f"{source}: key {min(unknown)!r} of mergekit's format is not supported")
    for key in ("tokenizer_source", "tokenizer"):
        if values.get(key) not in (None, "base"):
            raise UserError(f"{source}: {key}: {values[key]!r}: tokenizers are not merged, the base's is copied")
    base = _path(values.get("base_model"), source)
    name, options = METHODS[method]
    shared = _parameters(values.get("parameters"), source)
    entries = []
    for item in _models(values, source):
        path = _path(item.get("model"), source)
        given = _parameters(item.get("parameters"), source)
        if path == base and method != "slerp":
            if given.get("weight") not in (None, 0):
                raise UserError(f"{source}: the base model {base} has a weight of its own; list it only as base_model")
            continue
        entries.append((path, {**shared, **given}))
    if not entries:
        raise UserError(f"{source}: no models to merge")
    if method == "slerp" and base is not None and entries[0][0] != base:
        entries = [entry for entry in entries if entry[0] == base] + [entry for entry in entries if entry[0] != base]
    return _recipe(method, name, dict(options), base, entries, shared, values, source)


def _recipe(
    method: str,
    name: str,
    options: dict[str, Any],
    base: str | None,
    entries: list[tuple[str | None, dict[str, Any]]],
    shared: dict[str, Any],
    values: Mapping[str, Any],
    source: str,
) -> dict[str, Any]:
    weights = [entry.get("weight") for _, entry in entries]
    default_weight = None if all(weight is None for weight in weights) else 1.0
    models = [
        {"path": path, **({} if default_weight is None else {"weight": entry.get("weight", default_weight)})}
        for path, entry in entries
    ]
    normalize = bool(_agreed(entries, "normalize", source, default=method in NORMALIZED))
    density = _agreed(entries, "density", source, default=1.0)
    rescale = bool(_agreed(entries, "rescale", source, default=method.startswith("dare")))
    if rescale != method.startswith("dare"):
        raise UserError(f"{source}: rescale: {rescale} is not supported for {method}")
    if method in ("ties", "dare_ties"):
        options["combine"] = "mean" if normalize else "sum"
    elif method == "linear":
        total = sum(1.0 if weight is None else float(weight) for weight in weights)
        if not normalize and abs(total - 1) > 1e-9:
            raise UserError(f"{source}: normalize: false with weights that add up to {total:g} is not supported")
    elif normalize:
        raise UserError(f"{source}: normalize is not supported for {method}")
    if method.startswith("dare"):
        options.update(drop_rate=round(1.0 - float(density), 12), rescale="l1")
    elif method in ("ties", "breadcrumbs"):
        options["density"] = density
    for key in ("gamma", "t"):
        found = _agreed(entries, key, source)
        if found is not None:
            options[key] = found
    supported = {"weight", "density", "normalize", "rescale", "gamma", "t", "lambda"} | IGNORED
    for _, entry in entries:
        unknown = entry.keys() - supported
        if unknown:
            raise UserError(f"{source}: parameter {min(unknown)!r} of {method} is not supported")
    recipe: dict[str, Any] = {"method": name, "models": models, "options": options}
    if base is not None and method != "slerp":
        recipe["base"] = base
    scale = _agreed(entries, "lambda", source)
    if scale is not None:
        recipe["alpha"] = scale
    dtype = values.get("out_dtype") or values.get("dtype")
    if dtype is not None:
        recipe["dtype"] = dtype
    return recipe


def _models(values: Mapping[str, Any], source: str) -> list[dict[str, Any]]:
    models = values.get("models")
    if models is None:
        slices = values.get("slices")
        if isinstance(slices, list) and len(slices) == 1 and isinstance(slices[0], dict):
            models = slices[0].get("sources")
            for item in models if isinstance(models, list) else []:
                _require_all_layers(item, source)
        else:
            raise UserError(f"{source}: slices that stack layers of several models are not supported; use models")
    if not isinstance(models, list) or not all(isinstance(item, dict) and "model" in item for item in models):
        raise UserError(f"{source}: models: expected a list of entries with the key model")
    return models


def _require_all_layers(item: Mapping[str, Any], source: str) -> None:
    """A slice is understood only where it spans the whole model, which ``config.json`` tells."""
    config = Path(str(item.get("model"))) / "config.json"
    layers = read_json(config).get("num_hidden_layers") if config.is_file() else None
    if layers is None or list(item.get("layer_range") or []) != [0, layers]:
        raise UserError(f"{source}: slices of part of a model are not supported; use models")


def _path(value: Any, source: str) -> str | None:
    if value is None or isinstance(value, str):
        if isinstance(value, str) and "+" in value:
            raise UserError(f"{source}: {value!r}: list the adapter folder itself as a model, its base as base_model")
        return value
    raise UserError(f"{source}: expected the path of a model, got {value!r}")


def _parameters(value: Any, source: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{source}: parameters: expected a mapping, got {type(value).__name__}")
    for key, entry in value.items():
        if isinstance(entry, list | dict):
            raise UserError(f"{source}: parameters.{key}: values that change over layers or filters are not supported")
    return value


def _agreed(entries: list[tuple[str | None, dict[str, Any]]], key: str, source: str, *, default: Any = None) -> Any:
    values = {entry.get(key, default) for _, entry in entries}
    if len(values) > 1:
        raise UserError(f"{source}: {key} must be the same for every model here, got {sorted(map(str, values))}")
    return values.pop()
