"""``neurocl trajectory plot``: the pictures a user asks for, where they are told to be, and mistakes in one line."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import assert_one_line


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    rng = np.random.default_rng(0)
    start, turn = rng.uniform(-5, 5, (4, 2)), rng.normal(0, 0.05, (4, 200)).cumsum(axis=1)
    steps = 0.4 * np.stack([np.cos(turn), np.sin(turn)], axis=-1)
    xy = start[:, None] + steps.cumsum(axis=1)
    rows = [
        f"{10 * t}\t{agent}\t{xy[agent, t, 0]:.4f}\t{xy[agent, t, 1]:.4f}" for t in range(200) for agent in range(4)
    ]
    path = tmp_path_factory.mktemp("recording") / "walk.txt"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def run(recording, tmp_path_factory):
    from neurocl.cli.trajectory import SMOKE
    from neurocl.trajectory import resolve, train

    out = tmp_path_factory.mktemp("runs") / "run"
    train(resolve("tiny", SMOKE, {"files": (recording,), "threads": 1, "device": "cpu"}), out=out)
    return out


QUICK = ("--num-samples", "3", "--select", "samples", "--steps", "2", "--max-scenes", "2", "--threads", "1")


def test_every_picture_is_written_below_the_run_and_named(inside, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    made = inside("trajectory", "plot", "run", *QUICK, "--scenes", "1")
    assert made.returncode == 0, made.stderr
    names = [line.removeprefix("Written: run/plots/") for line in made.stdout.splitlines()]
    kinds = [name.partition("-")[0].removesuffix(".png") for name in names]
    assert kinds == ["curves", "code", "codebook", "scene", "density", "horizon"]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "run" / "plots").iterdir())
    for name in names:
        with Image.open(tmp_path / "run" / "plots" / name) as picture:
            assert min(picture.size) > 300
            assert np.asarray(picture.convert("L")).std() > 5  # something is drawn


def test_scenes_are_drawn_and_animated_in_a_folder_of_ones_own(inside, run, tmp_path):
    words = ("trajectory", "plot", str(run), *QUICK, "--what", "scenes", "--scenes", "2", "--animate", "--out", "drawn")
    made = inside(*words, "--split", "val", "--json", "--quiet")
    written = json.loads(made.stdout)["written"]
    assert made.stderr == ""
    assert [path.rpartition(".")[2] for path in written] == ["png", "gif"] * 2
    assert len({path.rpartition(".")[0] for path in written}) == 2
    for path in written:
        if path.endswith(".gif"):
            with Image.open(tmp_path / path) as moving:
                assert moving.n_frames == 12 + 1
    again = inside(*words, "--split", "val", "--json", "--quiet")
    assert json.loads(again.stdout)["written"] == written
    other = inside(*words, "--split", "val", "--json", "--quiet", "--seed", "5")
    assert json.loads(other.stdout)["written"] != written


def test_curves_of_a_run_that_still_trains_can_be_looked_at(inside, run, tmp_path):
    (tmp_path / "begun").mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(run / name, tmp_path / "begun")
    made = inside("trajectory", "plot", "begun", "--what", "curves", "--quiet")
    assert made.stdout == "Written: begun/plots/curves.png\n"
    assert_one_line(inside("trajectory", "plot", "begun"), 2, "not a finished trajectory run")
    (tmp_path / "begun" / "metrics.jsonl").write_text('{"stage": codes}\n')
    assert_one_line(inside("trajectory", "plot", "begun", "--what", "curves"), 2, "metrics.jsonl")
    (tmp_path / "begun" / "metrics.jsonl").unlink()
    assert_one_line(inside("trajectory", "plot", "begun", "--what", "curves"), 2, "nothing was measured yet")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("RUN", "--what", "scens"), "did you mean 'scenes'"),
        (("RUN", "--split", "train"), "--split must be one of test, val"),
        (("RUN", "--field", "nhl"), "--field must be one of auto, nba, nfl, none"),
        (("RUN", "--select", "best"), "select"),
        (("RUN", "--dataset", "nowhere", "--what", "scenes"), "nowhere"),
        (("FOLDER",), "not a run folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_with_exit_code_2(inside, run, tmp_path, words, message):
    places = {"RUN": str(run), "FOLDER": str(tmp_path)}
    assert_one_line(inside("trajectory", "plot", *(places.get(word, word) for word in words)), 2, message)


def test_a_folder_that_cannot_be_made_is_one_line_with_exit_code_1(inside, run, tmp_path):
    (tmp_path / "file").write_text("")
    words = ("trajectory", "plot", str(run), "--what", "curves", "--quiet", "--out", "file/plots")
    assert_one_line(inside(*words), 1, "cannot write file/plots")
