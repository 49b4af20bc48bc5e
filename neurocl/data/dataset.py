"""A labelled data set held as arrays: what every reader returns and every scenario cuts into tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neurocl.errors import UserError

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class ArrayDataset:
    """Training and test pictures with their labels.

    Attributes:
        name: what messages call the set.
        train_images: uint8 [N, C, H, W] grey levels, or [N, T, C, H, W] event counts per time bin (clipped
            at 255); C-contiguous, possibly memory-mapped and read-only.
        train_labels: int64 [N] in ``0 .. K-1``.
        test_images, test_labels: the same for the M test samples.
        class_names: the K names in label order.

    Raises:
        UserError: arrays that do not fit together; the message starts with the name of the set.
    """

    name: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        self._check_split("training", self.train_images, self.train_labels)
        self._check_split("test", self.test_images, self.test_labels)
        train, test = self.train_images.shape[1:], self.test_images.shape[1:]
        if train != test:
            raise UserError(f"{self.name}: training pictures have shape {train}, test pictures {test}")

    @property
    def is_events(self) -> bool:
        """Whether the pictures are event frames with a time axis, [N, T, C, H, W]."""
        return self.train_images.ndim == 5

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def _check_split(self, split: str, images: Images, labels: Labels) -> None:
        what = f"{self.name}: the {split} split"
        if images.dtype != np.uint8 or images.ndim not in (4, 5) or not images.flags.c_contiguous:
            raise UserError(
                f"{what} needs C-contiguous uint8 pictures [N, C, H, W] or [N, T, C, H, W], "
                f"got {images.dtype} {list(images.shape)}"
            )
        if labels.dtype != np.int64 or labels.ndim != 1:
            raise UserError(f"{what} needs int64 labels [N], got {labels.dtype} {list(labels.shape)}")
        if len(images) != len(labels):
            raise UserError(f"{what} has {len(images)} pictures but {len(labels)} labels")
        if len(images) == 0:
            raise UserError(f"{what} is empty")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.num_classes:
            raise UserError(
                f"{what} has labels from {low} to {high}; {self.num_classes} classes allow 0 to {self.num_classes - 1}"
            )
