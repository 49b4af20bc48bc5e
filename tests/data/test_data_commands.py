"""``neurocl data``: results on stdout, progress on stderr, nothing heavy at the top."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner, Result

from neurocl.cli.data import app
from neurocl.errors import RunError, UserError

if TYPE_CHECKING:
    from tests.data.conftest import Site


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> Any:
    result = call(*arguments)
    assert result.exception is None
    return json.loads(result.stdout)


def test_list_shows_every_benchmark_with_its_state(tmp_path: Path) -> None:
    rows = {row["name"]: row for row in answer("list", "--json", "--data-dir", tmp_path)}
    assert rows["seq-digits"]["state"] == "embedded"
    assert rows["seq-kmnist"]["state"] == "absent"
    assert rows["seq-mnist"]["download_bytes"] == 11_594_722
    assert "seq-cifar100" in call("list", "--data-dir", tmp_path).stdout


def test_info_gives_files_and_digests_for_benchmarks_and_sources(tmp_path: Path) -> None:
    for name in ("seq-mnist", "mnist"):
        facts = answer("info", name, "--json")
        assert len(facts["files"]) == 4
        assert facts["files"][0]["digest"].startswith("sha256:440fcabf")
    assert "10-binary.tar.gz" in call("info", "cifar10").stdout.replace("\n", "")
    assert answer("info", "seq-digits", "--json")["task_sizes"] == [2, 2, 2, 2, 2]
    assert isinstance(call("info", "mnits").exception, UserError)


def test_a_dry_run_prints_addresses_sizes_and_targets(tmp_path: Path) -> None:
    files = answer("download", "seq-cifar100", "--dry-run", "--json", "--data-dir", tmp_path)
    assert files == [
        {
            "url": "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            "bytes": 168_513_733,
            "digest": "sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            "target": str(tmp_path / "cifar100" / "1" / "archives" / "cifar-100-binary.tar.gz"),
        }
    ]
    assert "168,513,733 bytes" in call("download", "cifar100", "--dry-run", "--data-dir", tmp_path).stdout
    assert list(tmp_path.glob("cifar100")) == []


def test_download_prints_the_folder_and_path_finds_it(
    site: Site, register: Callable[..., object], tmp_path: Path
) -> None:
    site.files["/toy.bin"] = b"pixels"
    register(site.register_file(b"pixels"))
    assert isinstance(call("path", "toy", "--data-dir", tmp_path).exception, UserError)
    result = call("download", "toy", "--data-dir", tmp_path)
    folder = tmp_path / "toy" / "1" / "data"
    assert result.stdout.strip() == str(folder)
    assert call("path", "toy", "--data-dir", tmp_path).stdout.strip() == str(folder)


def test_import_adopts_a_file(site: Site, register: Callable[..., object], tmp_path: Path) -> None:
    register(site.register_file(b"pixels"))
    (tmp_path / "file").write_bytes(b"pixels")
    found = answer("import", "toy", tmp_path / "file", "--data-dir", tmp_path, "--json")
    assert found["folder"] == str(tmp_path / "toy" / "1" / "data")


def test_check_fails_after_showing_what_is_wrong(tmp_path: Path) -> None:
    assert "per class: 132 130" in call("check", "seq-digits").stdout
    assert all(finding["level"] == "ok" for finding in answer("check", "--json"))
    (tmp_path / "own.npz").write_bytes(b"not an npz")
    result = call("check", tmp_path / "own.npz")
    assert isinstance(result.exception, RunError)
    assert "not an npz file" in result.stdout.replace("\n", " ")


@pytest.mark.parametrize("module", ["neurocl.cli.data", "neurocl.data"])
def test_the_commands_import_nothing_heavy(module: str) -> None:
    script = f"import sys, {module}; print([m for m in ('torch', 'numpy', 'pooch', 'rich.table') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
