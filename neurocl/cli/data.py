"""``neurocl data``: list, describe, fetch, check and import data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from neurocl.data.catalog import Benchmark
    from neurocl.data.sources import Source

app = typer.Typer(help="List, fetch, check and import data sets.", no_args_is_help=True)

_DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder with data sets; default $NEUROCL_DATA, then the user's cache."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
_Name = Annotated[str, typer.Argument(help="Name of a data set or benchmark, such as mnist or seq-mnist.")]


@app.command("list")
def list_sets(data_dir: _DataDir = None, as_json: _Json = False) -> None:
    """List the benchmarks with the size, licence and state of their data."""
    from neurocl.data.catalog import DATASETS, load_benchmark

    rows = [_row(load_benchmark(name), data_dir) for name in DATASETS.names()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = _table("benchmark", "tasks", "picture", "size", "state", "licence")
    for row in rows:
        table.add_row(
            row["name"],
            _tasks(row["task_sizes"]),
            "x".join(map(str, row["image_shape"])),
            _megabytes(row["download_bytes"]),
            row["state"],
            row["licence"],
        )
    _print(table)


@app.command()
def info(name: _Name, data_dir: _DataDir = None, as_json: _Json = False) -> None:
    """Describe one set: tasks, files, digests, licence, citation, room needed."""
    from neurocl.data.catalog import DATASETS, is_data_file, load_benchmark
    from neurocl.data.sources import SOURCES, find_source

    known = name in DATASETS.names() or is_data_file(name)
    benchmark = load_benchmark(name) if known else None
    if benchmark is None:
        source: Source | None = find_source(name)
    else:
        source = SOURCES.get(benchmark.source)
    facts = _facts(name, benchmark, source, data_dir)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = _table("fact", "value")
    for key, value in facts.items():
        if key != "files":
            table.add_row(key.replace("_", " "), _shown(value))
    for file in facts.get("files", []):
        size = f"{file['bytes']:,} bytes" if file["bytes"] is not None else "size not published"
        table.add_row("file", "\n".join([f"{file['name']}, {size}", file["digest"], *file["urls"]]))
    _print(table)


@app.command()
def download(
    name: _Name,
    data_dir: _DataDir = None,
    mirror: Annotated[int, typer.Option(help="Address to try first, 0 is the main one.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be fetched; no contact.")] = False,
    keep_archives: Annotated[bool, typer.Option("--keep-archives", help="Keep archives after unpacking.")] = False,
    as_json: _Json = False,
) -> None:
    """Fetch a public set, verify it and unpack it; a second call resumes what was cut."""
    from neurocl.data import install

    if dry_run:
        planned = install.plan(name, data_dir=data_dir, mirror=mirror)
        rows = [
            {"url": file.url, "bytes": file.num_bytes, "digest": file.digest, "target": str(file.target)}
            for file in planned
        ]
        if as_json:
            typer.echo(json.dumps(rows, indent=2))
            return
        for row in rows:
            size = f"{row['bytes']:,} bytes" if row["bytes"] is not None else "size not published"
            typer.echo(f"{row['url']}\n  {size}, {row['digest']}\n  to {row['target']}")
        return
    with _progress(name) as report:
        folder = install.download(name, data_dir=data_dir, mirror=mirror, keep_archives=keep_archives, progress=report)
    _print_folder(name, folder, as_json)


@app.command()
def check(
    name_or_path: Annotated[
        str | None, typer.Argument(help="Benchmark, data set, file or folder; default: every set found.")
    ] = None,
    data_dir: _DataDir = None,
    as_json: _Json = False,
) -> None:
    """Read a set as training would: digests, counts per class, and what is wrong with it."""
    from neurocl.data import check as checking
    from neurocl.data.install import state
    from neurocl.data.sources import SOURCES
    from neurocl.errors import RunError

    if name_or_path is not None:
        wanted = [name_or_path]
    else:
        wanted = ["seq-digits", *(n for n in SOURCES if state(n, data_dir=data_dir)[0] == "complete")]
    findings = [finding for one in wanted for finding in checking.check(one, data_dir=data_dir)]
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in findings], indent=2))
    else:
        table = _table("", "where", "finding")
        for finding in findings:
            table.add_row(finding.level, finding.where, finding.message)
        _print(table)
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        raise RunError(f"{len(errors)} of {len(findings)} findings are errors, the first: {errors[0].message}")


@app.command("import")
def import_set(
    name: _Name,
    path: Annotated[Path, typer.Argument(help="A published file, or a folder that holds the files.")],
    data_dir: _DataDir = None,
    as_json: _Json = False,
) -> None:
    """Adopt files that are on this machine already, after checking their digests."""
    from neurocl.data.install import import_files

    _print_folder(name, import_files(name, path, data_dir=data_dir), as_json)


@app.command()
def path(name: _Name, data_dir: _DataDir = None) -> None:
    """Print the folder of a set, for scripts."""
    from neurocl.data.install import state
    from neurocl.data.locate import absent
    from neurocl.data.sources import find_source

    source = find_source(name)
    status, folder = state(name, data_dir=data_dir)
    if status != "complete":
        raise absent(source.name, data_dir, downloadable=source.downloadable)
    typer.echo(str(folder))


def _row(benchmark: Benchmark, data_dir: Path | None) -> dict[str, Any]:
    from neurocl.data.install import state
    from neurocl.data.sources import SOURCES

    source = SOURCES.get(benchmark.source)
    status: str = "embedded"
    folder: Path | None = None
    if source is not None:
        status, folder = state(source.name, data_dir=data_dir)
    return {
        "name": benchmark.name,
        "source": benchmark.source,
        "summary": benchmark.summary,
        "task_sizes": list(benchmark.task_sizes),
        "image_shape": list(benchmark.image_shape),
        "is_events": benchmark.is_events,
        "download_bytes": _download_bytes(source),
        "licence": benchmark.licence,
        "state": status,
        "folder": str(folder) if folder is not None else None,
    }


def _facts(name: str, benchmark: Benchmark | None, source: Source | None, data_dir: Path | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": name}
    if benchmark is not None:
        facts = _row(benchmark, data_dir) | {
            "mean": benchmark.mean,
            "std": benchmark.std,
            "augment": benchmark.augment,
            "epochs": benchmark.epochs,
            "batch_size": benchmark.batch_size,
        }
    elif source is not None:
        from neurocl.data.install import state

        status, folder = state(source.name, data_dir=data_dir)
        facts |= {"licence": source.licence, "state": status, "folder": str(folder) if folder else None}
    if source is not None:
        facts |= {
            "classes": source.num_classes,
            "citation": source.citation,
            "disk_bytes": source.disk_bytes,
            "files": [
                {
                    "name": file.name,
                    "bytes": file.num_bytes,
                    "digest": file.digest,
                    "urls": list(file.urls),
                }
                for file in source.files
            ],
        }
    return facts


def _download_bytes(source: Source | None) -> int | None:
    if source is None:
        return 0
    sizes = [file.num_bytes for file in source.files]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _megabytes(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "?"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes else "-"


def _tasks(sizes: list[int]) -> str:
    return f"{len(sizes)}x{sizes[0]}" if len(set(sizes)) == 1 else " + ".join(map(str, sizes))


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _print_folder(name: str, folder: Path, as_json: bool) -> None:
    typer.echo(json.dumps({"name": name, "folder": str(folder)}) if as_json else str(folder))


def _table(*columns: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns[:-1]:
        table.add_column(column, no_wrap=len(columns) > 3, overflow="fold")
    table.add_column(columns[-1], overflow="fold")
    return table


def _print(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


class _progress:
    """A progress bar on stderr; entering it gives the callback of ``download``."""

    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(name, total=None)

    def __enter__(self) -> Any:
        self._bar.start()
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()
