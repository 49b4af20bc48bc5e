"""Arrays out of an npz file that nobody vouches for."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from neurocl.data.npz import npz_names, read_npz
from neurocl.errors import UserError


def test_arrays_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    first, second = np.arange(6).reshape(2, 3), np.array(["x", "yz"])
    for save in (np.savez, np.savez_compressed):
        save(path, first=first, second=second)
        assert npz_names(path) == ["first", "second"]
        arrays = read_npz(path, ["second", "first"])
        assert np.array_equal(arrays["first"], first)
        assert arrays["second"].tolist() == ["x", "yz"]


def test_an_object_array_is_refused_without_running_its_pickle(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    np.savez(tmp_path / "a.npz", trap=np.array([Trap()], dtype=object))
    with pytest.raises(UserError, match="array 'trap' holds Python objects; neurocl reads no pickles"):
        read_npz(tmp_path / "a.npz", ["trap"])
    assert not (tmp_path / "sprung").exists()


def test_a_declared_size_is_not_taken_on_trust(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (1 << 50,)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("big.npy", stream.getvalue() + b"few")
    with pytest.raises(UserError, match=r"array 'big' declares 11258\d+ bytes but \d+ are stored"):
        read_npz(tmp_path / "a.npz", ["big"])


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(UserError, match="no such file"):
        npz_names(path)
    path.write_bytes(b"not a zip")
    with pytest.raises(UserError, match="not an npz file"):
        npz_names(path)
    np.savez(path, values=np.arange(1000))
    with pytest.raises(UserError, match=r"no array 'labels' in it \(it holds values\)"):
        read_npz(path, ["labels"])
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="array 'values' is damaged"):
        read_npz(path, ["values"])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("values.npy", b"not an array")
    with pytest.raises(UserError, match="array 'values' is damaged"):
        read_npz(path, ["values"])
