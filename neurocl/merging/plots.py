"""The pictures of a comparison: accuracy per merge, accuracy over the scale, subspace alignment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neurocl.merging.comparison import Outcome
from neurocl.runs import make_folder


def save_plots(outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """Draw what there is to draw, as PNG and SVG; returns the PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    make_folder(folder)
    saved = []
    for name, draw in (("accuracy", _accuracy), ("scale", _scale), ("alignment", _alignment)):
        figure = draw(plt, outcomes)
        if figure is None:
            continue
        for suffix in ("png", "svg"):
            figure.savefig(
                folder / f"{name}.{suffix}",
                dpi=130,
                bbox_inches="tight",
                metadata={"Date": None} if suffix == "svg" else None,
            )
        plt.close(figure)
        saved.append(folder / f"{name}.png")
    return saved


def _accuracy(plt: Any, outcomes: Sequence[Outcome]) -> Any:
    """Bars of the mean accuracy, best at the top; dots are the tasks."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.mean)
    figure, axes = plt.subplots(figsize=(7.5, 0.32 * len(ordered) + 1.2))
    fixed = {"base": "0.75", "experts": "0.55"}
    colors = [fixed.get(outcome.name, "tab:orange" if outcome.per_task_model else "tab:blue") for outcome in ordered]
    axes.barh([outcome.name for outcome in ordered], [outcome.mean for outcome in ordered], color=colors, alpha=0.8)
    for row, outcome in enumerate(ordered):
        axes.plot(list(outcome.absolute.values()), [row] * len(outcome.absolute), ".", color="0.2", markersize=3)
        axes.text(outcome.mean + 0.6, row + 0.12, f"{outcome.mean:.1f}", va="bottom", fontsize=7)
    axes.set_xlim(0, 100)
    axes.set_xlabel("test accuracy in %: mean of the tasks (bar), each task (dot)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _scale(plt: Any, outcomes: Sequence[Outcome]) -> Any:
    """Validation accuracy over alpha."""
    swept = [outcome for outcome in outcomes if len(outcome.sweep) > 1]
    if not swept:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.2))
    colors = plt.get_cmap("tab20").colors
    for index, outcome in enumerate(swept):
        alphas = [float(alpha) for alpha in outcome.sweep]
        values = [pair[1] for pair in outcome.sweep.values()]
        axes.plot(alphas, values, marker="o", markersize=3, label=outcome.name, color=colors[index % len(colors)])
    axes.set_xlabel("alpha")
    axes.set_ylabel("validation accuracy, % of the experts")
    axes.legend(fontsize=7, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _alignment(plt: Any, outcomes: Sequence[Outcome]) -> Any:
    """Normalised accuracy over subspace alignment, one dot per task and merge."""
    aligned = [outcome for outcome in outcomes if outcome.alignment]
    experts = next((outcome for outcome in outcomes if outcome.name == "experts"), None)
    if not aligned or experts is None:
        return None
    figure, axes = plt.subplots(figsize=(6.5, 4.2))
    colors = plt.get_cmap("tab20").colors
    for index, outcome in enumerate(aligned):
        tasks = list(outcome.alignment)
        ratios = [100 * outcome.absolute[task] / experts.absolute[task] for task in tasks]
        axes.scatter(
            [outcome.alignment[task] for task in tasks],
            ratios,
            s=14,
            label=outcome.name,
            color=colors[index % len(colors)],
        )
    axes.set_xlabel("mean subspace alignment ratio of the task with the merged matrices")
    axes.set_ylabel("accuracy, % of the expert's")
    axes.legend(fontsize=6, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
