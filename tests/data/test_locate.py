"""Where sets are looked for, in which order, in which layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from neurocl.data.locate import absent, cache_dir, download_root, find_file, search_roots
from neurocl.errors import UserError


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_the_explicit_folder_comes_before_the_variable_before_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEUROCL_DATA", str(tmp_path / "variable"))
    roots = [tmp_path / "explicit", tmp_path / "variable", cache_dir() / "data"]
    assert search_roots(tmp_path / "explicit") == roots
    assert download_root(tmp_path / "explicit") == roots[0]
    assert download_root() == roots[1]
    for root in reversed(roots):
        expected = put(root / "toy" / "a.gz")
        assert find_file(["toy"], ["a.gz"], roots[0]) == expected


def test_the_flat_and_the_download_layout_are_found(tmp_path: Path) -> None:
    first = put(tmp_path / "toy" / "1" / "data" / "sub" / "a.bin")
    assert find_file(["toy"], ["sub/a.bin"], tmp_path) == first
    newer = put(tmp_path / "toy" / "2" / "data" / "sub" / "a.bin")
    assert find_file(["toy"], ["sub/a.bin"], tmp_path) == newer
    flat = put(tmp_path / "toy" / "sub" / "a.bin")
    assert find_file(["toy"], ["sub/a.bin"], tmp_path) == flat


def test_other_places_are_looked_at_last(tmp_path: Path) -> None:
    other = put(tmp_path / "elsewhere" / "a.gz")
    assert find_file(["toy"], ["a.gz"], tmp_path, [other.parent]) == other
    assert find_file(["toy"], ["b.gz"], tmp_path, [other.parent]) is None


def test_an_absent_set_names_the_places_and_the_command(tmp_path: Path) -> None:
    message = str(absent("mnist", tmp_path))
    assert str(tmp_path) in message
    assert message.endswith("type: neurocl data download mnist")


def test_a_file_is_no_data_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data-dir must be a folder, got the file"):
        search_roots(put(tmp_path / "file"))
