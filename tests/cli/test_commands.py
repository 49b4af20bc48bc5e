"""The commands as a user types them: output, exit codes, one line for a mistake."""

import json
import time

import pytest
import yaml

from tests.cli.conftest import QUICK, assert_one_line


def test_smoke_runs_the_whole_path_and_says_what_next(neurocl, tmp_path):
    neurocl("spiking", "train", "--smoke", "--threads", 1, "--out", "first")  # compiles the kernels, once per machine
    began = time.monotonic()
    result = neurocl("spiking", "train", "--smoke", "--threads", 1)
    assert time.monotonic() - began < 20
    assert result.returncode == 0, result.stderr
    for words in ("class-IL", "task-IL", "avg. incr.", "forgetting", "backward", "staer", "Results: runs/", "--plots"):
        assert words in result.stdout
    assert "after task 5" in result.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("spiking-staer-seq-digits-0-")
    document = json.loads((run / "result.json").read_text())
    assert document["schema"] == 1
    assert document["status"] == "finished"
    assert document["checkpoint_sha256"]
    assert {"torch", "neurocl"} <= document["versions"].keys()
    assert len(document["accuracy"]["class_il"]) == 5
    assert yaml.safe_load((run / "config.yaml").read_text())["method"] == "staer"


@pytest.mark.slow
def test_seeds_evaluate_and_report_in_every_format(inside, tmp_path):
    assert inside("continual", "train", *QUICK, "--method", "er", "--seeds", "0,1", "--out", "er").returncode == 0
    assert inside("continual", "train", *QUICK, "--method", "sgd", "--out", "sgd").returncode == 0
    table = inside("report", "er", "sgd")
    assert " ± " in table.stdout
    rows = json.loads(inside("report", "er", "sgd", "--format", "json").stdout)["rows"]
    assert [row["label"] for row in rows] == ["er", "sgd"]
    assert [len(row["runs"]) for row in rows] == [2, 1]
    lines = inside("report", "er", "sgd", "--format", "csv").stdout.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("run,area,method,dataset,seed")
    assert "| er | 2 |" in inside("report", "er", "sgd", "--format", "md").stdout
    assert "\\toprule" in inside("report", "er", "sgd", "--format", "latex").stdout
    html = inside("report", "er", "sgd", "--format", "html", "--out", "report.html", "--plots")
    assert html.returncode == 0, html.stderr
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "http" not in page.replace("http://www.w3.org", "")
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"accuracy-per-task.png", "accuracy-per-task.svg", "forgetting.png", "accuracy-matrix-er.png"} <= plots
    measured = json.loads(inside("continual", "evaluate", "sgd", "--json").stdout)
    stored = json.loads((tmp_path / "sgd" / "result.json").read_text())["accuracy"]
    assert measured["class_il"] == stored["class_il"][-1]
    assert measured["task_il"] == stored["task_il"][-1]


def test_configuration_comes_from_file_set_and_flags_in_this_order(inside, tmp_path):
    (tmp_path / "run.yaml").write_text("method: er\nbuffer_size: 11\noptimizer: {lr: 0.5}\nseed: 5\n")
    arguments = ("--config", "run.yaml", "--set", "buffer_size=12", "--set", "options.policy=balanced", "--seed", 6)
    result = inside("continual", "train", *QUICK, *arguments, "--out", "run")
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["method"], config["buffer_size"], config["seed"]) == ("er", 12, 6)
    assert config["optimizer"]["lr"] == 0.5
    assert config["options"] == {"policy": "balanced"}


def test_a_printed_configuration_can_be_read_back(inside, tmp_path):
    text = inside("spiking", "config").stdout
    (tmp_path / "all.yaml").write_text(text)
    assert inside("spiking", "train", *QUICK, "--config", "all.yaml", "--out", "run").returncode == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written.keys() == yaml.safe_load(text).keys()


def test_tensorboard_events_are_written_when_asked(inside, tmp_path):
    result = inside("continual", "train", *QUICK, "--set", "tensorboard=true", "--out", "run")
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("group", ["methods", "merges", "federated", "datasets", "backbones", "recipes"])
def test_everything_listed_can_be_explained(inside, group):
    listed = json.loads(inside("list", group, "--json").stdout)[group]
    assert listed
    for row in listed:
        assert json.loads(inside("info", row["name"], "--json").stdout)["name"] == row["name"]


def test_info_shows_options_with_defaults(inside):
    text = inside("info", "staer").stdout
    assert "options.beta" in text
    assert "0.0001" in text
    assert "arXiv 2601.20870" in text


def test_merges_are_listed_with_what_they_work_on(inside):
    works_on = {row["name"]: row["areas"] for row in json.loads(inside("list", "merges", "--json").stdout)["merges"]}
    assert works_on["iso-c"] == ["weights"]
    assert works_on["knots"] == ["adapters"]
    assert works_on["com"] == ["networks"]
    assert "works on" in inside("list", "merges").stdout


def test_info_explains_a_merge_with_command_options_and_paper(inside):
    text = inside("info", "ties").stdout
    for words in (
        "neurocl merging merge --method ties",
        "--density",
        "0 < number <= 1",
        "model | tensor",
        "2306.01708",
    ):
        assert words in text
    document = json.loads(inside("info", "ties", "--json").stdout)
    assert document["kind"] == "merge"
    assert {option["name"]: option["default"] for option in document["options"]}["--density"] == 0.2


def test_info_names_the_function_of_a_merge_of_networks(inside):
    text = inside("info", "com").stdout
    assert "neurocl.merging.chain_of_merges" in text
    assert "off_diagonal" in text
    assert "merged | expert" in text


def test_doctor_finds_this_machine_usable(inside):
    result = inside("doctor", "--json")
    findings = {row["what"]: row for row in json.loads(result.stdout)}
    assert findings["torch"]["state"] == "ok"
    assert findings["torchvision"]["state"] in ("ok", "note")
    assert all(row["state"] != "broken" for row in findings.values())


def test_a_recipe_runs_end_to_end(inside):
    name = "staer/seq-digits"
    result = inside("reproduce", name, "--smoke", "--quiet", "--out", "again", "--threads", 1)
    assert result.returncode == 0, result.stderr
    assert "Results: again" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("spiking", "train", "--method", "stear"), ("unknown method 'stear'", "did you mean 'staer'")),
        (("spiking", "train", "--timesteps", "3"), ("even number of timesteps", "got 3")),
        (("spiking", "train", "--set", "timestep=4"), ("unknown key 'timestep'", "did you mean 'timesteps'")),
        (("spiking", "train", "--set", "neuron.dekay=1"), ("unknown key 'neuron.dekay'", "'decay'")),
        (("spiking", "train", "--set", "epochs"), ("--set expects key=value",)),
        (("spiking", "train", "--dataset", "seq-cifar"), ("seq-cifar10",)),
        (("spiking", "train", "--dataset", "seq-mnist"), ("neurocl data download mnist",)),
        (("spiking", "train", "--data-dir", "nowhere"), ("nowhere is not a folder",)),
        (("continual", "train", "--method", "staer"), ("'staer' is for `neurocl spiking`",)),
        (("spiking", "train", "--config", "no.yaml"), ("no.yaml", "no such configuration file")),
        (("spiking", "train", "--device", "tpu"), ("device", "'tpu'")),
        (("spiking", "train", "--precision", "fp8"), ("precision", "'fp8'")),
        (("spiking", "train", "--seeds", "a,b"), ("--seeds expects integers",)),
        (("spiking", "train", "--resume", "nowhere"), ("nowhere is not a run folder",)),
        (("spiking", "train", "--resume", "x", "--epochs", "3"), ("--resume", "drop --epochs")),
        (("report", "nowhere"), ("nowhere is not a run folder",)),
        (("info", "stear"), ("did you mean 'staer'",)),
        (("info", "iso_c"), ("did you mean 'iso-c'",)),
        (("list", "method"), ("did you mean 'methods'",)),
        (("list", "merge"), ("did you mean 'merges'",)),
        (("reproduce", "staer/seq"), ("there is no recipe",)),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(inside, arguments, words):
    assert_one_line(inside(*arguments), 2, *words)


def test_debug_shows_the_traceback(neurocl):
    assert_one_line(neurocl("spiking", "train", "--method", "stear"), 2, "did you mean 'staer'")
    result = neurocl("spiking", "train", "--method", "stear", "--debug")
    assert "Traceback" in result.stderr


def test_an_unknown_key_in_a_file_names_file_and_key(inside, tmp_path):
    (tmp_path / "run.yaml").write_text("epoch: 3\n")
    assert_one_line(inside("spiking", "train", "--config", "run.yaml"), 2, "'epoch'", "did you mean 'epochs'")
    (tmp_path / "run.yaml").write_text("epochs: [\n")
    assert_one_line(inside("spiking", "train", "--config", "run.yaml"), 2, "run.yaml", "not valid YAML")
    (tmp_path / "run.yaml").write_text("- a\n")
    assert_one_line(inside("spiking", "train", "--config", "run.yaml"), 2, "run.yaml", "expected a mapping")
