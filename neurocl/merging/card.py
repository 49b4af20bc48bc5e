"""The model card that is written beside merged weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from neurocl import __version__
from neurocl.merging.parameters import MEANINGS
from neurocl.merging.recipe import Recipe, recipe_values

if TYPE_CHECKING:
    from neurocl.merging.files import MergePlan
    from neurocl.merging.method import MergeMethod


def model_card(plan: MergePlan, inputs: Mapping[str, str]) -> str:
    """The card of merged weights: what was merged, how, and what happened to which parameters.

    Args:
        plan: the merge.
        inputs: SHA-256 of the contents by path of the model.
    """
    words = {"merge": plan.method.name, "mean": "mean of the models", "copy": "copied from the base"}
    lines = ["| parameters | what happened | tensors | values |", "|---|---|---|---|"]
    for row in plan.by_class().values():
        kind = row["class"]
        lines.append(
            f"| {kind} ({MEANINGS[kind].partition(':')[0]}) | {words[row['action']]} | {row['tensors']:,} "
            f"| {row['values']:,} |"
        )
    if plan.left_out:
        lines += ["", "Not used:", "", *(f"- {sentence}" for sentence in plan.left_out)]
    return card_text(plan.recipe, plan.method, inputs, lines)


def short_names(paths: Iterable[str]) -> list[str]:
    """The last parts of each path, as many as tell them apart: names say what was merged, folders whose disk it was."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    return ["/".join(own[-_telling(own, parts) :]) for own in parts]


def _telling(own: tuple[str, ...], all_parts: Sequence[tuple[str, ...]]) -> int:
    count = 1
    while count < len(own) and sum(other[-count:] == own[-count:] for other in all_parts) > 1:
        count += 1
    return count


def card_text(recipe: Recipe, method: MergeMethod, inputs: Mapping[str, str], body: Sequence[str]) -> str:
    """Markdown with the front matter that model hubs read, the inputs, ``body``, and the recipe to repeat the merge."""
    front = {"library_name": "neurocl", "tags": ["merge", "neurocl", method.name]}
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# Merged with {method.name}", ""]
    lines += [method.summary.rstrip(".") + ".", "", f"Method: {method.reference}", ""]
    lines += ["| model | role | SHA-256 of the contents |", "|---|---|---|"]
    paths = dict.fromkeys(str(path) for path in (recipe.base, *(entry.path for entry in recipe.models)) if path)
    names = dict(zip(paths, short_names(paths), strict=True))
    shown = dict(recipe_values(recipe))
    if recipe.base is not None:
        shown["base"] = names[str(recipe.base)]
        lines.append(f"| {shown['base']} | base | `{inputs.get(str(recipe.base), 'not read').strip()}` |")
    shown["models"] = []
    for entry in recipe.models:
        name = names[str(entry.path)]
        role = "merged" if entry.weight is None else f"merged, weight {entry.weight:g}"
        lines.append(f"| {name} | {role} | `{inputs.get(str(entry.path), 'not read').strip()}` |")
        shown["models"].append(name if entry.weight is None else {"path": name, "weight": entry.weight})
    text = yaml.safe_dump({key: value for key, value in shown.items() if value is not None}, sort_keys=False)
    command = "neurocl merging merge merge.yaml --out NEW"
    lines += ["", *body, "", f"Made with neurocl {__version__}; repeat it with `{command}`:", ""]
    lines += ["```yaml", text.strip(), "```", ""]
    return "\n".join(lines)
