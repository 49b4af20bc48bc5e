"""A data set refuses arrays that do not fit together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from neurocl.data import ArrayDataset
from neurocl.errors import UserError


def arrays(**changes: Any) -> dict[str, Any]:
    good: dict[str, Any] = {
        "name": "toy",
        "train_images": np.zeros((4, 1, 2, 3), np.uint8),
        "train_labels": np.array([0, 1, 1, 0]),
        "test_images": np.zeros((2, 1, 2, 3), np.uint8),
        "test_labels": np.array([0, 1]),
        "class_names": ("a", "b"),
    }
    return good | changes


def test_pictures_and_event_frames_are_told_apart_by_the_time_axis() -> None:
    assert not ArrayDataset(**arrays()).is_events
    frames = {f"{split}_images": np.zeros((n, 5, 2, 3, 3), np.uint8) for split, n in (("train", 4), ("test", 2))}
    assert ArrayDataset(**arrays(**frames)).is_events


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.array([0, 1])}, "toy: the training split has 4 pictures but 2 labels"),
        ({"train_labels": np.array([0, 1, 2, 0])}, "labels from 0 to 2; 2 classes allow 0 to 1"),
        ({"test_labels": np.array([-1, 1])}, "labels from -1 to 1"),
        ({"test_labels": np.array([0, 1], np.int32)}, "needs int64 labels"),
        ({"train_images": np.zeros((4, 1, 2, 3))}, r"uint8 pictures .* got float64"),
        ({"train_images": np.zeros((4, 2, 3), np.uint8)}, r"got uint8 \[4, 2, 3\]"),
        ({"train_images": np.zeros((4, 2, 3, 1), np.uint8).transpose(0, 3, 2, 1)}, "C-contiguous"),
        ({"test_images": np.zeros((2, 1, 2, 4), np.uint8)}, "training pictures have shape"),
        (
            {"test_images": np.zeros((0, 1, 2, 3), np.uint8), "test_labels": np.zeros(0, np.int64)},
            "the test split is empty",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ArrayDataset(**arrays(**changes))
