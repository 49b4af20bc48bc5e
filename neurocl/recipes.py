"""Recipes: published experiments as YAML, with their source, the figure to expect and its tolerance."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from neurocl.config import Config, read_yaml, validate
from neurocl.errors import UserError
from neurocl.registry import did_you_mean


class Expected(Config):
    """One figure: ``metric`` is a dotted path below ``metrics`` in ``result.json``; value and tolerance in its unit."""

    metric: str
    value: float
    tolerance: float = Field(gt=0)


class Recipe(Config):
    """One experiment.

    ``measured_by`` says whose figure is expected: ``authors`` (published) or ``neurocl`` (measured by this project).
    """

    name: str
    summary: str
    area: Literal["spiking", "continual", "trajectory", "federated"]
    source: str
    measured_by: Literal["authors", "neurocl"]
    expected: tuple[Expected, ...] = ()
    note: str = ""
    seeds: tuple[int, ...] = (0,)
    config: dict[str, Any]


def recipe_folder() -> Path:
    """Where the recipes lie: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).with_name("recipe_files")
    return inside if inside.is_dir() else Path(__file__).parents[1] / "recipes"


def load_recipes() -> list[Recipe]:
    """All recipes, by name."""
    found = [validate(Recipe, read_yaml(path), source=path.name) for path in sorted(recipe_folder().rglob("*.yaml"))]
    return sorted(found, key=lambda recipe: recipe.name)


def load_recipe(name: str) -> Recipe:
    """One recipe by name, or from a YAML file.

    Raises:
        UserError: no such recipe.
    """
    if name.endswith((".yaml", ".yml")):
        return validate(Recipe, read_yaml(Path(name)), source=name)
    recipes = {recipe.name: recipe for recipe in load_recipes()}
    if name not in recipes:
        raise UserError(f"there is no recipe {name!r}{did_you_mean(name, recipes)} (`neurocl list recipes`)")
    return recipes[name]
