"""Running the real command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from neurocl.cli.main import main

QUICK = ["--smoke", "--quiet", "--threads", "1"]


@pytest.fixture
def neurocl(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call ``neurocl ARGUMENTS`` in an empty folder; returns exit code, stdout and stderr."""

    def call(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "neurocl", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, **options
        )

    return call


@pytest.fixture
def inside(tmp_path, monkeypatch, capfd) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call the same entry point within this process: for commands that end at once."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.delenv("NEUROCL_DATA", raising=False)
        monkeypatch.setenv("NEUROCL_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(sys, "argv", ["neurocl", *map(str, arguments)])
        capfd.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capfd.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(str(code)), captured.out, captured.err)

    return call


@pytest.fixture
def start(tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """Start ``neurocl ARGUMENTS`` and return at once."""

    def popen(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "neurocl", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path, env=environment)

    return popen


def assert_one_line(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The command ended with ``code`` and a single line on stderr that contains ``words``."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]
