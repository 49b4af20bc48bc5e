"""``neurocl spiking energy`` and ``export`` on short runs: tables at two widths, one JSON document, refusals."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from neurocl import continual
from neurocl.cli.main import app
from neurocl.continual.training import load_run
from neurocl.errors import UserError
from neurocl.spiking.energy import learnt_items

QUICK = {"epochs": 1, "max_train_per_class": 20, "max_test_per_class": 10, "buffer_size": 20, "threads": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One spiking and one ordinary run on real digits, and a spiking one that stopped after its third task."""
    folder = tmp_path_factory.mktemp("runs")
    spiking = {"area": "spiking", "method": "er", **QUICK, "neuron": {"reset": "hard"}}
    continual.train(**spiking, backbone="spiking-mlp", out=folder / "spiking")
    continual.train(**spiking, backbone="spiking-mlp", out=folder / "part", stop_after_task=2)
    continual.train(area="continual", method="er", backbone="mlp", **QUICK, out=folder / "ordinary")
    return folder


@pytest.fixture(autouse=True)
def _one_timed_pass(monkeypatch):
    monkeypatch.setattr("neurocl.spiking.energy.TIMED_SECONDS", 0.0)


def call(*arguments, width=100):
    return CliRunner().invoke(app, ["spiking", *map(str, arguments)], env={"COLUMNS": str(width)})


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "neurocl", "spiking", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_names_every_layer_the_twin_the_constants_and_what_was_measured(runs, width):
    result = call("energy", runs / "spiking", "--samples", 20, width=width)
    assert result.exit_code == 0, result.exception
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= width
    for name in ("hidden.0", "lifs.0", "hidden.1", "lifs.1", "head"):
        assert any(line.split()[:1] == [name] for line in lines)
    text = " ".join(result.stdout.split())
    assert "measured on 20 test images" in text
    assert "spiking no reuse ANN twin" in text
    assert "theoretical, 45 nm constants (Horowitz 2014), 32-bit float" in text
    assert "4.6 pJ per MAC and membrane update, 0.9 pJ per AC" in text
    assert "Measured, batch 1:" in text
    assert "Measured, batch 20:" in text
    assert "Measured energy:" in text


def test_json_is_one_document_with_the_figures_of_the_report(runs):
    result = call("energy", runs / "spiking", "--samples", 7, "--json")
    assert result.exit_code == 0, result.exception
    document = json.loads(result.stdout)
    assert (document["schema"], document["items"], document["timesteps"]) == (1, 7, 4)
    assert document["ann"]["macs"] == 64 * 128 + 128 * 128 + 128 * 10
    assert document["spiking"]["macs"] == 64 * 128
    assert document["spiking_every_step"]["macs"] == 4 * 64 * 128
    assert document["spiking"]["updates"] == 4 * (128 + 128)
    assert document["spiking"]["compute_pj"] == pytest.approx(sum(layer["compute_pj"] for layer in document["layers"]))
    assert 0 < document["firing_rate"] < 1


def test_items_are_the_first_of_every_learnt_task_in_turn(runs):
    run = load_run(runs / "part", threads=1)
    normalise = run.method.setting.augment.normalise
    tasks = [normalise(run.scenario.test_data(task)[0]) for task in range(3)]
    assert torch.equal(
        learnt_items(run, 5), torch.stack([tasks[0][0], tasks[1][0], tasks[2][0], tasks[0][1], tasks[1][1]])
    )
    assert len(learnt_items(run, 1000)) == 60


def test_export_says_what_was_written_and_checked(runs):
    pytest.importorskip("nir", reason="needs the package nir")
    result = call("export", runs / "spiking")
    assert result.exit_code == 0, result.exception
    assert "model.nir: 2 layers of neurons" in result.stdout
    assert "over 64 steps replayed from the file, all equal" in result.stdout


def test_other_formats_and_ordinary_runs_are_refused(runs):
    assert isinstance(call("export", runs / "spiking", "--to", "onnx").exception, UserError)
    refusal = call("energy", runs / "ordinary").exception
    assert isinstance(refusal, UserError)
    assert "trained mlp, a network without spikes" in str(refusal)


def test_a_refusal_is_one_line_on_stderr_with_exit_code_2(runs):
    done = command("energy", runs / "ordinary")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("neurocl: ")
    assert "a network without spikes" in done.stderr
