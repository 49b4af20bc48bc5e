"""``neurocl federated`` as a user types it; taking clients out has a file of its own."""

import csv
import io
import json

import pytest

from tests.cli.conftest import assert_one_line

RUN = ("federated", "run", "--smoke", "--quiet")
COMPARE = ("federated", "compare", "--smoke", "--quiet")

MY_DATA = """
import torch
from neurocl import federated
from neurocl.federated.network import Classifier

def waves(config):
    y = torch.arange(80) % 4
    x = torch.sin(torch.arange(16) * (y[:, None] + 1) / 3)
    def build():
        torch.manual_seed(0)
        return Classifier(torch.nn.Linear(16, 8), 8, 4)
    samples = federated.Samples(x, y)
    return federated.Source("waves", samples, samples, ("a", "b", "c", "d"), build)
"""


@pytest.fixture
def finished(inside, tmp_path):
    """A finished run in ``first``."""
    result = inside(*RUN, "--out", "first")
    assert result.returncode == 0, result.stderr
    return result


def test_a_run_prints_its_accuracies_where_it_is_and_what_to_do_next(inside, finished, tmp_path):
    lines = finished.stdout.splitlines()
    assert lines[0].split() == ["after", "task", "task", "1", "task", "2", "task", "3"]
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]
    assert lines[4].startswith("final average accuracy")
    assert "MB up" in lines[4]
    assert lines[5] == "Run: first"
    assert "neurocl report first --plots" in lines[6]
    assert finished.stderr == ""
    config = (tmp_path / "first" / "config.yaml").read_text()
    assert {"  num_clients: 2", "rounds: 1", "local_epochs: 1"} <= set(config.splitlines())
    assert "fedavg" in inside("report", "first").stdout


def test_json_is_one_document_and_progress_goes_to_stderr(inside):
    result = inside("federated", "run", "--smoke", "--json", "--method", "fedncm", "--out", "means")
    document = json.loads(result.stdout)
    assert document["run"] == "means"
    assert 0 < document["metrics"]["class_il"]["final_average_accuracy"] <= 100
    assert document["bytes"]["up"] > 0
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["task 1", "task 2", "task 3"]


def test_options_win_over_smoke_which_wins_over_the_file(inside, tmp_path):
    (tmp_path / "mine.yaml").write_text("method: fedncm\nrounds: 4\nlocal_epochs: 4\nbatch_size: 7\n")
    result = inside(*RUN, "--config", "mine.yaml", "--clients", 3, "--set", "local_epochs=2", "--out", "a")
    assert result.returncode == 0, result.stderr
    config = (tmp_path / "a" / "config.yaml").read_text()
    for line in ("method: fedncm", "rounds: 1", "local_epochs: 2", "num_clients: 3", "batch_size: 7"):
        assert line in config


def test_the_configuration_of_a_run_gives_the_run_again(inside, finished):
    again = inside("federated", "run", "--quiet", "--config", "first/config.yaml", "--out", "again")
    assert again.stdout.splitlines()[:4] == finished.stdout.splitlines()[:4]


def test_resuming_a_finished_run_says_so_and_prints_its_table(inside, finished):
    result = inside("federated", "run", "--resume", "first")
    assert result.returncode == 0
    assert result.stderr.strip() == "first was finished before; this is its result"
    assert result.stdout == finished.stdout


def test_resuming_takes_no_option_that_would_change_the_run(inside, finished):
    resume = ("federated", "run", "--resume", "first")
    assert_one_line(inside(*resume, "--rounds", 9), 2, "as it was set up", "drop --rounds")
    assert_one_line(inside(*resume, "--local-epochs", 9), 2, "drop --local-epochs")
    assert_one_line(inside(*resume, "--clients", 9), 2, "drop --clients")
    assert_one_line(inside(*resume, "--beta", 9), 2, "drop --beta")
    assert_one_line(inside(*resume, "--set", "rounds=9"), 2, "drop --set")
    assert_one_line(inside(*resume, "--smoke"), 2, "drop --smoke")
    assert_one_line(inside(*resume, "--out", "elsewhere"), 2, "drop --out")
    assert inside(*resume, "--data-dir", ".").returncode == 0


def test_a_recipe_runs_and_says_what_it_misses(inside, tmp_path):
    result = inside("reproduce", "federated/fedavg-digits", "--smoke", "--quiet", "--out", "again")
    assert result.returncode == 0, result.stderr
    assert "Results: again" in result.stdout
    assert json.loads((tmp_path / "again" / "seed-0" / "result.json").read_text())["config"]["classes_per_task"] == 2
    (tmp_path / "far.yaml").write_text(
        "name: far\nsummary: nobody gets there\narea: federated\nsource: here\nmeasured_by: neurocl\n"
        "expected: [{metric: class_il.final_average_accuracy, value: 200, tolerance: 1}]\n"
        "config: {method: fedncm, rounds: 1, local_epochs: 1}\n"
    )
    outside = inside("reproduce", "far.yaml", "--quiet", "--out", "far")
    assert outside.returncode == 1
    assert "outside" in outside.stdout
    assert_one_line(inside("reproduce", "federated/paper-lorm-eurosat", "--quiet"), 2, "vit-base-patch16-224-in21k")


def test_methods_lists_every_name(inside):
    from neurocl.federated.catalog import FEDERATED, PROBLEMS

    document = json.loads(inside("federated", "methods", "--json").stdout)
    assert list(document["methods"]) == FEDERATED.names()
    assert list(document["data sets"]) == PROBLEMS.names()
    text = inside("federated", "methods").stdout
    assert all(f"  {name} " in text for name in (*FEDERATED.names(), *PROBLEMS.names()))


def test_compare_puts_methods_beside_each_other_in_every_format(inside):
    first = inside("federated", "compare", "--smoke", "--methods", "fedncm, fedcof,fedncm,", "--seeds", 2, "--out", "b")
    assert [line for line in first.stderr.splitlines() if "seed" in line] == [
        "fedncm, seed 0",
        "fedncm, seed 1",
        "fedcof, seed 0",
        "fedcof, seed 1",
    ]
    lines = first.stdout.splitlines()
    assert lines[0].split()[:3] == ["method", "accuracy", "%"]
    assert [line.split()[0] for line in lines[1:]] == ["fedncm", "fedcof"]
    assert "±" in lines[1]
    # what is finished is read, not run again
    again = ("--methods", "fedncm,fedcof", "--seeds", 2, "--out", "b", "--format")
    rows = list(csv.reader(io.StringIO(inside(*COMPARE, *again, "csv").stdout)))
    assert rows[0] == ["method", "accuracy %", "forgetting", "MB up", "MB down", "seconds"]
    assert [dict(zip(rows[0], row, strict=True)) for row in rows[1:]] == json.loads(
        inside(*COMPARE, *again, "json").stdout
    )
    marked = inside(*COMPARE, *again, "md").stdout.splitlines()
    assert [line.split()[1] for line in marked[::2]] == ["method", "fedncm"]
    assert set(marked[1]) == set("|-:")


def test_compare_looks_at_all_methods_before_it_runs_the_first(inside, tmp_path):
    assert_one_line(inside(*COMPARE, "--methods", "fedncm,fedcfo", "--out", "c"), 2, "'fedcof'")
    clash = inside(*COMPARE, "--methods", "fedncm,lora", "--set", "options.rnak=2", "--out", "c")
    assert_one_line(clash, 2, "unknown key 'rnak'")
    assert_one_line(inside(*COMPARE, "--methods", ",", "--out", "c"), 2, "names no method")
    assert not (tmp_path / "c").exists()


def test_compare_does_not_mix_configurations_in_one_folder(inside):
    assert inside(*COMPARE, "--methods", "fedncm", "--out", "d").returncode == 0
    other = inside(*COMPARE, "--methods", "fedncm", "--beta", 5, "--out", "d")
    assert_one_line(other, 2, "another configuration", "--out")


def test_data_of_ones_own_are_found_beside_the_user(inside, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_data.py").write_text(MY_DATA)
    result = inside(*RUN, "--dataset", "my_data:waves", "--method", "fedncm", "--json", "--out", "own")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["metrics"]["class_il"]["final_average_accuracy"] == 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "fedagv"), ("'fedagv'", "did you mean 'fedavg'")),
        (("--dataset", "digit"), ("'digit'", "did you mean 'digits'")),
        (("--dataset", "nofile:f"), ("nofile",)),
        (("--dataset", "./my_file.py:waves"), ("module:function", "'./my_file.py:waves'")),
        (("--dataset", "my_file:"), ("module:function",)),
        (("--set", "round=3"), ("unknown key 'round'", "did you mean 'rounds'")),
        (("--set", "options.rnk=3", "--method", "lora"), ("options of lora", "did you mean 'rank'")),
        (("--set", "rounds"), ("--set expects key=value",)),
        (("--set", "partition.kind=even"), ("partition.kind", "'dirichlet'", "'even'")),
        (("--set", "device=gpu"), ("device must be auto, cpu, cuda", "'gpu'")),
        (("--set", "backbone=resnet18"), ("no backbone 'resnet18'", "perceptron")),
        (("--set", "classes_per_task=20"), ("classes_per_task is 20", "10 classes")),
        (("--beta", 0), ("partition.beta", "greater than 0")),
        (("--lr", -1), ("lr", "greater than 0")),
        (("--config", "nowhere.yaml"), ("nowhere.yaml", "no such configuration file")),
        (("--data-dir", "nowhere"), ("nowhere is not a folder",)),
        (("--runtime", "ray"), ("--runtime must be one of", "'ray'")),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(inside, tmp_path, arguments, words):
    assert_one_line(inside(*RUN, *arguments), 2, *words)
    assert not list(tmp_path.glob("runs/*"))


def test_mistakes_with_folders_and_lists_are_one_line(inside, finished):
    assert_one_line(inside("federated", "run", "--resume", "nowhere"), 2, "nowhere is not a run folder")
    assert_one_line(inside(*RUN, "--out", "first"), 2, "first holds a run already")
    assert_one_line(inside(*RUN, "--clients", 5000), 2, "5000 clients", "fewer clients")
    assert_one_line(inside(*COMPARE, "--seeds", "a"), 2, "--seeds", "'a'")
    assert_one_line(inside(*COMPARE, "--seeds", 0), 2, "--seeds", "'0'")
    assert_one_line(inside(*COMPARE, "--format", "latex"), 2, "--format", "'latex'")


def test_mistakes_of_a_client_are_one_line_before_it_looks_for_a_server(inside):
    pytest.importorskip("flwr")
    client = ("federated", "client", "--client", 0, "--server", "127.0.0.1:9")
    assert_one_line(inside(*client, "--dataset", "digit"), 2, "did you mean 'digits'")
    assert_one_line(inside(*client, "--dataset", "my_file.py"), 2, "'my_file.py'")
    assert_one_line(inside(*client, "--device", "gpu"), 2, "'gpu'")
    assert_one_line(inside(*client, "--root-certificates", "nowhere"), 2, "nowhere: no such file")
    assert_one_line(inside("federated", "client", "--client", 0, "--server", "here"), 2, "HOST:PORT", "'here'")
