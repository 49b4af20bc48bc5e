"""What a run tells about itself while it works; the silent base class is the default in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class Progress:
    """Receives the loop's events. Override what is to be shown; every method does nothing here."""

    def start(self, description: str, num_tasks: int, total_steps: int, done_steps: int) -> None:
        """A run begins, or goes on after ``done_steps`` optimiser steps."""

    def step(self, task: int, epoch: int, epochs: int, losses: Mapping[str, float], images_per_second: float) -> None:
        """One optimiser step is done; ``losses`` are this epoch's means so far."""

    def evaluated(self, task: int, class_il: Sequence[float], task_il: Sequence[float]) -> None:
        """Accuracies in per cent on the tasks seen so far, after training on ``task``."""

    def message(self, text: str) -> None:
        """One line for the user."""

    def stop(self) -> None:
        """The run ended, for whatever reason."""
