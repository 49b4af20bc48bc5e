"""``neurocl merging methods`` and ``info``: what merges there are, and what a model file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from neurocl.cli.merging import say, size_text
from neurocl.cli.options import JsonOption
from neurocl.errors import UserError


def methods(as_json: JsonOption = False) -> None:
    """List the merges: what each works on, what it needs, its options."""
    from neurocl.merging.catalog import MERGES
    from neurocl.merging.describe import described

    rows = []
    for name in MERGES.names():
        try:
            rows.append(described(name))
        except UserError as error:  # a plug-in that cannot be used; the others can
            say(f"neurocl: left out: {error}")
    if as_json:
        typer.echo(json.dumps(rows, indent=1, default=str))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    titles = {
        "weights": "merges of weights: state dicts in memory, models on disk",
        "adapters": "merges of LoRA adapters",
        "networks": "merges of networks: run on unlabelled data (from Python, and in `compare`)",
    }
    for area, title in titles.items():
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        table.add_column("name", no_wrap=True)
        table.add_column("what it does")
        table.add_column("options")
        for row in rows:
            if row["works on"] == area:
                options = " ".join(option["name"] for option in row["options"])
                needs = [need for need in row["needs"] if area == "weights" and need != "base"]
                entry = MERGES.entry(row["name"])
                own = entry.source == "neurocl"
                summary = entry.summary if own else f"{row['summary'].rstrip('.')} ({entry.summary})"
                table.add_row(row["name"], escape(summary + "".join(f"; needs {need}" for need in needs)), options)
        console.print(table)
        console.print()
    console.print(
        "Everywhere the result is base + alpha (merged - base); in code that merges the mean of the task vectors "
        "instead of their sum, alpha is that many times larger. `neurocl merging info NAME` explains one merge."
    )


def info(
    target: Annotated[str, typer.Argument(help="A merge, or a model: file, folder, adapter.")],
    as_json: JsonOption = False,
) -> None:
    """Explain a merge, or show what a model file holds and where it came from."""
    from neurocl.merging.catalog import MERGES

    if target not in MERGES.names() and Path(target).exists():
        _print_model(Path(target), as_json)
        return
    if target not in MERGES.names() and ("/" in target or Path(target).suffix):
        raise UserError(f"{target}: no such file or folder, and no merge of that name")
    from neurocl.merging.describe import described

    row = described(target)
    if as_json:
        typer.echo(json.dumps(row, indent=1, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{row['name']}[/bold] (merge of {row['works on']}): {row['summary']}")
    if row["about"]:
        console.print("\n" + row["about"], markup=False)
    if row["needs"]:
        console.print("\nneeds: " + ", ".join(row["needs"]))
    if row["options"]:
        table = Table(box=None, pad_edge=False)
        for column in ("option", "values", "default", "meaning"):
            table.add_column(column, overflow="fold")
        for option in row["options"]:
            table.add_row(option["name"], option["type"], str(option["default"]), option["meaning"])
        console.print()
        console.print(table)
    console.print("\nsource: " + row["reference"], markup=False)


def _print_model(path: Path, as_json: bool) -> None:
    from collections import Counter

    from neurocl.merging.checkpoints import FileSource
    from neurocl.merging.parameters import classify
    from neurocl.merging.peft import WEIGHTS_NAME, is_adapter, read_adapter
    from neurocl.merging.statistics import HEADER_KEY

    if (path / "suite.json").is_file():
        raise UserError(f"{path} is a suite of experts; name one of its models, such as {path / 'base'}")
    adapter = path.is_dir() and is_adapter(path)
    layers = read_adapter(path).layers if adapter else {}
    source = FileSource.open(path / WEIGHTS_NAME if adapter else path)
    kinds: Counter[str] = Counter()
    values: Counter[str] = Counter()
    statistics = HEADER_KEY in source.metadata
    for name, spec in source.tensors.items():
        kind = name.partition("/")[0] if statistics else classify(name, spec)
        kinds[kind] += 1
        values[kind] += spec.numel
    document: dict[str, Any] = {
        "path": str(path),
        "kind": "LoRA adapter" if adapter else "statistics" if statistics else "weights",
        "files": sorted({place.file.name for place in source.placed.values()}),
        "tensors": len(source.tensors),
        "values": sum(values.values()),
        "bytes": sum(spec.nbytes for spec in source.tensors.values()),
        "dtypes": sorted({str(spec.dtype).removeprefix("torch.") for spec in source.tensors.values()}),
        "classes": {kind: {"tensors": kinds[kind], "values": values[kind]} for kind in kinds},
        "metadata": source.metadata,
    }
    if adapter:
        document["ranks"] = dict(Counter(str(layer.lora.rank) for layer in layers.values()))
    source.close()
    merged = _provenance(document["metadata"].pop("neurocl_merge", ""))
    if merged:
        document["merged by neurocl"] = merged
    if as_json:
        typer.echo(json.dumps(document, indent=1))
        return
    typer.echo(
        f"{path}: {document['kind']}, {document['tensors']:,} tensors, {document['values']:,} values, "
        f"{size_text(document['bytes'])}, {', '.join(document['dtypes'])}"
    )
    for kind, row in document["classes"].items():
        typer.echo(f"  {kind}: {row['tensors']:,} tensors, {row['values']:,} values")
    if adapter:
        typer.echo("  ranks: " + ", ".join(f"{rank} ({count} layers)" for rank, count in document["ranks"].items()))
    if merged:
        typer.echo(
            f"  merged by neurocl {merged['neurocl']} with {merged['method']}, alpha {merged['alpha']}, of "
            + ", ".join(merged["inputs_sha256"])
        )


def _provenance(text: str) -> dict[str, Any]:
    """What :func:`neurocl.merging.files.provenance` wrote; empty if it is something else, files come from anywhere."""
    try:
        said = json.loads(text)
    except ValueError:
        return {}
    known = {"neurocl", "method", "alpha", "inputs_sha256"}
    return said if isinstance(said, dict) and known <= said.keys() and isinstance(said["inputs_sha256"], dict) else {}
