"""A user's own npz becomes a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neurocl.data import load_benchmark, load_dataset
from neurocl.data.custom import default_task_sizes, read_custom
from neurocl.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 3, 5, 4), dtype=np.uint8)


def write(path: Path, images: np.ndarray = PIXELS, **changes: Any) -> Path:
    labels = np.arange(len(images)) % 5
    arrays: dict[str, Any] = {
        "train_images": images,
        "train_labels": labels,
        "test_images": images[:2],
        "test_labels": labels[:2],
    } | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (PIXELS, PIXELS),
        (PIXELS.transpose(0, 2, 3, 1), PIXELS),
        (PIXELS[:, 0], PIXELS[:, :1]),
        (PIXELS[:, :1].transpose(0, 2, 3, 1), PIXELS[:, :1]),
    ],
    ids=["NCHW", "NHWC", "NHW", "NHW1"],
)
def test_every_layout_becomes_channel_first(tmp_path: Path, given: np.ndarray, expected: np.ndarray) -> None:
    dataset = read_custom(write(tmp_path / "own.npz", given))
    assert np.array_equal(dataset.train_images, expected)
    assert np.array_equal(dataset.test_images, expected[:2])


def test_a_path_works_where_a_name_does(tmp_path: Path) -> None:
    path = str(write(tmp_path / "own.npz"))
    benchmark = load_benchmark(path)
    assert (benchmark.name, benchmark.task_sizes, benchmark.image_shape) == ("own", (2, 3), (3, 5, 4))
    assert np.array_equal(load_dataset(path).train_images, PIXELS)


def test_class_names_are_taken_from_the_file_or_counted(tmp_path: Path) -> None:
    assert read_custom(write(tmp_path / "a.npz")).class_names == ("0", "1", "2", "3", "4")
    named = write(tmp_path / "b.npz", class_names=np.array(list("vwxyz")))
    assert read_custom(named).class_names == ("v", "w", "x", "y", "z")


@pytest.mark.parametrize(("num_classes", "sizes"), [(2, (2,)), (3, (3,)), (4, (2, 2)), (7, (2, 2, 3))])
def test_tasks_have_two_classes_and_an_odd_one_joins_the_last(num_classes: int, sizes: tuple[int, ...]) -> None:
    assert default_task_sizes(num_classes) == sizes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "no array test_labels; own data needs train_images"),
        ({"train_images": PIXELS / 255}, "train_images must be uint8"),
        ({"train_images": PIXELS[:, 0, 0]}, r"train_images must be \[N, C, H, W\].*got \[6, 4\]"),
        ({"train_images": PIXELS.transpose(0, 2, 1, 3)}, "with 1 or 3 channels"),
        ({"train_labels": np.arange(6) / 2}, "train_labels must be whole numbers"),
        ({"train_labels": np.arange(6) - 1}, "train_labels must start at 0, found -1"),
        ({"train_labels": np.array([0, 1, 2, 4, 4, 4])}, "no sample of class 3"),
        ({"test_labels": np.array([0, 1 << 60])}, "no sample of class 5"),
        ({"class_names": np.array(["a", "b"])}, "label 4 has no name, class_names lists 2"),
        ({"class_names": np.arange(5)}, "class_names must be text"),
        ({"train_labels": np.array([{}] * 6, dtype=object)}, "neurocl reads no pickles"),
        ({"train_labels": np.zeros(6, int), "test_labels": np.zeros(2, int)}, "at least 2 classes, got 1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "own.npz", **changes)
    with pytest.raises(UserError, match=message):
        load_benchmark(str(path))
