"""How good a merged network is: absolute and normalised accuracy per task, with the task known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from neurocl.devices import Runtime
from neurocl.errors import UserError
from neurocl.merging.suite import Items, Split, Suite, logits, network


def accuracy(model: nn.Module, items: Items, head: torch.Tensor, runtime: Runtime) -> float:
    """Share of items whose nearest class vector is their own, in percent."""
    right = 0
    head = head.to(runtime.device)
    with torch.inference_mode():
        for inputs, labels in items.batches(256):
            with runtime.autocast():
                embedding = model(inputs.to(runtime.device))
            right += int((logits(embedding, head).argmax(dim=1).cpu() == labels).sum())
    return 100.0 * right / len(items)


@dataclass(frozen=True)
class Scores:
    """Accuracy of one network on every task of a suite, in percent.

    Attributes:
        absolute: by task.
        reference: of the task's own expert, by task.
    """

    absolute: dict[str, float]
    reference: dict[str, float]

    @property
    def normalised(self) -> dict[str, float]:
        """Percent of the expert's accuracy, by task.

        Raises:
            UserError: an expert got nothing right.
        """
        useless = [task for task in self.absolute if not self.reference[task]]
        if useless:
            raise UserError(
                f"the expert of {useless[0]} gets no picture right, so there is no share of its accuracy to take; "
                "train it longer or measure on more pictures"
            )
        return {task: 100.0 * value / self.reference[task] for task, value in self.absolute.items()}

    @property
    def mean_absolute(self) -> float:
        return sum(self.absolute.values()) / len(self.absolute)

    @property
    def mean_normalised(self) -> float:
        """Mean of the ratios, not ratio of the means."""
        values = self.normalised.values()
        return sum(values) / len(values)


class Evaluator:
    """Measures networks on one suite; the experts' own accuracies are measured once.

    Args:
        suite: the tasks.
        runtime: device and number format.
        max_items: validation and test items used of each task; None is all.
    """

    def __init__(self, suite: Suite, runtime: Runtime, max_items: int | None = None) -> None:
        self.suite = suite
        self.runtime = runtime
        self.max_items = max_items
        self._experts: dict[Split, dict[str, float]] = {}
        self._items: dict[tuple[str, Split], Items] = {}

    def scores(self, state: Mapping[str, torch.Tensor], split: Split = "test") -> Scores:
        """Accuracies of the network with these weights on every task."""
        model = network(self.suite.network_config, state).to(self.runtime.device)
        absolute = {task: self._accuracy(model, task, split) for task in self.suite.tasks}
        return Scores(absolute, self.experts(split))

    def experts(self, split: Split = "test") -> dict[str, float]:
        """Accuracy of each expert on its own task."""
        if split not in self._experts:
            found = {}
            for task, state in self.suite.experts.items():
                model = network(self.suite.network_config, state).to(self.runtime.device)
                found[task] = self._accuracy(model, task, split)
            self._experts[split] = found
        return self._experts[split]

    def of_task(self, state: Mapping[str, torch.Tensor], task: str, split: Split = "test") -> float:
        """Accuracy on one task."""
        model = network(self.suite.network_config, state).to(self.runtime.device)
        return self._accuracy(model, task, split)

    def _accuracy(self, model: nn.Module, task: str, split: Split) -> float:
        key = (task, split)
        if key not in self._items:
            items = self.suite.items(task, split)
            self._items[key] = items.first(self.max_items) if self.max_items else items
        return accuracy(model, self._items[key], self.suite.heads[task], self.runtime)
