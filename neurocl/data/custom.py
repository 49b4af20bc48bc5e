"""A user's own pictures: one npz with train and test arrays becomes a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurocl.data.dataset import ArrayDataset, Images, Labels
from neurocl.data.npz import npz_names, read_npz
from neurocl.errors import UserError

CUSTOM_KEYS = ("train_images", "train_labels", "test_images", "test_labels")


def read_custom(path: Path) -> ArrayDataset:
    """Read an npz with ``train_images``, ``train_labels``, ``test_images``, ``test_labels``.

    Pictures are uint8 [N, C, H, W], [N, H, W, C] or [N, H, W]; where both of the first two readings are
    possible, channel first is taken. Labels are whole numbers from 0. ``class_names`` (text [K]) is
    optional; without it the classes are called by their numbers.

    Raises:
        UserError: a missing array, another dtype or shape, labels out of range.
    """
    names = npz_names(path)
    missing = [key for key in CUSTOM_KEYS if key not in names]
    if missing:
        raise UserError(
            f"{path}: no array {', '.join(missing)}; own data needs {', '.join(CUSTOM_KEYS)} and may have class_names"
        )
    arrays = read_npz(path, [*CUSTOM_KEYS, *(["class_names"] if "class_names" in names else [])])
    train_labels = _labels(path, "train_labels", arrays["train_labels"])
    test_labels = _labels(path, "test_labels", arrays["test_labels"])
    class_names = _class_names(path, arrays.get("class_names"), train_labels, test_labels)
    return ArrayDataset(
        str(path),
        _channel_first(path, "train_images", arrays["train_images"]),
        train_labels,
        _channel_first(path, "test_images", arrays["test_images"]),
        test_labels,
        class_names,
    )


def default_task_sizes(num_classes: int) -> tuple[int, ...]:
    """Tasks of two classes; an odd class joins the last task, since one class alone is no task."""
    if num_classes < 2:
        raise UserError(f"a benchmark needs at least 2 classes, got {num_classes}")
    return (2,) * (num_classes // 2 - 1) + (2 + num_classes % 2,)


def _channel_first(path: Path, key: str, images: NDArray[Any]) -> Images:
    if images.dtype != np.uint8:
        raise UserError(f"{path}: {key} must be uint8 (grey levels 0 to 255), got {images.dtype}")
    if images.ndim == 3:
        return np.ascontiguousarray(images[:, None])
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return np.ascontiguousarray(images)
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    raise UserError(
        f"{path}: {key} must be [N, C, H, W], [N, H, W, C] or [N, H, W] with 1 or 3 channels, got {list(images.shape)}"
    )


def _labels(path: Path, key: str, labels: NDArray[Any]) -> Labels:
    if labels.dtype.kind not in "ui" or labels.ndim != 1 or labels.size == 0:
        raise UserError(f"{path}: {key} must be whole numbers [N], got {labels.dtype} {list(labels.shape)}")
    if int(labels.min()) < 0:
        raise UserError(f"{path}: {key} must start at 0, found {labels.min()}")
    return labels.astype(np.int64)


def _class_names(path: Path, names: NDArray[Any] | None, train: Labels, test: Labels) -> tuple[str, ...]:
    highest = max(int(train.max()), int(test.max()))
    if names is not None:
        if names.dtype.kind != "U" or names.ndim != 1:
            raise UserError(f"{path}: class_names must be text [K], got {names.dtype} {list(names.shape)}")
        if highest >= len(names):
            raise UserError(f"{path}: label {highest} has no name, class_names lists {len(names)}")
        return tuple(str(name) for name in names)
    present = np.unique(train)
    if highest >= len(present):
        # the first place where the sorted labels skip a number
        hole = int(np.append(present != np.arange(len(present)), True).argmax())
        raise UserError(f"{path}: train_labels has no sample of class {hole}; number classes 0 to K-1")
    return tuple(str(label) for label in range(highest + 1))
