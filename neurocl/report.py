"""Tables and one-file HTML from the results of run folders; runs that differ in the seed alone become one row."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neurocl.errors import UserError
from neurocl.runs import RunFolder, make_folder, write_atomically

FORMATS = ("table", "csv", "json", "md", "latex", "html")

# column title -> (group, metric) in result.json; a column that no run has is left out
COLUMNS = {
    "class-IL accuracy": ("class_il", "final_average_accuracy"),
    "task-IL accuracy": ("task_il", "final_average_accuracy"),
    "average incremental": ("class_il", "average_incremental_accuracy"),
    "forgetting": ("class_il", "forgetting"),
    "backward transfer": ("class_il", "backward_transfer"),
    "MB up": ("traffic", "up_mb"),
    "MB down": ("traffic", "down_mb"),
}
RUN_ONLY = ("seed", "threads", "device", "data_dir", "checkpoint_seconds", "keep_memory", "tensorboard")


@dataclass(frozen=True)
class Row:
    """Runs that share everything but the seed.

    Attributes:
        label: method and what tells it apart from the other rows.
        documents: their results, ordered by seed.
        values: column title -> one value per run; runs without that metric are left out.
    """

    label: str
    documents: tuple[dict[str, Any], ...]
    values: dict[str, list[float]]

    @property
    def num_runs(self) -> int:
        return len(self.documents)

    def statistics(self, column: str) -> tuple[float, float]:
        """Mean and standard deviation (of the sample, 0 for one run) of a column; NaN without values."""
        values = self.values[column]
        if not values:
            return math.nan, math.nan
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    def cell(self, column: str, plus_minus: str = "±", decimals: int = 2) -> str:
        """``mean ± std``, ``mean`` for one run, ``-`` without values."""
        mean, std = self.statistics(column)
        if math.isnan(mean):
            return "-"
        shown = f"{mean:.{decimals}f}"
        return f"{shown} {plus_minus} {std:.{decimals}f}" if self.num_runs > 1 else shown


def read_results(folders: Sequence[RunFolder]) -> tuple[list[dict[str, Any]], list[str]]:
    """The results of runs, each with its folder under ``"run"``, and a note for every run that has none yet.

    Raises:
        UserError: no run has a result, one is damaged, or one has no accuracies to report.
    """
    documents, notes = [], []
    for folder in {folder.path.resolve(): folder for folder in folders}.values():
        document = folder.read_result() if folder.has_result() else {}
        if document.get("protocol") == "trajectory":
            raise UserError(f"{folder.path} forecasts trajectories; measure it with: neurocl trajectory evaluate")
        if document.get("metrics"):
            documents.append(_with_traffic({**document, "run": str(folder.path)}))
        else:
            notes.append(f"{folder.path} has no result yet; continue it with --resume {folder.path}")
    if not documents:
        raise UserError(notes[0])
    return documents, notes


def _with_traffic(document: dict[str, Any]) -> dict[str, Any]:
    """A federated run's bytes beside its other metrics."""
    if "bytes" not in document:
        return document
    sent = {f"{way}_mb": document["bytes"][way] / 1e6 for way in ("up", "down")}
    return {**document, "metrics": {**document["metrics"], "traffic": sent}}


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Titles of the columns that some row has a value for."""
    return [title for title in COLUMNS if any(row.values[title] for row in rows)]


def _dataset(document: dict[str, Any]) -> str:
    """The data set's name; of a user's own file the last part of its path."""
    return Path(document["dataset"]).name


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value
    return flat


def group(documents: Sequence[dict[str, Any]]) -> list[Row]:
    """Rows of a table, in the order of first appearance; the label names what differs between rows."""
    settings = [
        {
            **{key: value for key, value in _flat(document["config"]).items() if key not in RUN_ONLY},
            "area": document["area"],
            "dataset": _dataset(document),
            "tasks learnt": len(document["accuracy"]["class_il"]),
            "without clients": tuple(document.get("unlearning", {}).get("clients", ())) or None,
        }
        for document in documents
    ]
    groups: dict[str, list[int]] = {}
    for index, setting in enumerate(settings):
        groups.setdefault(json.dumps(setting, default=str, sort_keys=True), []).append(index)
    several_datasets = len({setting["dataset"] for setting in settings}) > 1
    several_areas = len({setting["area"] for setting in settings}) > 1
    rows = []
    for members in groups.values():
        setting = settings[members[0]]
        method, area = setting["method"], setting["area"]
        alike = [other for other in settings if (other["method"], other["area"]) == (method, area)]
        parts = [f"{method} ({area})" if several_areas else str(method)]
        for key, value in sorted(setting.items()):
            differs = len({str(other.get(key)) for other in alike}) > 1
            if value is not None and (differs or (key == "dataset" and several_datasets)):
                parts.append(f"{key.split('.')[-1]} {value}")
        chosen = sorted((documents[index] for index in members), key=lambda document: document["seed"])
        values = {
            title: [d["metrics"][kind][name] for d in chosen if name in d["metrics"].get(kind, {})]
            for title, (kind, name) in COLUMNS.items()
        }
        rows.append(Row(", ".join(parts), tuple(chosen), values))
    return rows


def _protocol(documents: Sequence[dict[str, Any]]) -> str:
    first = documents[0]
    names = ", ".join(dict.fromkeys(_dataset(document) for document in documents))
    tasks = first["protocol"]["tasks"]
    batches = ", ".join(str(size) for size in sorted({d["protocol"]["batch_size"] for d in documents}))
    note = "" if first["protocol"]["evaluated_on"] == "test split" else ", evaluated on a validation split"
    return f"{names}: {len(tasks)} tasks, batch size {batches}, accuracies in %{note}"


def print_summary(documents: Sequence[dict[str, Any]], *, stderr: bool = False) -> None:
    """The table as the terminal shows it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(stderr=stderr, highlight=False)
    rows = group(documents)
    numbers = {"runs": [str(row.num_runs) for row in rows]}
    for title in columns_of(rows):
        shown = title.replace("average incremental", "avg. incr.")
        numbers[shown] = [row.cell(title, decimals=1 if row.num_runs > 1 else 2) for row in rows]
    numbers["s"] = [f"{np.mean([d['seconds']['total'] for d in row.documents]):.0f}" for row in rows]
    words = max(len(word) for row in rows for word in ("method", *row.label.split()))
    console.print(f"[bold]{escape(_protocol(documents))}[/bold]")
    # rich would fold numbers and cut words where the terminal is narrow
    labels = max(len(row.label) for row in rows)
    whole = labels + sum(2 + max(len(title), *map(len, cells)) for title, cells in numbers.items())
    narrow = whole > console.width
    for titles in _in_width(numbers, console.width - min(words, console.width // 3)):
        table = Table(box=None, pad_edge=False)
        table.add_column("method", overflow="fold")
        for title in titles:
            table.add_column("\n".join(title.split(" ")) if narrow else title, justify="right", no_wrap=True)
        for index, row in enumerate(rows):
            table.add_row(escape(row.label), *(numbers[title][index] for title in titles))
        console.print(table)
    unfinished = [document for document in documents if document["status"] != "finished"]
    for document in unfinished:
        done = len(document["accuracy"]["class_il"])
        console.print(
            f"{document['method']}, seed {document['seed']}: {document['status']} after {done} of "
            f"{len(document['protocol']['tasks'])} tasks; its figures are over those",
            markup=False,
        )


def _in_width(columns: dict[str, list[str]], width: int) -> list[list[str]]:
    """Titles of columns, in as many parts as it takes for each to fit; titles are broken into their words."""
    parts: list[list[str]] = [[]]
    left = width
    for title, cells in columns.items():
        needed = 2 + max(len(word) for word in (*title.split(), *cells))
        if needed > left and parts[-1]:
            parts.append([])
            left = width
        parts[-1].append(title)
        left -= needed
    return parts


def print_accuracies(class_il: Sequence[float], task_il: Sequence[float]) -> None:
    """Accuracy per task and its mean, as ``evaluate`` prints them."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for task in range(len(class_il)):
        table.add_column(f"task {task + 1}", justify="right")
    table.add_column("mean", justify="right")
    for name, values in (("class-IL %", class_il), ("task-IL %", task_il)):
        table.add_row(name, *(f"{value:.2f}" for value in values), f"{np.mean(values):.2f}")
    Console(highlight=False).print(table)


def as_csv(documents: Sequence[dict[str, Any]]) -> str:
    """One line per run, every metric in its own column."""
    names = ["run", "area", "method", "dataset", "seed", "status", "buffer_size", "epochs", "batch_size"]
    metrics = sorted({(kind, name) for d in documents for kind, group_ in d["metrics"].items() for name in group_})
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow([*names, *(f"{kind}.{name}" for kind, name in metrics), "seconds"])
    for document in documents:
        settings = {**document["protocol"], **document}
        values = [document["metrics"].get(kind, {}).get(name, "") for kind, name in metrics]
        writer.writerow([*(settings.get(name, "") for name in names), *values, round(document["seconds"]["total"], 2)])
    return stream.getvalue()


def as_json(documents: Sequence[dict[str, Any]]) -> str:
    """The results themselves and the statistics of every row."""
    rows = [
        {
            "label": row.label,
            "runs": [document["run"] for document in row.documents],
            "statistics": {
                title: dict(zip(("mean", "std"), row.statistics(title), strict=True))
                for title in COLUMNS
                if row.values[title]
            },
        }
        for row in group(documents)
    ]
    return json.dumps({"rows": rows, "results": documents}, indent=1)


def as_markdown(documents: Sequence[dict[str, Any]]) -> str:
    """A Markdown table."""
    rows = group(documents)
    columns = columns_of(rows)
    lines = [
        "| method | runs | " + " | ".join(columns) + " |",
        "| --- | ---: |" + " ---: |" * len(columns),
    ]
    for row in rows:
        lines.append(f"| {row.label} | {row.num_runs} | " + " | ".join(row.cell(title) for title in columns) + " |")
    return f"{_protocol(documents)}\n\n" + "\n".join(lines) + "\n"


def as_latex(documents: Sequence[dict[str, Any]]) -> str:
    """A ``tabular`` with booktabs rules."""

    def escape(text: str) -> str:
        for symbol in "&%$#_{}":
            text = text.replace(symbol, f"\\{symbol}")
        return text

    rows = group(documents)
    columns = columns_of(rows)
    lines = [
        f"% {_protocol(documents)}",
        "\\begin{tabular}{lr" + "r" * len(columns) + "}",
        "\\toprule",
        " & ".join(["method", "runs", *columns]) + " \\\\",
        "\\midrule",
    ]
    for row in rows:
        cells = [escape(row.label), str(row.num_runs)]
        for title in columns:
            text = row.cell(title, r"\pm")
            cells.append(f"${text}$" if text != "-" else "--")
        lines.append(" & ".join(cells) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .8rem; border-bottom: 1px solid #d7dce1; }
td:not(:first-child), th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } pre { background: #f3f5f7; padding: .8rem; overflow: auto; }
</style></head><body>
<h1>{{ title }}</h1><p>{{ protocol }}</p>
<table><tr><th>method</th><th>runs</th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr><td>{{ row.label }}</td><td>{{ row.num_runs }}</td>
{% for name in columns %}<td>{{ row.cell(name) }}</td>{% endfor %}</tr>{% endfor %}</table>
{% for name, image in images %}<h2>{{ name }}</h2>
<img alt="{{ name }}" src="data:image/png;base64,{{ image }}">{% endfor %}
<h2>Runs</h2>
{% for document in documents %}<details>
<summary>{{ document.method }} on {{ document.dataset }}, seed {{ document.seed }}
({{ document.status }}, {{ "%.0f" | format(document.seconds.total) }} s, {{ document.machine.cpu }})</summary>
<pre>{{ document.config_text }}</pre></details>{% endfor %}
</body></html>
"""


def as_html(documents: Sequence[dict[str, Any]], images: dict[str, bytes]) -> str:
    """One self-contained page: the table, the pictures (PNG bytes by title) and every run's configuration."""
    import jinja2
    import yaml

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    rows = group(documents)
    shown = [{**d, "config_text": yaml.safe_dump(d["config"], sort_keys=False)} for d in documents]
    return environment.from_string(HTML).render(
        title="neurocl report",
        protocol=_protocol(documents),
        columns=columns_of(rows),
        rows=rows,
        images=[(name, base64.b64encode(data).decode()) for name, data in images.items()],
        documents=shown,
    )


def render(documents: Sequence[dict[str, Any]], form: str) -> str:
    """The report as text in one of ``FORMATS`` except ``table`` (which goes to the terminal).

    Raises:
        UserError: an unknown format.
    """
    if form == "html":
        from neurocl.plots import figures

        return as_html(documents, figures(group(documents), "png"))
    writers = {"csv": as_csv, "json": as_json, "md": as_markdown, "latex": as_latex}
    if form not in writers:
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, got {form!r}")
    return writers[form](documents)


def save_plots(documents: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write every figure as PNG and SVG into ``folder``; returns the paths."""
    from neurocl.plots import figures

    make_folder(folder)
    written: list[Path] = []
    for form in ("png", "svg"):
        for name, data in figures(group(documents), form).items():
            stem = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:100]
            path = folder / f"{stem}.{form}"
            if path in written:
                path = folder / f"{stem}-{len(written)}.{form}"
            write_atomically(path, data)
            written.append(path)
    return written
