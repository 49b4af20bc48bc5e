"""Train STAER on the embedded digits from Python, watch it with a progress class of your own, read the matrices."""

from collections.abc import Sequence

import numpy as np

from neurocl import continual
from neurocl.continual.progress import Progress


class OneLinePerTask(Progress):
    """Override only the events that you want to hear about."""

    def evaluated(self, task: int, class_il: Sequence[float], task_il: Sequence[float]) -> None:
        print(f"after task {task + 1}: Class-IL {np.mean(class_il):5.1f} %, Task-IL {np.mean(task_il):5.1f} %")


def main() -> None:
    result = continual.train(
        area="spiking",
        method="staer",
        options={"beta": 0.01},
        dataset="seq-digits",
        buffer_size=50,
        epochs=5,  # a quarter of the default
        threads=1,
        keep=False,  # no run folder
        progress=OneLinePerTask(),
    )
    print("\nClass-IL accuracy in %, a row after each task, a column for each task:")
    for row in result.class_il:
        print("  ".join("    -" if np.isnan(value) else f"{value:5.1f}" for value in row))
    metrics = result.metrics["class_il"]
    print(f"\nfinal average {metrics['final_average_accuracy']:.1f} %, forgetting {metrics['forgetting']:.1f} points")


if __name__ == "__main__":
    main()
