"""``neurocl trajectory export``: graphs beside the run, checked before they are kept, and mistakes in one line."""

import json
import re
import sys

import numpy as np
import pytest

from neurocl.trajectory.runner import Runner
from tests.cli.conftest import assert_one_line

CHECKED = re.compile(r"checked: 20 forecasts of 8 agents differ from torch's by at most (\S+) network units$")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from neurocl.cli.trajectory import SMOKE
    from neurocl.trajectory import resolve, train

    out = tmp_path_factory.mktemp("runs") / "run"
    train(resolve("tiny", SMOKE, {"threads": 1, "device": "cpu"}), out=out)
    return out


def test_torchscript_goes_beside_the_run_and_forecasts(inside, run):
    made = inside("trajectory", "export", run, "--to", "torchscript", "--threads", "1")
    assert made.returncode == 0, made.stderr
    *written, checked = made.stdout.splitlines()
    folder = run / "torchscript"
    names = ["context.pt", "denoiser.pt", "decoder.pt", "manifest.json"]
    assert [line.split()[1] for line in written] == [str(folder / name) for name in names]
    assert float(CHECKED.match(checked)[1]) <= 1e-4
    assert "recording context.pt" in made.stderr
    past = 0.4 * np.arange(8)[None, None, :, None] * np.array([1.0, 0.5])
    assert np.isfinite(Runner(folder).forecast(past, num_samples=3)).all()


def test_graphs_go_where_they_are_told_to_and_json_says_so(inside, run, tmp_path):
    made = inside("trajectory", "export", run, "--to", "torchscript", "--out", "graphs", "--json", "--quiet")
    assert (made.returncode, made.stderr) == (0, ""), made.stderr
    told = json.loads(made.stdout)
    assert (told["folder"], told["format"]) == ("graphs", "torchscript")
    assert told["difference"] <= 1e-4
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "graphs").iterdir()}
    assert told["bytes"] == sizes
    assert sizes.keys() == {"context.pt", "denoiser.pt", "decoder.pt", "manifest.json"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("RUN", "--to", "onxn"), "did you mean 'onnx'"),
        (("RUN", "--to", "torchscript", "--out", "RUN"), "is not an empty folder"),
        (("FOLDER", "--to", "torchscript"), "not a run folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_with_exit_code_2(inside, run, tmp_path, words, message):
    places = {"RUN": str(run), "FOLDER": str(tmp_path)}
    assert_one_line(inside("trajectory", "export", *(places.get(word, word) for word in words)), 2, message)


def test_without_the_packages_for_onnx_one_line_says_what_to_install(inside, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert_one_line(inside("trajectory", "export", run), 2, "needs onnxruntime", "pip install 'neurocl[export]'")


def test_graphs_that_forecast_otherwise_are_one_line_with_exit_code_1(inside, run, monkeypatch, tmp_path):
    from neurocl.trajectory import export

    noise = export.torch_noise
    monkeypatch.setattr(export, "torch_noise", lambda shape, size, seed: noise(shape, size, seed + 100))
    words = ("trajectory", "export", run, "--to", "torchscript", "--quiet", "--out", "graphs")
    assert_one_line(inside(*words), 1, "the exported graphs forecast otherwise than torch")
    assert not (tmp_path / "graphs").exists()
