"""What a federated run is judged by: accuracy and forgetting over tasks, fairness over clients, accuracy per byte.

T tasks, K clients. ``correct[t, i]`` counts the right answers on task i's test set after training on task t, among
``total[i]`` samples; entries with i > t are not looked at. Accuracies are in per cent. Tasks may differ in size, so the
mean over samples (micro) and the mean over tasks (macro) differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.integer[Any]]
Matrix = NDArray[np.float64]


def accuracy_matrix(correct: Counts, total: Counts) -> Matrix:
    """``a[t, i]``, the accuracy on task i after task t, [T, T]; NaN for i > t.

    Raises:
        ValueError: shapes that do not belong together, a task without test samples, counts outside 0..total.
    """
    num_tasks = len(total)
    if correct.shape != (num_tasks, num_tasks) or num_tasks == 0:
        raise ValueError(f"correct must be [T, T] and total [T] with T >= 1, got {correct.shape} and {total.shape}")
    seen = np.tril(np.ones((num_tasks, num_tasks), bool))
    if (total < 1).any() or (correct < 0)[seen].any() or (correct > total)[seen].any():
        raise ValueError("every task needs test samples, and 0 <= correct <= total must hold")
    return np.where(seen, 100.0 * correct / total, np.nan)


def final_average_accuracy(correct: Counts, total: Counts) -> float:
    """Right answers over all test sets together after the last task (micro): the papers' FAA."""
    return float(100.0 * correct[-1].sum() / total.sum())


def final_macro_accuracy(correct: Counts, total: Counts) -> float:
    """Mean over tasks of the accuracy after the last task."""
    return float(accuracy_matrix(correct, total)[-1].mean())


def average_incremental_accuracy(correct: Counts, total: Counts) -> float:
    """Mean over t of the micro accuracy on tasks 0..t after task t."""
    return float(np.mean(100.0 * np.tril(correct).sum(axis=1) / np.cumsum(total)))


def forgetting(accuracy: Matrix) -> float:
    """Mean over i < T-1 of (best a[t, i] with i <= t < T-1) - a[T-1, i]; may be negative. 0 for one task."""
    if len(accuracy) < 2:
        return 0.0
    best = np.where(np.isnan(accuracy), -np.inf, accuracy)[:-1, :-1].max(axis=0)
    return float(np.mean(best - accuracy[-1, :-1]))


def forgetting_fm(accuracy: Matrix) -> float:
    """The published code's variant: mean over all T tasks, the last (always 0) included, of a[i, i] - a[T-1, i]."""
    return float(np.mean(np.diag(accuracy) - accuracy[-1]))


def backward_transfer(accuracy: Matrix) -> float:
    """Mean over i < T-1 of a[T-1, i] - a[i, i]. 0 for one task."""
    if len(accuracy) < 2:
        return 0.0
    return float(np.mean((accuracy[-1] - np.diag(accuracy))[:-1]))


def summarize(correct: Counts, total: Counts) -> dict[str, float]:
    """All metrics over tasks by their names in ``result.json``."""
    accuracy = accuracy_matrix(correct, total)
    return {
        "final_average_accuracy": final_average_accuracy(correct, total),
        "final_macro_accuracy": final_macro_accuracy(correct, total),
        "average_incremental_accuracy": average_incremental_accuracy(correct, total),
        "forgetting": forgetting(accuracy),
        "forgetting_fm": forgetting_fm(accuracy),
        "backward_transfer": backward_transfer(accuracy),
    }


def client_accuracies(correct: Counts, total: Counts) -> Matrix:
    """Accuracy of each client on its own test share, [K]; NaN for a client without test samples."""
    return np.where(total > 0, 100.0 * correct / np.maximum(total, 1), np.nan)


def client_fairness(accuracies: Matrix) -> dict[str, float]:
    """Mean, standard deviation (over these clients, not an estimate for others) and minimum over clients, [K].

    Clients without test samples (NaN) are left out.

    Raises:
        ValueError: no client has test samples.
    """
    known = accuracies[~np.isnan(accuracies)]
    if not len(known):
        raise ValueError("no client has test samples")
    return {
        "client_accuracy_mean": float(known.mean()),
        "client_accuracy_std": float(known.std()),
        "client_accuracy_min": float(known.min()),
    }


def bytes_to_accuracy(num_bytes: Counts, accuracy: Matrix, target: float) -> int | None:
    """Bytes exchanged when the accuracy first reached ``target``, None if it never did.

    Args:
        num_bytes: [L] bytes exchanged so far, up and down, at each evaluation; never decreasing.
        accuracy: [L] in per cent; NaN counts as not reached.
        target: in per cent.

    Raises:
        ValueError: lengths differ or the bytes decrease.
    """
    if num_bytes.shape != accuracy.shape or (np.diff(num_bytes) < 0).any():
        raise ValueError("the log needs one accuracy per count of bytes, and the bytes must add up over time")
    reached = np.flatnonzero(accuracy >= target)
    return int(num_bytes[reached[0]]) if len(reached) else None
