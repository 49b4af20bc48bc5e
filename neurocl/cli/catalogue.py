"""``neurocl list`` and ``neurocl info``: what there is, and everything about one name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from neurocl.cli.options import JsonOption
from neurocl.errors import UserError
from neurocl.registry import did_you_mean

GROUPS = ("methods", "merges", "federated", "datasets", "backbones", "recipes")
USED_BY = {"merges": ("weights",)}  # of an entry that does not say, such as a plug-in's


def _rows(group: str) -> list[dict[str, Any]]:
    """Name, summary, areas and source of everything in one group."""
    if group == "recipes":
        from neurocl.recipes import load_recipes

        return [
            {"name": recipe.name, "summary": recipe.summary, "areas": [recipe.area], "source": "neurocl"}
            for recipe in load_recipes()
        ]
    return [
        {"name": entry.name, "summary": entry.summary, "areas": list(entry.areas), "source": entry.source}
        for entry in _registry(group).entries()
    ]


def _registry(group: str) -> Any:
    if group == "methods":
        from neurocl.continual.catalog import METHODS

        return METHODS
    if group == "merges":
        from neurocl.merging.catalog import MERGES

        return MERGES
    if group == "federated":
        from neurocl.federated.catalog import FEDERATED

        return FEDERATED
    if group == "backbones":
        from neurocl.backbones.catalog import BACKBONES

        return BACKBONES
    from neurocl.data.catalog import DATASETS

    return DATASETS


def list_names(
    group: Annotated[
        str | None,
        typer.Argument(help="methods, merges, federated, datasets, backbones or recipes.", show_default="all"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List what can be chosen by name, plug-ins included."""
    if group is not None and group not in GROUPS:
        raise UserError(f"there is no group {group!r}{did_you_mean(group, GROUPS)} (choose from {', '.join(GROUPS)})")
    listed = {name: _rows(name) for name in ([group] if group else GROUPS)}
    if as_json:
        typer.echo(json.dumps(listed, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, rows in listed.items():
        table = Table(title=name, title_justify="left", box=None, pad_edge=False, title_style="bold")
        for column in ("name", "works on" if name == "merges" else "used by", "what it is"):
            table.add_column(column, no_wrap=column != "what it is")
        for row in rows:
            origin = "" if row["source"] == "neurocl" else f"  [{row['source']}]"
            areas = row["areas"] or USED_BY.get(name, ("continual", "spiking"))
            table.add_row(row["name"], ", ".join(areas), row["summary"] + origin)
        console.print(table)
        console.print()


def info(
    name: Annotated[str, typer.Argument(help="A method, merge, data set, backbone or recipe.")],
    as_json: JsonOption = False,
) -> None:
    """Explain one name: what it is, its options with defaults, its source."""
    describers: dict[str, Callable[[Any], dict[str, Any]]] = {
        "methods": _describe_method,
        "merges": _describe_merge,
        "federated": _describe_method,
        "datasets": _describe_dataset,
        "backbones": _describe_backbone,
    }
    for group, describe in describers.items():
        registry = _registry(group)
        if name in registry.names():
            entry = registry.entry(name)
            described = {"name": name, "kind": group.removesuffix("s"), "summary": entry.summary, **describe(entry)}
            break
    else:
        described = _describe_recipe(name)
    if as_json:
        typer.echo(json.dumps(described, indent=1, default=str))
    else:
        _print_info(described)


def _describe_method(entry: Any) -> dict[str, Any]:
    method = entry.load()
    module = inspect.getmodule(method)
    options = [
        {
            "name": f"options.{field_name}",
            "default": field.default,
            "meaning": field.description or "",
        }
        for field_name, field in method.Config.model_fields.items()
    ]
    return {
        "used by": [
            f"neurocl {area} {'run' if area == 'federated' else 'train'} --method {entry.name}" for area in entry.areas
        ],
        "about": _paragraphs(inspect.getdoc(module) or ""),
        "step": _paragraphs((inspect.getdoc(method) or "").partition("\n\nArgs:")[0].partition("\n\nRaises:")[0]),
        "options": options,
    }


def _describe_merge(entry: Any) -> dict[str, Any]:
    from neurocl.merging.describe import described

    row = described(entry.name)
    commands = [f"neurocl merging merge --method {entry.name}"]
    if row["works on"] == "networks":
        commands = [f"neurocl merging compare SUITE --method {entry.name}", f"neurocl.merging.{entry.load().__name__}"]
    options = [{**option, "values": option.pop("type")} for option in row["options"]]
    keys = ("works on", "about", "needs", "reference")
    return {"used by": commands, **{key: row[key] for key in keys}, "options": options}


def _paragraphs(text: str) -> str:
    """Docstring text with its lines joined, so that the terminal can wrap it; blank lines stay."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _describe_dataset(entry: Any) -> dict[str, Any]:
    from neurocl.data.catalog import load_benchmark

    benchmark = load_benchmark(entry.name)
    return {
        "tasks": " + ".join(str(size) for size in benchmark.task_sizes) + " classes",
        "item": " x ".join(str(size) for size in benchmark.image_shape) + (" events" if benchmark.is_events else ""),
        "normalisation": f"mean {benchmark.mean}, std {benchmark.std}" if benchmark.mean else "none, pixels in 0..1",
        "augmentation": benchmark.augment,
        "epochs and batch": f"{benchmark.epochs} and {benchmark.batch_size} by default",
        "licence": benchmark.licence,
    }


def _describe_backbone(entry: Any) -> dict[str, Any]:
    factory = entry.load()
    hidden = {"input_shape", "num_classes", "timesteps", "encoder", "neuron"}
    options = [
        {"name": f"backbone_options.{parameter.name}", "default": parameter.default, "meaning": ""}
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.name not in hidden
    ]
    return {"used by": list(entry.areas), "about": _paragraphs(inspect.getdoc(factory) or ""), "options": options}


def _describe_recipe(name: str) -> dict[str, Any]:
    import yaml

    from neurocl.recipes import load_recipes

    recipes = {recipe.name: recipe for recipe in load_recipes()}
    if name not in recipes:
        known = [*recipes, *(entry for group in GROUPS[:-1] for entry in _registry(group).names())]
        raise UserError(f"nothing is called {name!r}{did_you_mean(name, known)}; `neurocl list` shows all names")
    recipe = recipes[name]
    return {
        "name": name,
        "kind": "recipe",
        "summary": recipe.summary,
        "source": recipe.source,
        "expected": [f"{e.metric} = {e.value} +- {e.tolerance}" for e in recipe.expected] or "no published figure",
        "run it": f"neurocl reproduce {name}",
        "config": "\n\n" + yaml.safe_dump(recipe.config, sort_keys=False),
    }


def _print_info(described: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{described['name']}[/bold] ({described['kind']}): {described['summary']}\n")
    for key, value in described.items():
        if key in ("name", "kind", "summary") or not value:
            continue
        if key == "options":
            table = Table(box=None, pad_edge=False)
            columns = ["name", *(["values"] if "values" in value[0] else []), "default", "meaning"]
            first = "option" if described["kind"] == "merge" else "option (--set)"
            for column in (first, *columns[1:]):
                table.add_column(column, overflow="fold")
            for option in value:
                table.add_row(*(escape(str(option[column])) for column in columns))
            console.print(table)
        elif isinstance(value, list):
            console.print(f"{key}: " + "\n  ".join(str(item) for item in value), markup=False)
        elif isinstance(value, str) and "\n" in value:
            console.print(value + "\n", markup=False)
        else:
            console.print(f"{key}: {value}", markup=False)
