"""A scenario: one data set as a sequence of tasks with disjoint classes, seeded and recorded.

Class-IL and Task-IL share the training run and differ in evaluation only. Letters: N items, K classes, n tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neurocl.errors import UserError

if TYPE_CHECKING:
    from neurocl.data.dataset import ArrayDataset

Int = NDArray[np.int64]

RESIDENT_BYTES = 2 << 30  # a training set up to this size is kept on the accelerator


def class_permutation(num_classes: int, seed: int) -> Int:
    """Seeded class order as Mammoth draws it: ``order[old id] = new id``."""
    return np.random.RandomState(seed).permutation(num_classes).astype(np.int64)


def validation_split(labels: Int, fraction: float, seed: int) -> tuple[Int, Int]:
    """Split off ceil(fraction * count) items of every class.

    Returns: indices of training and of validation items, each ordered by class. Every class is permuted by a
        generator seeded anew with ``seed``, so a class's split does not depend on the other classes.
    """
    train, validation = [], []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = math.ceil(round(len(members) * fraction, 9))
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).numpy()
        validation.append(members[order[:count]])
        train.append(members[order[count:]])
    return np.concatenate(train), np.concatenate(validation)


@dataclass(frozen=True)
class Task:
    """One task of a scenario.

    Attributes:
        index: position in the stream, from 0.
        classes: the task's class ids (consecutive, in the new order).
        images: uint8 training items [N, C, H, W] or event frames [N, T, C, H, W].
        labels: int64 [N], new class ids.
    """

    index: int
    classes: range
    images: Tensor
    labels: Tensor


class Scenario:
    """The stream of tasks.

    Args:
        dataset: arrays of all classes.
        task_sizes: classes per task; their sum may be smaller than the number of classes, the rest is left out.
        class_order: original class ids in the order in which they come; default 0, 1, 2 ...
        val_fraction: above 0, this share of every class's training items replaces the test set.
        seed: of the validation split.
        max_train_per_class, max_test_per_class: keep only the first so many items of a class.

    Raises:
        UserError: sizes or order do not fit the data set.
    """

    def __init__(
        self,
        dataset: ArrayDataset,
        task_sizes: Sequence[int],
        *,
        class_order: Sequence[int] | None = None,
        val_fraction: float = 0.0,
        seed: int = 0,
        max_train_per_class: int | None = None,
        max_test_per_class: int | None = None,
    ) -> None:
        available = len(dataset.class_names)
        order = list(range(available)) if class_order is None else [int(old) for old in class_order]
        if sorted(order) != list(range(available)):
            raise UserError(f"class_order must name each class 0..{available - 1} of {dataset.name} once, got {order}")
        if any(size < 1 for size in task_sizes) or sum(task_sizes) > available or not task_sizes:
            raise UserError(
                f"task_sizes must be positive and sum to at most {available} for {dataset.name}, got {list(task_sizes)}"
            )
        self.dataset_name = dataset.name
        self.task_sizes = tuple(int(size) for size in task_sizes)
        self.offsets = np.concatenate([[0], np.cumsum(self.task_sizes)]).astype(np.int64)
        self.class_order = tuple(order)
        self.class_names = tuple(dataset.class_names[old] for old in order[: self.num_classes])
        self.input_shape = tuple(int(size) for size in dataset.train_images.shape[1:])
        self.is_events = dataset.is_events

        new_id = np.empty(available, np.int64)
        new_id[order] = np.arange(available)
        train_images, train_labels = dataset.train_images, new_id[dataset.train_labels]
        test_images, test_labels = dataset.test_images, new_id[dataset.test_labels]
        train_index = np.arange(len(train_labels))
        if val_fraction > 0:
            train_index, held_out = validation_split(train_labels, val_fraction, seed)
            test_images, test_labels = train_images, train_labels
            test_index = held_out
        else:
            test_index = np.arange(len(test_labels))
        self._train = [
            self._members(train_labels, train_index, task, max_train_per_class) for task in range(len(self.task_sizes))
        ]
        self._test = [
            self._members(test_labels, test_index, task, max_test_per_class) for task in range(len(self.task_sizes))
        ]
        for what, parts in (("training", self._train), ("test", self._test)):
            for task, members in enumerate(parts):
                if not len(members):
                    raise UserError(f"task {task + 1} of {dataset.name} has no {what} items")
        self._train_images, self._train_labels = train_images, train_labels
        self._test_images, self._test_labels = test_images, test_labels
        self._test_cache: dict[int, tuple[Tensor, Tensor]] = {}

    def _members(self, labels: Int, index: Int, task: int, limit: int | None) -> Int:
        """Indices of one task's items in the order of the data set."""
        low, high = self.offsets[task], self.offsets[task + 1]
        chosen = labels[index]
        if limit is None:
            return np.sort(index[(chosen >= low) & (chosen < high)])
        parts = [np.sort(index[chosen == label])[:limit] for label in range(low, high)]
        return np.sort(np.concatenate(parts))

    def __len__(self) -> int:
        return len(self.task_sizes)

    @property
    def num_classes(self) -> int:
        """K, over all tasks."""
        return sum(self.task_sizes)

    @property
    def task_lengths(self) -> list[int]:
        """Number of training items of each task."""
        return [len(members) for members in self._train]

    def task(self, index: int, device: torch.device | None = None) -> Task:
        """One task's training data, on ``device`` if it is small enough."""
        images, labels = _on_device(self._train_images, self._train_labels, self._train[index], device)
        return Task(index, range(int(self.offsets[index]), int(self.offsets[index + 1])), images, labels)

    def merged_task(self, device: torch.device | None = None) -> Task:
        """The training data of all tasks as one, for joint training."""
        images, labels = _on_device(self._train_images, self._train_labels, np.concatenate(self._train), device)
        return Task(0, range(self.num_classes), images, labels)

    def test_data(self, index: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """One task's evaluation items and labels; kept after the first call."""
        if index not in self._test_cache:
            self._test_cache[index] = _on_device(self._test_images, self._test_labels, self._test[index], device)
        return self._test_cache[index]


def _on_device(
    images: NDArray[np.uint8], labels: Int, members: Int, device: torch.device | None
) -> tuple[Tensor, Tensor]:
    """Copy the chosen items out of the (memory-mapped) arrays, to the accelerator where they fit."""
    chosen = torch.from_numpy(np.ascontiguousarray(images[members]))
    chosen_labels = torch.from_numpy(labels[members])
    if device is not None and device.type != "cpu":
        chosen_labels = chosen_labels.to(device)
        if chosen.numel() <= RESIDENT_BYTES:
            chosen = chosen.to(device)
    return chosen, chosen_labels
