"""A merge as a YAML file that can be shared: typed, checked, and written beside every result."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from neurocl.config import Config, read_yaml, validate
from neurocl.errors import UserError
from neurocl.merging.parameters import ParameterRules

DtypeName = Literal["float64", "float32", "bfloat16", "float16"]
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(text: str) -> int:
    """``"512M"`` -> 536870912; units K, M, G, T are powers of 1024.

    Raises:
        UserError: anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None or float(found.group(1)) <= 0:
        raise UserError(f"expected a size such as 512M or 2G, got {text!r}")
    return int(float(found.group(1)) * UNITS[found.group(2).upper()])


class ModelEntry(Config):
    """One model to merge.

    Attributes:
        path: safetensors file, Hugging Face folder, or PEFT adapter folder.
        weight: how much it counts; None is one.
        statistics: file written by ``neurocl merging stats``, for methods that need one.
    """

    path: Path
    weight: Annotated[float, Field(allow_inf_nan=False)] | None = None
    statistics: Path | None = None


class Recipe(Config):
    """What to merge and how.

    Attributes:
        method: see ``neurocl merging methods``.
        base: the model that the others were fine-tuned from.
        models: the fine-tuned models; a plain path stands for an entry without weight.
        alpha: scale on the whole result: base + alpha * (merged - base).
        options: of the method, see ``neurocl merging info METHOD``.
        parameters: glob patterns that override which treatment a parameter gets.
        on_mismatch: ``error``, or ``base`` to take tensors that a model lacks from the base.
        dtype: of the output; None keeps the base's.
        compute_dtype: of the arithmetic.
        shard_size: largest output file.
    """

    method: str = "average"
    base: Path | None = None
    models: Annotated[tuple[ModelEntry, ...], Field(min_length=1)]
    alpha: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    options: dict[str, Any] = Field(default_factory=dict)
    parameters: ParameterRules = ParameterRules()
    on_mismatch: Literal["error", "base"] = "error"
    dtype: DtypeName | None = None
    compute_dtype: Literal["float64", "float32"] = "float64"
    shard_size: str = "5G"

    @field_validator("models", mode="before")
    @classmethod
    def _plain_paths(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple({"path": item} if isinstance(item, str | Path) else item for item in value)
        return value

    @field_validator("shard_size")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        try:
            parse_bytes(value)
        except UserError as error:
            raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _all_or_no_weights(self) -> Recipe:
        given = [entry.weight is not None for entry in self.models]
        if any(given) and not all(given):
            raise ValueError("either every model has a weight or none has")
        return self

    @property
    def weights(self) -> list[float] | None:
        """Per-model weights, or None if the recipe gives none."""
        values = [entry.weight for entry in self.models if entry.weight is not None]
        return values or None


def read_recipe(path: Path) -> Recipe:
    """Read a recipe, neurocl's or mergekit's; paths in it are looked for beside the file, then from here.

    Raises:
        UserError: what is wrong, with the key; or what of a mergekit file has no counterpart.
    """
    values = read_yaml(path)
    if "merge_method" in values:
        from neurocl.merging.mergekit import translated

        values = translated(values, source=str(path))
    recipe = validate(Recipe, values, source=str(path))
    return located(recipe, path.parent)


def located(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with relative paths that exist below ``folder`` made to point there."""

    def at(path: Path | None) -> Path | None:
        return folder / path if path is not None and not path.is_absolute() and (folder / path).exists() else path

    entries = [
        entry.model_copy(update={"path": at(entry.path), "statistics": at(entry.statistics)}) for entry in recipe.models
    ]
    return recipe.model_copy(update={"base": at(recipe.base), "models": tuple(entries)})


def relative_to(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with relative paths as seen from ``folder``, so that a file there can be used from anywhere."""

    def seen(path: Path | None) -> Path | None:
        return Path(os.path.relpath(path, folder)) if path is not None and not path.is_absolute() else path

    entries = [
        entry.model_copy(update={"path": seen(entry.path), "statistics": seen(entry.statistics)})
        for entry in recipe.models
    ]
    return recipe.model_copy(update={"base": seen(recipe.base), "models": tuple(entries)})


def recipe_values(recipe: Recipe) -> Mapping[str, Any]:
    """The recipe as plain values: the method, and what is not at its default."""
    return {"method": recipe.method, **recipe.model_dump(mode="json", exclude_defaults=True)}
