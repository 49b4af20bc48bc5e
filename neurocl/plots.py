"""The pictures of a report: accuracy over tasks, forgetting, and the accuracy matrix of every method."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from neurocl.report import Row

Curves = dict[str, NDArray[np.float64]]

MAX_MATRICES = 12
KINDS = {"class_il": "Class-IL", "task_il": "Task-IL"}


def _kinds(rows: Sequence[Row]) -> dict[str, str]:
    """Titles of the protocols that some row was measured in; a federation only in one."""
    return {kind: title for kind, title in KINDS.items() if any(kind in row.documents[0]["accuracy"] for row in rows)}


def _matrices(row: Row, kind: str) -> NDArray[np.float64]:
    """Accuracy matrices of a row's runs, [runs, stages, tasks]; only the stages that all runs reached."""
    arrays = [np.array(document["accuracy"][kind], dtype=np.float64) for document in row.documents]
    stages = min(len(array) for array in arrays)
    return np.stack([array[:stages] for array in arrays])


def _bytes(figure: Any, form: str) -> bytes:
    import matplotlib.pyplot as plt

    stream = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else None
    figure.savefig(stream, format=form, dpi=130, bbox_inches="tight", metadata=metadata)
    plt.close(figure)
    return stream.getvalue()


def _band(axes: Any, curves: NDArray[np.float64], label: str, color: str, first: int = 1) -> None:
    """Mean over runs [runs, points] with a band of one standard deviation."""
    x = np.arange(first, first + curves.shape[1])
    mean = curves.mean(axis=0)
    axes.plot(x, mean, marker="o", label=label, color=color)
    if len(curves) > 1:
        spread = curves.std(axis=0, ddof=1)
        axes.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.18, linewidth=0)


def _average_so_far(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """[runs, stages]: mean accuracy on the tasks learnt so far, after each stage."""
    return np.stack([matrices[:, i, : i + 1].mean(axis=1) for i in range(matrices.shape[1])], axis=1)


def _forgetting_so_far(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """[runs, stages - 1]: mean over old tasks of (best accuracy before) - (accuracy now), from the second stage on."""
    stages = [
        np.stack([matrices[:, j:i, j].max(axis=1) - matrices[:, i, j] for j in range(i)], axis=1).mean(axis=1)
        for i in range(1, matrices.shape[1])
    ]
    return np.stack(stages, axis=1)


def figures(rows: Sequence[Row], form: str) -> dict[str, bytes]:
    """Every picture by title, as bytes of ``form`` (``"png"`` or ``"svg"``)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn: dict[str, bytes] = {}
    with plt.rc_context({"svg.hashsalt": "neurocl", "axes.spines.top": False, "axes.spines.right": False}):
        colors = [f"C{index % 10}" for index in range(len(rows))]
        drawn["accuracy per task"] = _bytes(_accuracy_figure(rows, colors), form)
        sequential = [row for row in rows if _matrices(row, "class_il").shape[1] > 1]
        if sequential:
            drawn["forgetting"] = _bytes(_forgetting_figure(rows, colors), form)
        for row in sequential[:MAX_MATRICES]:
            drawn[f"accuracy matrix, {row.label}"] = _bytes(_matrix_figure(row), form)
    return drawn


def _accuracy_figure(rows: Sequence[Row], colors: Sequence[str]) -> Any:
    import matplotlib.pyplot as plt

    kinds = _kinds(rows)
    figure, panels = plt.subplots(1, len(kinds), figsize=(4.75 * len(kinds), 3.8), sharey=True, squeeze=False)
    for axes, (kind, title) in zip(panels[0], kinds.items(), strict=True):
        for row, color in zip(rows, colors, strict=True):
            if kind not in row.documents[0]["accuracy"]:
                continue
            matrices = _matrices(row, kind)
            num_tasks = matrices.shape[2]
            if matrices.shape[1] == 1 < num_tasks:
                level = matrices[:, 0].mean()
                axes.axhline(level, color=color, linestyle="--", label=f"{row.label} (all tasks at once)")
            else:
                _band(axes, _average_so_far(matrices), row.label, color)
            axes.set_xticks(range(1, num_tasks + 1))
        axes.set(title=title, xlabel="tasks learnt", ylim=(0, 102))
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("mean accuracy on tasks learnt (%)")
    panels[0, -1].legend(frameon=False, loc="lower left", fontsize="small")
    return figure


def _forgetting_figure(rows: Sequence[Row], colors: Sequence[str]) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.4, 3.6))
    for row, color in zip(rows, colors, strict=True):
        matrices = _matrices(row, "class_il")
        if matrices.shape[1] > 1:
            _band(axes, _forgetting_so_far(matrices), row.label, color, first=2)
            axes.set_xticks(range(2, matrices.shape[2] + 1))
    axes.set(xlabel="tasks learnt", ylabel="class-IL forgetting (points)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    return figure


def _matrix_figure(row: Row) -> Any:
    import matplotlib.pyplot as plt

    kinds = _kinds([row])
    figure, panels = plt.subplots(1, len(kinds), figsize=(4.1 * len(kinds), 3.6), squeeze=False)
    for axes, (kind, title) in zip(panels[0], kinds.items(), strict=True):
        matrix = _matrices(row, kind).mean(axis=0)
        shown = np.where(np.tri(*matrix.shape) > 0, matrix, np.nan)
        picture = axes.imshow(shown, vmin=0, vmax=100, cmap="viridis")
        for (i, j), value in np.ndenumerate(shown):
            if not np.isnan(value):
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="w" if value < 60 else "k", fontsize=9)
        ticks = np.arange(matrix.shape[1])
        axes.set(
            title=title,
            xlabel="accuracy on task",
            xticks=ticks,
            yticks=np.arange(matrix.shape[0]),
            xticklabels=ticks + 1,
            yticklabels=np.arange(matrix.shape[0]) + 1,
        )
        axes.spines[:].set_visible(False)
    panels[0, 0].set_ylabel("after task")
    figure.suptitle(row.label)
    figure.colorbar(picture, ax=panels, label="%", fraction=0.03)
    return figure
