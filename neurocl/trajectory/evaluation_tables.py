"""An evaluation as tables to read: in a terminal of 80 columns, in Markdown, and as one table of every number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from neurocl.trajectory.evaluation import COMPARED, Evaluation, Scores

SHORT = {"constant velocity": "CV", "nearest neighbours": "neighbours", "fitted ": ""}
BINS_HEADER = ["predicted", "turned out", "forecasts"]


@dataclass(frozen=True)
class Table:
    """Cells of text under a header, some of them the best of their column.

    Attributes:
        header: name of every column.
        rows: as many cells each.
        best: (row, column) of the cells that stand out.
    """

    header: list[str]
    rows: list[list[str]]
    best: frozenset[tuple[int, int]] = frozenset()

    def marked(self, before: str, after: str) -> list[list[str]]:
        """The rows with marks around the best cells."""
        return [
            [f"{before}{cell}{after}" if (row, column) in self.best else cell for column, cell in enumerate(cells)]
            for row, cells in enumerate(self.rows)
        ]

    def markdown(self) -> str:
        """As Markdown, names to the left and numbers to the right."""
        lines = ["| " + " | ".join(self.header) + " |", "|---|" + "---:|" * (len(self.header) - 1)]
        return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in self.marked("**", "**"))]) + "\n"


def main_table(found: Evaluation, *, short: bool = False) -> Table:
    """Every forecaster by the metrics that are compared, and how far the model is from the best baseline.

    Args:
        found: the evaluation.
        short: names that fit a terminal.
    """
    columns = [
        ([row.numbers.get(metric) for row in found.rows], [row.best_baseline.get(metric) for row in found.rows])
        for metric in COMPARED
    ]
    header = ["forecaster", "K", *COMPARED, "ms / scene"]
    if short:
        header = ["forecaster", "K", *(metric.removesuffix(" rate") for metric in COMPARED), "ms"]
    rows = [[_short(row.name) if short else row.name, str(row.num_forecasts)] for row in found.rows]
    asked = len(_models(found)) - 1
    compares = bool(found.rows[asked].best_baseline)
    if compares:
        rows.append(["less best baseline", ""])
    best = set()
    for index, (values, comparisons) in enumerate(columns):
        texts = _numbers(values)
        for cells, text in zip(rows, texts, strict=False):
            cells.append(text)
        best |= {(row, index + 2) for row in _smallest(values)}
        comparison = comparisons[asked]
        if compares:
            digits = _digits(values)
            rows[-1].append(
                "" if comparison is None else f"{comparison.difference:+.{digits}f}" + "*" * comparison.clear
            )
    for row, cells in zip(found.rows, rows, strict=False):
        cells.append(f"{row.milliseconds:.1f}")
    if compares:
        rows[-1].append("")
    return Table(header, rows, frozenset(best))


def horizon_table(found: Evaluation, *, short: bool = False) -> Table:
    """minADE / minFDE of every forecaster after each of the horizons."""
    hz = found.settings["hz"]
    keys = [(f"minADE@{steps}", f"minFDE@{steps}") for steps in found.horizons]
    values = [[(row.numbers[ade], row.numbers[fde]) for row in found.rows] for ade, fde in keys]
    header = [f"{steps} steps, {steps / hz:.1f} s" if not short else f"{steps / hz:.1f} s" for steps in found.horizons]
    return _pairs(found, header, values, short)


def count_table(found: Evaluation, *, short: bool = False) -> Table:
    """minADE / minFDE of every forecaster with fewer forecasts, and with all."""
    counts = list(found.rows[0].by_count)
    values = [
        [(row.by_count[count]["minADE"], row.by_count[count]["minFDE"]) for row in found.rows] for count in counts
    ]
    header = [f"K = {count}" for count in counts]
    if found.settings["num_forecasts"] not in counts:
        values.append([(row.numbers["minADE"], row.numbers["minFDE"]) for row in found.rows])
        header.append(f"K = {found.settings['num_forecasts']}")
    return _pairs(found, header, values, short)


def every_number(found: Evaluation) -> Table:
    """All metrics of every forecaster, with intervals, for a spreadsheet."""
    metrics = list(dict.fromkeys(metric for row in found.rows for metric in row.numbers))
    bounded = list(dict.fromkeys(metric for row in found.rows for metric in row.intervals))
    header = ["forecaster", "K", *metrics]
    header += [f"{metric} {end}" for metric in bounded for end in ("low", "high")] + ["ms / scene"]
    rows = []
    for row in found.rows:
        cells = [row.name, str(row.num_forecasts), *(_plain(row.numbers.get(metric)) for metric in metrics)]
        cells += [_plain(end) for metric in bounded for end in row.intervals.get(metric, (None, None))]
        rows.append([*cells, _plain(row.milliseconds)])
    return Table(header, rows)


def summary(found: Evaluation) -> list[str]:
    """What was measured and how, in sentences of their own."""
    facts = found.settings
    how = f"{facts['num_forecasts']} {facts['select']}"
    if facts["select"] != "samples":
        how += f" of {facts['num_samples']} samples"
    machine = facts["machine"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    where = machine.get("gpu") or f"{machine['device']}, {threads}"
    return [
        f"{facts['dataset']}: {facts['num_scenes']} scenes, {facts['num_agents']} agents, in {facts['unit']}",
        f"{how}{', whole scenes' if facts['joint'] else ''}, {facts['steps']} steps, seed {facts['seed']}; {where}",
    ]


def verdicts(found: Evaluation) -> list[str]:
    """The model's errors with intervals, and a line per metric on whether it beats the best baseline."""
    model = _models(found)[-1]
    intervals = {name: f"{low:.3f} to {high:.3f}" for name, (low, high) in model.intervals.items()}
    told = ", ".join(f"{name} {model.numbers[name]:.3f} ({intervals[name]})" for name in ("minADE", "minFDE"))
    lines = [f"{model.name}: {told}"]
    if model.best_baseline:
        lines.append("Against the best baseline of each column (* where zero is outside the interval):")
    for metric, versus in model.best_baseline.items():
        word = ("better than" if versus.difference < 0 else "worse than") if versus.clear else "level with"
        interval = f"{versus.difference:+.3f} ({versus.low:+.3f} to {versus.high:+.3f})"
        lines.append(f"  {metric:<9} {interval:<27} {word} {_short(versus.baseline)}")
    return [*lines, "Intervals are of 95 %, over scenes drawn again."]


def calibration_lines(found: Evaluation) -> list[str]:
    """How far probabilities and radii can be trusted, in a line each."""
    lines = []
    for name, told in (("masses", "plain masses"), ("tempered", "tempered")):
        if name in found.reliability:
            worth = found.reliability[name]
            lines.append(f"Probabilities, {told}: calibration error {worth.error:.4f}, log loss {worth.log_loss:.3f}")
    for level, shares in found.coverage.items():
        mean = sum(shares) / len(shares)
        by_step = f"{min(shares):.1%} to {max(shares):.1%} by step"
        lines.append(f"Radii of {float(level):.0%} hold {mean:.1%} of the true positions ({by_step})")
    return lines


def markdown(found: Evaluation) -> str:
    """Everything a reader may want of an evaluation, as a Markdown page."""
    parts = [f"# Evaluation on {found.settings['dataset']}\n", _sentences([*summary(found), *found.notes])]
    parts += ["## Metrics\n", main_table(found).markdown()]
    if any(row.best_baseline for row in found.rows):
        parts += [
            "\\* the 95 % interval of the difference over scenes excludes zero.\n",
            "## Against the best baseline\n",
        ]
        parts.append(_versus(found).markdown())
    parts += ["## Intervals of 95 % over scenes\n", _interval_table(found).markdown()]
    if found.horizons:
        parts += ["## minADE / minFDE by horizon\n", horizon_table(found).markdown()]
    if found.rows[0].by_count:
        parts += ["## minADE / minFDE by number of forecasts\n", count_table(found).markdown()]
    rest = [name for name in every_number(found).header[2:] if not re.search(r"@\d| low$| high$", name)]
    rest = [name for name in rest if name not in (*COMPARED, "ms / scene")]
    rows = [[row.name, *(_rounded(row.numbers.get(name)) for name in rest)] for row in found.rows]
    parts += ["## Further metrics\n", Table(["forecaster", *rest], rows).markdown()]
    if found.reliability or found.coverage:
        parts += ["## Calibration\n", _sentences(calibration_lines(found))]
    for name, worth in found.reliability.items():
        bins = [[f"{predicted:.4f}", f"{observed:.4f}", str(count)] for predicted, observed, count in worth.bins]
        parts += [f"Forecasts by probability ({name}), bins of equal size:\n", Table(BINS_HEADER, bins).markdown()]
    versions = ", ".join(f"{name} {version}" for name, version in found.settings["versions"].items())
    return "\n".join([*parts, f"Made with {versions} on {found.settings['machine']['cpu']}.\n"])


def _versus(found: Evaluation) -> Table:
    rows = [
        [
            row.name,
            metric,
            versus.baseline,
            f"{versus.difference:+.3f}",
            f"{versus.low:+.3f} to {versus.high:+.3f}",
            ("better" if versus.difference < 0 else "worse") if versus.clear else "level",
        ]
        for row in found.rows
        for metric, versus in row.best_baseline.items()
    ]
    return Table(["forecaster", "metric", "best baseline", "difference", "interval", "verdict"], rows)


def _interval_table(found: Evaluation) -> Table:
    rows = []
    for row in found.rows:
        ends = (row.intervals.get(metric) for metric in COMPARED)
        rows.append([row.name, *("" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}" for pair in ends)])
    return Table(["forecaster", *COMPARED], rows)


def _pairs(found: Evaluation, header: list[str], values: list[list[tuple[float, float]]], short: bool) -> Table:
    """A column per entry of ``values``, a pair of errors per forecaster."""
    columns, best = [], set()
    for index, column in enumerate(values):
        first, second = ([pair[part] for pair in column] for part in (0, 1))
        texts = zip(_numbers(first), _numbers(second), strict=True)
        columns.append([f"{ade}/{fde}" for ade, fde in texts])
        best |= {(row, index + 1) for row in _smallest(first)}
    names = [_short(row.name) if short else row.name for row in found.rows]
    rows = [[name, *cells] for name, cells in zip(names, zip(*columns, strict=True), strict=True)]
    return Table(["forecaster", *header], rows, frozenset(best))


def _models(found: Evaluation) -> list[Scores]:
    """The rows of the model; the last one is what was asked for."""
    return [row for row in found.rows if row.name.startswith("model, ")]


def _smallest(values: Sequence[float | None]) -> list[int]:
    known = [value for value in values if value is not None]
    return [row for row, value in enumerate(values) if known and value == min(known)]


def _digits(values: Sequence[float | None]) -> int:
    """As many digits after the point as leave a column narrow."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    return 3 if largest < 10 else 2 if largest < 100 else 1


def _numbers(values: Sequence[float | None]) -> list[str]:
    return ["" if value is None else f"{value:.{_digits(values)}f}" for value in values]


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.9g}"


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _short(name: str) -> str:
    for long, short in SHORT.items():
        name = name.replace(long, short)
    return name


def _sentences(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) + "\n"
