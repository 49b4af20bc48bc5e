"""A comparison as a table: for the terminal, Markdown, csv or JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict

from neurocl.merging.comparison import Outcome

FORMATS = ("table", "md", "csv", "json")


def comparison_table(outcomes: Sequence[Outcome], form: str = "table") -> str:
    """Rows from the best mean accuracy to the worst; ``form`` is one of :data:`FORMATS`."""
    ordered = sorted(outcomes, key=lambda outcome: -outcome.mean)
    if form == "json":
        rows = [
            {**asdict(outcome), "mean": outcome.mean, "alpha": None if math.isnan(outcome.alpha) else outcome.alpha}
            for outcome in ordered
        ]
        return json.dumps(rows, indent=1)
    tasks = list(ordered[0].absolute)
    header = ["merge", "alpha", *tasks, "mean %", "of experts %", "s"]
    cells = [
        [
            outcome.name,
            "" if math.isnan(outcome.alpha) else f"{outcome.alpha:g}",
            *(f"{outcome.absolute[task]:.1f}" for task in tasks),
            f"{outcome.mean:.1f}",
            f"{outcome.normalised:.1f}",
            f"{outcome.seconds:.1f}",
        ]
        for outcome in ordered
    ]
    if form == "csv":
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([header, *cells])
        return stream.getvalue().rstrip()
    if form == "md":
        lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])
    return _terminal(header, cells)


def _terminal(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(header):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in cells:
        table.add_row(*row)
    console = Console(highlight=False, width=max(100, 22 + 10 * len(header)))
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()
