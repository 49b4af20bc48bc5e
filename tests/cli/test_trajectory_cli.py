"""``neurocl trajectory``: the path of a user, and every mistake in one line."""

import json
import math

import numpy as np
import pytest
import yaml

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


def test_a_user_trains_forecasts_and_compares(inside, recording, tmp_path):
    trained = inside("trajectory", "train", str(recording), "--smoke", "--threads", "1", "--out", "run", "--json")
    assert set(json.loads(trained.stdout)) == {"run", "validation"}
    made = inside(
        *("trajectory", "forecast", "run", "--input", str(recording), "--num-samples", "5", "--json"),
        *("--out", "f.json", "--plot", "f.png", "--animate", "f.gif"),
    )
    document = json.loads(made.stdout)
    assert len(document["likeliest end"]) == 4
    assert document["unit"] == "m"
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "f.gif").read_bytes()[:3] == b"GIF"
    assert (tmp_path / "f.json").stat().st_size > 500
    table = inside("trajectory", "evaluate", "run", "--num-samples", "5", "--max-scenes", "5", "--format", "json")
    rows = json.loads(table.stdout)
    assert [row["name"] for row in rows][:2] == ["model, 5 samples", "model, centroids"]
    assert {"stationary", "constant velocity", "ridge + anchors"} <= {row["name"] for row in rows}
    for row in rows:
        low, high = row["intervals"]["minADE"]
        assert low <= row["numbers"]["minADE"] <= high


def test_a_recording_survives_conversion(inside, recording, tmp_path):
    inside("trajectory", "convert", str(recording), str(tmp_path / "walk.csv"))
    before = json.loads(inside("trajectory", "inspect", str(recording), "--json").stdout)
    after = json.loads(inside("trajectory", "inspect", str(tmp_path / "walk.csv"), "--json").stdout)
    assert before["format"] != after["format"]
    for key in ("agents", "rows", "seconds", "hz", "unit"):
        assert before["recordings"][0][key] == after["recordings"][0][key]


@pytest.mark.parametrize("form", ["table", "md", "csv"])
def test_tables_come_in_every_form(inside, run, form):
    words = ("trajectory", "evaluate", str(run), "--max-scenes", "3", "--num-samples", "3", "--no-baselines")
    assert "model, centroids" in inside(*words, "--format", form, "--quiet").stdout


def test_hidden_positions_make_all_forecasts_worse_but_those_who_stay_where_they_are(inside, run):
    words = ("trajectory", "evaluate", str(run), "--max-scenes", "3", "--num-samples", "3", "--format", "json")
    tables = [json.loads(inside(*words, *more).stdout) for more in ((), ("--drop-history", "0.5"))]
    whole, hidden = ({row["name"]: row["numbers"]["minADE"] for row in table} for table in tables)
    assert whole["stationary"] == hidden["stationary"]
    assert whole["constant velocity"] != hidden["constant velocity"]
    assert whole["model, centroids"] != hidden["model, centroids"]
    assert all(math.isfinite(value) for value in hidden.values())


def test_recipes_say_what_is_trained():
    from neurocl.recipes import load_recipes
    from neurocl.trajectory import resolve

    recipes = [recipe for recipe in load_recipes() if recipe.area == "trajectory"]
    assert {"trajectory/crowd", "trajectory/paper-sdd"} <= {recipe.name for recipe in recipes}
    for recipe in recipes:
        assert resolve("small", recipe.config).dataset == recipe.config["dataset"]
        assert all(figure.metric.startswith("validation.min_") for figure in recipe.expected)


def test_a_recipe_is_trained_and_its_figures_compared(inside, recording, tmp_path):
    from neurocl.cli.trajectory import SMOKE
    from neurocl.config import merged
    from neurocl.trajectory.config import PRESETS

    figure = {"metric": "validation.min_ade_20_samples", "value": 1e6, "tolerance": 1.0}
    recipe = {
        "name": "walk",
        "summary": "a walk",
        "area": "trajectory",
        "source": "this test",
        "measured_by": "neurocl",
        "expected": [figure],
        "config": merged(PRESETS["tiny"], SMOKE, {"files": [str(recording)]}),
    }
    (tmp_path / "walk.yaml").write_text(yaml.safe_dump(recipe))
    words = ("reproduce", "walk.yaml", "--quiet", "--out", "again", "--threads", "1", "--device", "cpu", "--json")
    result = inside(*words)
    assert result.returncode == 1, result.stderr
    (compared,) = json.loads(result.stdout)["figures"]
    kept = json.loads((tmp_path / "again" / "seed-0" / "result.json").read_text())
    assert compared["measured"] == kept["metrics"]["validation"]["min_ade_20_samples"]
    assert inside("reproduce", "walk.yaml", "--smoke", "--quiet", "--out", "smoke", "--threads", "1").returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--dataset", "eth-ucy:nowhere", "--smoke"), "nowhere"),
        (("train", "--preset", "tinny"), "did you mean 'tiny'"),
        (("train", "--smoke", "--set", "stage1.step=3"), "did you mean 'steps'"),
        (("train", "FILE", "--dataset", "crowd"), "--dataset or files, not both"),
        (("forecast", "RUN", "--input", "missing.txt"), "missing.txt"),
        (("forecast", "RUN", "--input", "FILE", "--recording", "3"), "holds 1 recordings"),
        (("forecast", "RUN", "--input", "FILE", "--select", "best"), "select"),
        (("forecast", "RUN", "--input", "FILE", "--animate", "f.avi"), ".gif or .mp4"),
        (("forecast", "RUN", "--input", "FILE", "--out", "f.pickle"), "cannot write 'pickle'"),
        (("forecast", "FOLDER", "--input", "FILE"), "not a run folder"),
        (("evaluate", "RUN", "--split", "train"), "test or val"),
        (("evaluate", "RUN", "--format", "html"), "--format must be one of"),
        (("inspect", "FOLDER"), "FOLDER"),
        (("convert", "FILE", "FILE"), "exists already"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_with_exit_code_2(inside, run, recording, tmp_path, words, message):
    places = {"FILE": str(recording), "RUN": str(run), "FOLDER": str(tmp_path)}
    result = inside("trajectory", *(places.get(word, word) for word in words))
    assert_one_line(result, 2, places.get(message, message))


def test_a_report_of_accuracies_refuses_a_forecaster_in_one_line(inside, run):
    assert_one_line(inside("report", run), 2, "neurocl trajectory evaluate")
