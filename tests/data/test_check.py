"""What a check finds in good and damaged sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from neurocl.data.check import check
from neurocl.data.idx import IDX_STEMS
from neurocl.errors import UserError
from tests.data.test_cifar import write_cifar10
from tests.data.test_custom import PIXELS, write
from tests.data.test_events import write_folder
from tests.data.test_idx import write_set


def levels(findings: list[object]) -> set[str]:
    return {finding.level for finding in findings}  # type: ignore[attr-defined]


def messages(findings: list[object]) -> str:
    return "\n".join(finding.message for finding in findings)  # type: ignore[attr-defined]


def test_the_embedded_digits_are_sound() -> None:
    findings = check("seq-digits")
    assert levels(findings) == {"ok"}
    assert "per class: 132 130 125 133 121 145 130 121 131 129" in messages(findings)


def test_an_own_file_is_counted_per_class(tmp_path: Path) -> None:
    findings = check(str(write(tmp_path / "own.npz")))
    assert "6 samples of shape [3, 5, 4]" in messages(findings)
    assert "per class: 2 1 1 1 1" in messages(findings)
    assert "no sample of class 2, 3, 4" in messages(findings)  # of the two test pictures


def test_damage_is_a_finding_and_not_an_exception(tmp_path: Path) -> None:
    path = write(tmp_path / "own.npz", train_images=PIXELS / 255)
    assert [finding.message for finding in check(str(path)) if finding.level == "error"] == [
        f"{path}: train_images must be uint8 (grey levels 0 to 255), got float64"
    ]


def test_blank_pictures_are_a_warning(tmp_path: Path) -> None:
    images = PIXELS.copy()
    images[3] = 7
    findings = check(str(write(tmp_path / "own.npz", images)))
    assert "1 samples are of one value throughout" in messages(findings)


def test_folders_are_recognised_by_what_they_hold(tmp_path: Path) -> None:
    for name in ("idx", "cifar", "events", "other"):
        (tmp_path / name).mkdir()
    write_set(tmp_path / "idx", [0, 1, 1])
    assert "per class: 1 2" in messages(check(str(tmp_path / "idx")))
    write_cifar10(tmp_path / "cifar")
    assert "5 records, 10000 expected" in messages(check(str(tmp_path / "cifar")))
    write_folder(tmp_path / "events")
    assert "2 samples of shape [1, 2, 34, 34]" in messages(check(str(tmp_path / "events")))
    assert "neither idx files, CIFAR batches" in messages(check(str(tmp_path / "other")))


def test_single_files_are_described(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert "30 events" in messages(check(str(tmp_path / "Train" / "0" / "00001.bin")))
    write_set(tmp_path, [0, 1, 1])
    assert "idx of shape [3, 4, 5]" in messages(check(str(tmp_path / IDX_STEMS["train", "images"])))
    np.savez(tmp_path / "strange.npz", weights=np.zeros(3))
    assert "not a set of pictures (it holds weights)" in messages(check(str(tmp_path / "strange.npz")))


def test_what_does_not_exist_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        check(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="did you mean 'mnist'"):
        check("mnis")
    with pytest.raises(UserError, match="neurocl data download kmnist"):
        check("kmnist", data_dir=tmp_path)


def test_real_mnist_is_recognised_as_published(real_data: Callable[[str], Path]) -> None:
    findings = check("mnist", data_dir=real_data("mnist").parent)
    assert levels(findings) == {"ok"}
    assert messages(findings).count("is the published file") == 4
    assert "per class: 980 1135 1032 1010 982 892 958 1028 974 1009" in messages(findings)
