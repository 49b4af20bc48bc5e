"""Continual-learning metrics, all computed from the stored accuracy matrix.

``R[i, j]`` is the accuracy in per cent on task j after training on task i; ``n`` tasks. Formulas:
Lopez-Paz and Ranzato, 2017 (backward and forward transfer); Chaudhry et al., 2018 (forgetting);
Rebuffi et al., 2017 (average incremental accuracy).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def final_average_accuracy(accuracy: Matrix) -> float:
    """Mean of the last row."""
    return float(accuracy[-1].mean())


def average_incremental_accuracy(accuracy: Matrix) -> float:
    """Mean over i of the mean accuracy on tasks 0..i after task i."""
    return float(np.mean([row[: i + 1].mean() for i, row in enumerate(accuracy)]))


def forgetting(accuracy: Matrix) -> float:
    """Mean over old tasks of (best accuracy in rows j..n-2) - (final accuracy); may be negative. 0 for one task."""
    n = len(accuracy)
    if n < 2:
        return 0.0
    return float(np.mean([accuracy[j : n - 1, j].max() - accuracy[-1, j] for j in range(n - 1)]))


def forgetting_with_last(accuracy: Matrix) -> float:
    """Mammoth's variant: the maximum runs over all rows, the last included, so it is never negative.

    Entries above the diagonal (tasks not trained yet) count as 0.
    """
    n = len(accuracy)
    if n < 2:
        return 0.0
    seen = np.tril(accuracy)
    return float(np.mean(seen[:, : n - 1].max(axis=0) - accuracy[-1, : n - 1]))


def backward_transfer(accuracy: Matrix) -> float:
    """Mean over old tasks of R[n-1, j] - R[j, j]."""
    n = len(accuracy)
    return float(np.mean(accuracy[-1, : n - 1] - np.diag(accuracy)[: n - 1])) if n > 1 else 0.0


def forward_transfer(accuracy: Matrix, untrained: NDArray[np.float64]) -> float:
    """Mean over j >= 1 of R[j-1, j] - (accuracy on task j of the untrained network)."""
    n = len(accuracy)
    return float(np.mean([accuracy[j - 1, j] - untrained[j] for j in range(1, n)])) if n > 1 else 0.0


def task_accuracies(
    logits: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    offsets: NDArray[np.integer[Any]],
    last_task: int,
) -> tuple[Matrix, Matrix]:
    """Class-IL and Task-IL accuracy in per cent on tasks ``0..last_task``.

    Args:
        logits: [N, K] of test items whose labels belong to tasks 0..last_task.
        labels: [N].
        offsets: [n + 1] first class of each task, then K.
        last_task: Class-IL takes the arg-max over the classes of tasks 0..last_task.

    Returns: two vectors [last_task + 1]; NaN for a task without items.
    """
    seen = logits[:, : offsets[last_task + 1]]
    class_il = np.full(last_task + 1, np.nan)
    task_il = np.full(last_task + 1, np.nan)
    predicted = seen.argmax(axis=1) if len(seen) else np.empty(0, np.int64)
    for task in range(last_task + 1):
        low, high = int(offsets[task]), int(offsets[task + 1])
        chosen = (labels >= low) & (labels < high)
        if not chosen.any():
            continue
        class_il[task] = 100.0 * np.mean(predicted[chosen] == labels[chosen])
        task_il[task] = 100.0 * np.mean(logits[chosen, low:high].argmax(axis=1) + low == labels[chosen])
    return class_il, task_il


def summarize(accuracy: Matrix, untrained: NDArray[np.float64] | None = None) -> dict[str, float]:
    """All metrics of a finished matrix by their names in ``result.json``."""
    summary = {
        "final_average_accuracy": final_average_accuracy(accuracy),
        "average_incremental_accuracy": average_incremental_accuracy(accuracy),
        "forgetting": forgetting(accuracy),
        "forgetting_with_last": forgetting_with_last(accuracy),
        "backward_transfer": backward_transfer(accuracy),
    }
    if untrained is not None:
        summary["forward_transfer"] = forward_transfer(accuracy, untrained)
    return summary
