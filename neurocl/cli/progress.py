"""Progress on stderr: a live bar on a terminal, one plain line per epoch elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from neurocl.continual.progress import Progress as RunProgress


def _accuracies(class_il: Sequence[float], task_il: Sequence[float]) -> str:
    mean_class, mean_task = sum(class_il) / len(class_il), sum(task_il) / len(task_il)
    listed = "  ".join(f"{value:5.1f}" for value in class_il)
    return f"class-IL {mean_class:5.1f} %  task-IL {mean_task:5.1f} %   class-IL per task: {listed}"


class TerminalProgress(RunProgress):
    """A rich progress bar; results of finished tasks stay above it."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self._console,
            transient=True,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("", total=None, detail="")
        self._num_tasks = 1
        self._done = 0
        self._shown = 0.0

    def start(self, description: str, num_tasks: int, total_steps: int, done_steps: int) -> None:
        self._num_tasks, self._done = num_tasks, done_steps
        self._console.print(f"[bold]{description}[/bold]", highlight=False)
        self._bar.update(self._task, total=total_steps, completed=done_steps)
        self._bar.start()

    def step(self, task: int, epoch: int, epochs: int, losses: Mapping[str, float], images_per_second: float) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._shown < 0.2:
            return
        self._shown = now
        detail = f"loss {losses.get('total', 0.0):.3f}  {images_per_second:.0f} items/s"
        description = f"task {task + 1}/{self._num_tasks} epoch {epoch + 1}/{epochs}"
        self._bar.update(self._task, completed=self._done, description=description, detail=detail)

    def evaluated(self, task: int, class_il: Sequence[float], task_il: Sequence[float]) -> None:
        line = f"after task {task + 1}: {_accuracies(class_il, task_il)}"
        self._bar.console.print(line, highlight=False, soft_wrap=True)

    def message(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self._bar.stop()


class PlainProgress(RunProgress):
    """Lines for logs: every task, every ten seconds, every evaluation."""

    def __init__(self) -> None:
        self._num_tasks = 1
        self._last: tuple[int, int] | None = None
        self._printed = 0.0

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def start(self, description: str, num_tasks: int, total_steps: int, done_steps: int) -> None:
        self._num_tasks = num_tasks
        more = f", going on after {done_steps}" if done_steps else ""
        self._print(f"{description}: {num_tasks} tasks, {total_steps} steps{more}")

    def step(self, task: int, epoch: int, epochs: int, losses: Mapping[str, float], images_per_second: float) -> None:
        now = time.monotonic()
        fresh = self._last is None or self._last[0] != task
        if fresh or now - self._printed > 10:
            # the first step of a task has nothing to average its speed over
            rate = "" if fresh else f" {images_per_second:.0f} items/s"
            self._last, self._printed = (task, epoch), now
            loss = losses.get("total", 0.0)
            self._print(f"task {task + 1}/{self._num_tasks} epoch {epoch + 1}/{epochs} loss {loss:.4f}{rate}")

    def evaluated(self, task: int, class_il: Sequence[float], task_il: Sequence[float]) -> None:
        self._print(f"after task {task + 1}: {_accuracies(class_il, task_il)}")

    def message(self, text: str) -> None:
        self._print(text)


def make_progress(quiet: bool) -> RunProgress:
    """Silent, live, or plain, depending on the flag and on where stderr goes."""
    if quiet:
        return RunProgress()
    return TerminalProgress() if sys.stderr.isatty() else PlainProgress()
