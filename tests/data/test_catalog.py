"""The benchmarks by name: published splits and defaults, and errors that say what to type."""

from __future__ import annotations

import dataclasses
import gzip
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from neurocl.data import DATASETS, load_benchmark, load_dataset
from neurocl.data.sources import SOURCES
from neurocl.errors import UserError

DEFAULTS = {
    # name: tasks x classes, epochs, batch size, augmentation, shape
    "seq-digits": (5, 2, 20, 16, "none", (1, 8, 8)),
    "seq-mnist": (5, 2, 1, 10, "none", (1, 28, 28)),
    "seq-fashion-mnist": (5, 2, 1, 10, "none", (1, 28, 28)),
    "seq-kmnist": (5, 2, 1, 10, "none", (1, 28, 28)),
    "seq-cifar10": (5, 2, 50, 32, "crop-flip", (3, 32, 32)),
    "seq-cifar100": (10, 10, 50, 32, "crop-flip", (3, 32, 32)),
    "seq-tiny-imagenet-100": (10, 10, 50, 32, "crop-flip", (3, 64, 64)),
    "seq-eurosat": (5, 2, 10, 32, "crop-flip", (3, 64, 64)),
    "seq-nmnist": (5, 2, 5, 10, "none", (2, 34, 34)),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_papers(name: str) -> None:
    benchmark = load_benchmark(name)
    tasks, classes, epochs, batch_size, augment, shape = DEFAULTS[name]
    assert benchmark.name == name
    assert benchmark.task_sizes == (classes,) * tasks
    assert (benchmark.epochs, benchmark.batch_size, benchmark.augment) == (epochs, batch_size, augment)
    assert benchmark.image_shape == shape
    if benchmark.mean is not None and benchmark.std is not None:
        assert len(benchmark.mean) == len(benchmark.std) == shape[0]


def test_every_builtin_is_tested_and_has_a_source_or_is_embedded() -> None:
    assert {entry.name for entry in DATASETS.entries() if entry.source == "neurocl"} == set(DEFAULTS)
    sources = {load_benchmark(name).source for name in DEFAULTS}
    assert sources == {*SOURCES, "digits"}


def test_cifar10_is_normalised_as_in_the_staer_paper() -> None:
    benchmark = load_benchmark("seq-cifar10")
    assert benchmark.mean == (0.4914, 0.4822, 0.4465)
    assert benchmark.std == (0.2470, 0.2435, 0.2615)


def test_the_digits_always_load_with_the_fixed_shuffle() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.RandomState(0).permutation(1797)
    dataset = load_dataset("seq-digits")
    assert dataset.train_images.shape == (1297, 1, 8, 8)
    assert dataset.test_images.shape == (500, 1, 8, 8)
    assert np.array_equal(dataset.train_labels, bunch.target[order[:1297]])
    assert np.array_equal(dataset.test_labels, bunch.target[order[1297:]])
    levels = np.array([0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255])
    assert np.array_equal(dataset.test_images[7, 0], levels[bunch.images[order[1304]].astype(int)])


def test_an_absent_set_names_the_one_command_to_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"type: neurocl data download kmnist$"):
        load_dataset("seq-kmnist", data_dir=tmp_path)
    with pytest.raises(UserError, match=r"type: neurocl data import eurosat PATH$"):
        load_dataset("seq-eurosat", data_dir=tmp_path)


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean 'seq-cifar10'"):
        load_benchmark("seq-cifar-10")


def test_event_sets_need_a_number_of_time_bins() -> None:
    with pytest.raises(UserError, match="say into how many frames"):
        load_dataset("seq-nmnist")
    with pytest.raises(UserError, match="timesteps must be at least 1, got 0"):
        load_dataset("seq-nmnist", timesteps=0)


def test_data_that_do_not_fit_the_benchmark_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = load_benchmark("seq-digits")
    monkeypatch.setattr(DATASETS, "_entries", dict(DATASETS._entries))
    DATASETS.register("odd", dataclasses.replace(digits, task_sizes=(2, 2)), "")
    with pytest.raises(UserError, match="odd: the data have 10 classes, the tasks 4"):
        load_dataset("odd")
    DATASETS.register("small", dataclasses.replace(digits, image_shape=(1, 4, 4)), "")
    with pytest.raises(UserError, match=r"small: pictures of shape \(1, 8, 8\) do not fit \(1, 4, 4\)"):
        load_dataset("small")
    DATASETS.register("thing", object(), "")
    with pytest.raises(UserError, match=r"must be a neurocl\.data\.Benchmark, got object"):
        load_benchmark("thing")


def test_a_registered_benchmark_brings_its_own_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    digits = load_benchmark("seq-digits")

    def loader(data_dir: Path | None, timesteps: int | None) -> object:
        seen.append((data_dir, timesteps))
        return digits.loader(data_dir, timesteps)

    monkeypatch.setattr(DATASETS, "_entries", dict(DATASETS._entries))
    DATASETS.register("mine", dataclasses.replace(digits, loader=loader), "")
    assert len(load_dataset("mine", data_dir="/nowhere", timesteps=3).train_images) == 1297
    assert seen == [(Path("/nowhere"), 3)]


def test_nothing_heavy_is_imported_to_list_the_benchmarks() -> None:
    script = (
        "import sys; from neurocl.data import DATASETS, load_benchmark; DATASETS.names(); "
        "load_benchmark('seq-mnist'); "
        "print([m for m in ('torch', 'sklearn', 'scipy', 'matplotlib', 'pooch', 'requests') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_the_public_names_survive_the_import_of_every_module() -> None:
    script = (
        "import neurocl.data, neurocl.data.check, neurocl.data.install, neurocl.data.augment; "
        "print(all(callable(getattr(neurocl.data, n)) or n == 'DATASETS' for n in neurocl.data.__all__))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "True"


def test_plain_and_gzipped_real_mnist_are_the_same_set(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "mnist" / "1" / "data").mkdir(parents=True)
    for file in real_data("mnist").glob("*.gz"):
        with gzip.open(file) as source, (tmp_path / "mnist" / "1" / "data" / file.stem).open("wb") as target:
            shutil.copyfileobj(source, target)
    plain = load_dataset("seq-mnist", data_dir=tmp_path)
    zipped = load_dataset("seq-mnist", data_dir=real_data("mnist").parent)
    assert np.array_equal(plain.test_images, zipped.test_images)
    assert np.array_equal(plain.train_labels, zipped.train_labels)


def test_the_real_event_set_loads_as_frames(real_data: Callable[[str], Path]) -> None:
    root = real_data("nmnist-small/nmnist_small.npz").parent.parent
    dataset = load_dataset("seq-nmnist", data_dir=root, timesteps=4)
    assert dataset.train_images.shape == (1000, 4, 2, 34, 34)
    assert np.bincount(dataset.test_labels).tolist() == [8, 14, 8, 11, 14, 7, 10, 15, 2, 11]


def test_the_complete_fashion_set_of_debian_is_found() -> None:
    if not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    dataset = load_dataset("seq-fashion-mnist")
    assert np.bincount(dataset.train_labels).tolist() == [6000] * 10
