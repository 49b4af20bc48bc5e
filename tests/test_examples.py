"""The scripts in examples/ run to their end and show what they promise."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from neurocl.continual import METHODS

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run an example as a program in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))

    def call(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_every_example_is_tested():
    source = Path(__file__).read_text()
    assert all(f'run("{path.name}"' in source for path in EXAMPLES.glob("*.py"))


def test_staer_learns_the_digits_and_prints_the_lower_triangle(run, tmp_path):
    printed = run("train_staer.py")
    assert printed.count("after task") == 5
    rows = [line.split() for line in printed.splitlines() if re.match(r"\s*\d+\.\d( |$)", line)]
    assert [row.count("-") for row in rows] == [4, 3, 2, 1, 0]
    assert float(re.search(r"final average ([\d.]+) %", printed).group(1)) > 70
    assert not list(tmp_path.iterdir())


def test_the_divergence_moves_series_to_where_the_target_is(run, tmp_path):
    printed = run("soft_dtw_alignment.py", "--plot", "alignment.png")
    values = [float(value) for value in re.findall(r"divergence ([\d.]+)", printed)]
    assert values == sorted(values, reverse=True)
    found = re.search(r"at ([\d.]+), ([\d.]+), ([\d.]+) of", printed).groups()
    assert [float(value) for value in found] == pytest.approx([0.3, 0.5, 0.7], abs=0.05)
    assert (tmp_path / "alignment.png").read_bytes().startswith(b"\x89PNG")


def test_an_own_method_trains_beside_er(run):
    printed = run("own_method.py")
    accuracies = [float(value) for value in re.findall(r"([\d.]+) % Class-IL", printed)]
    assert len(accuracies) == 4
    assert min(accuracies) > 50  # fine-tuning without replay stays near 20
