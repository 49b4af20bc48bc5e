"""Looking a set over before anything is trained on it: does it read, is it the published one, how many per class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from neurocl.data.catalog import DATASETS, Benchmark, load_benchmark
from neurocl.data.cifar import read_cifar
from neurocl.data.custom import CUSTOM_KEYS, read_custom
from neurocl.data.dataset import ArrayDataset, Images, Labels
from neurocl.data.digest import file_digest
from neurocl.data.events import event_files, read_event_file, read_nmnist
from neurocl.data.idx import IDX_STEMS, idx_file, read_idx, read_idx_folder
from neurocl.data.imgpack import is_imgpack, read_imgpack_dataset
from neurocl.data.install import matches, state, verify
from neurocl.data.locate import absent
from neurocl.data.npz import npz_names
from neurocl.data.sources import SOURCES, find_source
from neurocl.errors import NeuroclError, UserError


@dataclass(frozen=True)
class Finding:
    """One thing that a check saw.

    Attributes:
        level: ``"ok"``, ``"warning"`` (usable, but look at it) or ``"error"`` (not usable).
        where: the file, folder or split.
        message: what was seen.
    """

    level: Literal["ok", "warning", "error"]
    where: str
    message: str


def check(path_or_name: str, *, data_dir: str | Path | None = None) -> list[Finding]:
    """Look a set over.

    Args:
        path_or_name: a benchmark (``seq-mnist``), a source (``mnist``), a file (idx, CIFAR batch, npz,
            event ``.bin``) or a folder of these.
    Returns: findings in the order they were made; damage is a finding, not an exception.
    Raises:
        UserError: no such name, file or folder, or a set that is not on this machine.
    """
    if path_or_name in SOURCES or path_or_name in DATASETS.names():
        return list(_check_name(path_or_name, Path(data_dir) if data_dir else None))
    path = Path(path_or_name).expanduser()
    if path.exists():
        return list(_guarded(str(path), lambda: list(_check_path(path))))
    if "/" in path_or_name or path.suffix:
        raise UserError(f"{path}: no such file or folder")
    find_source(path_or_name)
    raise UserError(f"{path_or_name}: no such data set, file or folder")


def _guarded(where: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """What ``look`` finds, with the one-line errors of readers turned into findings."""
    try:
        return look()
    except NeuroclError as error:
        return [Finding("error", where, str(error))]


def _check_name(name: str, data_dir: Path | None) -> Iterator[Finding]:
    benchmark = _benchmark_of(name)
    if benchmark is not None and benchmark.source not in SOURCES:
        yield from _guarded(name, lambda: list(_describe(benchmark.loader(data_dir, 1))))
        return
    source = find_source(benchmark.source if benchmark is not None else name)
    status, folder = state(source.name, data_dir=data_dir)
    if status != "complete" or folder is None:
        raise absent(source.name, data_dir, downloadable=source.downloadable)
    if any((parent / "COMPLETE.json").is_file() for parent in folder.parents[:2]):
        yield from _guarded(
            str(folder),
            lambda: [Finding("ok", str(folder), f"{verify(source.name, data_dir=data_dir)} files as downloaded")],
        )
    else:
        yield from _check_digests(source.name, folder)
    from neurocl.data.benchmarks import load_source

    yield from _guarded(str(folder), lambda: list(_describe(load_source(source.name, data_dir, 1))))


def _benchmark_of(name: str) -> Benchmark | None:
    return load_benchmark(name) if name in DATASETS.names() else None


def _check_digests(name: str, folder: Path) -> Iterator[Finding]:
    """Compare files that were put there by hand with the published ones."""
    published = {file.name for file in SOURCES[name].files}
    for pack in sorted(set(SOURCES[name].signs) - published):
        if pack.endswith(".npz") and (folder / pack).is_file():
            yield Finding("warning", str(folder / pack), "a packed copy; figures need the published archive")
    for file in SOURCES[name].files:
        for path in dict.fromkeys((folder / file.name, folder / file.name.removesuffix(".gz"))):
            if not path.is_file():
                continue
            if matches(file, path):
                yield Finding("ok", str(path), "is the published file")
            else:
                digest = file_digest(path)
                yield Finding("warning", str(path), f"differs from the published file (sha256 {digest})")


def _check_path(path: Path) -> Iterator[Finding]:
    if path.is_dir():
        yield from _check_folder(path)
    elif path.suffix == ".npz":
        yield Finding("ok", str(path), f"sha256 {file_digest(path)}")
        yield from _check_npz(path)
    elif path.suffix == ".bin":
        yield from _check_bin(path)
    else:
        array = read_idx(path)
        yield Finding("ok", str(path), f"idx of shape {list(array.shape)}, values {array.min()} to {array.max()}")
        if array.ndim == 1:
            yield _class_counts(str(path), array.astype(np.int64), int(array.max()) + 1)


def _check_folder(folder: Path) -> Iterator[Finding]:
    names = {path.name for path in folder.iterdir()}
    if any(name.removesuffix(".gz") in IDX_STEMS.values() for name in names):
        highest = read_idx(idx_file(folder, IDX_STEMS["train", "labels"])).max()
        yield from _describe(read_idx_folder(folder, str(folder), _numbered(int(highest) + 1)))
    elif names & {"test_batch.bin", "data_batch_1.bin", "train.bin", "test.bin", "data_batch_1"}:
        yield from _describe(read_cifar(folder, complete=True))
    elif {"Train", "Test"} <= names:
        for split in ("Train", "Test"):
            labels = np.array([label for _, label in event_files(folder / split)], dtype=np.int64)
            yield _class_counts(f"{folder / split}", labels, int(labels.max()) + 1)
        yield from _describe(read_nmnist(folder, 1))
    else:
        files = sorted(folder.glob("*.npz"))
        if not files:
            raise UserError(f"{folder}: neither idx files, CIFAR batches, event folders nor npz files there")
        for file in files:
            yield from _guarded(str(file), lambda file=file: list(_check_path(file)))  # type: ignore[misc]


def _check_npz(path: Path) -> Iterator[Finding]:
    names = set(npz_names(path))
    if "train_images" in names:
        yield from _describe(read_custom(path))
    elif is_imgpack(path):
        yield from _describe(read_imgpack_dataset(path, str(path)))
    elif "train_xp" in names:
        yield from _describe(read_nmnist(path, 1))
    else:
        raise UserError(
            f"{path}: not a set of pictures (it holds {', '.join(sorted(names)[:12]) or 'nothing'}); own data "
            f"needs {', '.join(CUSTOM_KEYS)}"
        )


def _check_bin(path: Path) -> Iterator[Finding]:
    if "batch" in path.name or path.name in ("train.bin", "test.bin"):
        raise UserError(f"{path}: a CIFAR batch; check its folder {path.parent} instead")
    x, y, p, t = read_event_file(path)
    span = f"{(t.max() - t.min()) / 1000:.1f} ms" if t.size else "no time"
    size = f", sensor at least {x.max() + 1} x {y.max() + 1}" if t.size else ""
    yield Finding("ok", str(path), f"{t.size} events ({int(p.sum())} ON) in {span}{size}")


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(str(label) for label in range(count))


def _describe(dataset: ArrayDataset) -> Iterator[Finding]:
    for split, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        where = f"{dataset.name}: {split}"
        yield Finding("ok", where, f"{len(images)} samples of shape {list(images.shape[1:])}")
        yield _class_counts(where, labels, dataset.num_classes)
        yield from _blank(where, images)


def _class_counts(where: str, labels: Labels, num_classes: int) -> Finding:
    counts = np.bincount(labels, minlength=num_classes)
    empty = np.flatnonzero(counts == 0)
    if empty.size:
        return Finding("warning", where, f"no sample of class {', '.join(map(str, empty))}")
    shown = " ".join(map(str, counts)) if num_classes <= 20 else f"{counts.min()} to {counts.max()}"
    return Finding("ok", where, f"per class: {shown}")


def _blank(where: str, images: Images) -> Iterator[Finding]:
    first = images.reshape(len(images), -1)
    blank = int((first == first[:, :1]).all(axis=1).sum())
    if blank:
        yield Finding("warning", where, f"{blank} samples are of one value throughout")
