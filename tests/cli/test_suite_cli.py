"""``neurocl merging train, stats, evaluate, compare`` as a user meets them: what they print, and mistakes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from neurocl.cli.main import main
from neurocl.merging.statistics import Statistics
from neurocl.merging.suite import load_state
from tests.cli.conftest import assert_one_line

TASKS = ("turned", "mirrored")
TURNED = ("--suite", "SUITE", "--task", "turned", "--out")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A suite of two tasks, trained by the command itself."""
    folder = tmp_path_factory.mktemp("suites") / "small"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--smoke", "--tasks", ",".join(TASKS), "--threads", "1", "--quiet", "--out", str(folder)]
        patch.setattr("sys.argv", ["neurocl", "merging", "train", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return folder


def test_smoke_experts_have_learnt_something(suite, inside):
    """Otherwise the first thing that a newcomer sees is a table of chance."""
    result = inside("merging", "train", "--smoke", "--tasks", ",".join(TASKS), "--out", suite, "--json", "--quiet")
    document = json.loads(result.stdout)
    assert document["suite"] == str(suite)
    for task in TASKS:
        assert document["experts"][task] > document["base"][task]
        assert document["experts"][task] > 20


def test_statistics_of_an_expert_are_collected_told_and_added_up(suite, inside, tmp_path):
    where = ("--suite", suite, "--task", "turned", "--threads", 1)
    arguments = ("merging", "stats", suite / "experts" / "turned", *where, "--examples", 32)
    first = inside(*arguments, "--kind", "gram", "--kind", "fisher", "--out", "new/one.safetensors", "--json")
    document = json.loads(first.stdout)
    assert document["entries"]["gram"] == 9
    assert document["bytes"] == (tmp_path / "new" / "one.safetensors").stat().st_size
    assert "gram: 9 tensors" in inside("merging", "info", "new/one.safetensors").stdout
    inside(*arguments, "--merge-with", "new/one.safetensors", "--out", "two.safetensors")
    one, two = (Statistics.load(tmp_path / name) for name in ("new/one.safetensors", "two.safetensors"))
    for name in one.names("gram"):
        torch.testing.assert_close(two.sum("gram", name).total, 2 * one.sum("gram", name).total)
        assert two.sum("gram", name).num_samples == 64


def test_a_model_is_evaluated_on_every_task_in_percent_of_its_expert(suite, inside):
    expert = suite / "experts" / "turned"
    document = json.loads(inside("merging", "evaluate", expert, "--suite", suite, "--json").stdout)
    assert document["normalised"]["turned"] == 100.0
    assert document["mean_absolute"] == pytest.approx(sum(document["absolute"].values()) / 2)
    assert "of the expert's %" in inside("merging", "evaluate", expert, "--suite", suite).stdout


def test_a_comparison_prints_a_table_or_another_form_and_draws(suite, inside, tmp_path):
    arguments = ("merging", "compare", suite, "--method", "average", "--method", "iso-c", "--out", "found", "--quiet")
    result = inside(*arguments)
    assert "Comparison: found/comparison.json" in result.stdout
    assert (tmp_path / "found" / "plots" / "accuracy.png").is_file()
    for form in (("--format", "json"), ("--json",)):
        rows = json.loads(inside(*arguments, *form).stdout)
        assert {row["name"] for row in rows} == {"base", "experts", "average", "iso-c"}


@pytest.mark.parametrize("command", ["merge", "info", "stats", "evaluate", "compare"])
def test_help_explains_the_arguments(inside, command):
    words = {"merge": "Models:", "info": "A merge, or a model", "stats": "An expert of a suite"}
    assert words.get(command, "A ") in inside("merging", command, "--help").stdout.partition("Arguments")[2]


def other_network(folder):
    """A model that is no network of the suite."""
    folder.mkdir()
    save_file({"head.weight": torch.zeros(3)}, folder / "model.safetensors")


MISTAKES = {
    "no suite": (("compare", "nowhere"), ("nowhere is not a suite of experts",)),
    "form": (("compare", "SUITE", "--format", "xml"), ("--format must be one of", "'xml'")),
    "contender": (("compare", "SUITE", "--method", "iso_c"), ("did you mean 'iso-c'",)),
    "split": (("evaluate", "SUITE/base", "--suite", "SUITE", "--split", "train"), ("--split", "'train'")),
    "other network": (("evaluate", "other", "--suite", "SUITE"), ("other: tensor", "does not fit the network")),
    "stats of it": (("stats", "other", *TURNED, "s"), ("other: tensor", "not fit")),
    "no model": (("evaluate", "nothing", "--suite", "SUITE"), ("nothing: no such file or folder",)),
    "no data named": (("stats", "SUITE/base", "--out", "s"), ("--suite SUITE --task TASK, or --inputs FILE",)),
    "task": (
        ("stats", "SUITE/base", "--suite", "SUITE", "--task", "x", "--out", "s"),
        ("no task 'x'", "turned, mirrored"),
    ),
    "kind": (
        ("stats", "SUITE/base", *TURNED, "s", "--kind", "grm"),
        ("unknown kind 'grm'", "did you mean 'gram'"),
    ),
    "parameter": (
        ("stats", "SUITE/base", *TURNED, "s", "--parameter", "zz*"),
        ("no parameter of the network matches zz*",),
    ),
    "exists": (("stats", "SUITE/base", *TURNED, "other"), ("other exists already",)),
    "statistics that are a folder": (
        ("merge", "SUITE/base", "--method", "regmean", "--statistics", "other"),
        ("other: a folder, not a file of statistics",),
    ),
    "suite name": (("train", "--suite", "letters"), ("suite must be one of digits, pictures",)),
    "suite key": (("train", "--set", "epoch=1"), ("unknown key 'epoch'", "'epochs'")),
    "suite task": (("train", "--tasks", "turnde"), ("no task 'turnde'",)),
    "width": (("train", "--set", "width=30", "--out", "new"), ("width must be a multiple of heads",)),
    "regulariser": (("train", "--regularise", "ewc"), ("regularise", "got 'ewc'")),
    "strength": (("train", "--strength", "-1"), ("strength", "got -1")),
    "precision": (("train", "--precision", "fp8", "--out", "new"), ("precision must be fp32 or bf16, got 'fp8'",)),
    "another suite": (("train", "--out", "SUITE"), ("holds a suite of another configuration",)),
    "data": (("train", "--suite", "pictures", "--out", "new"), ("tiny-imagenet-100",)),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(suite, inside, tmp_path, kind):
    arguments, words = MISTAKES[kind]
    other_network(tmp_path / "other")
    result = inside("merging", *(word.replace("SUITE", str(suite)) for word in arguments))
    assert_one_line(result, 2, *words)


def test_a_damaged_head_is_named(suite, inside, tmp_path):
    shutil.copytree(suite, tmp_path / "copy")
    (tmp_path / "copy" / "heads" / "turned.safetensors").write_bytes(b"garbage")
    arguments = ("evaluate", "copy/base", "--suite", "copy")
    assert_one_line(inside("merging", *arguments), 2, "heads/turned.safetensors", "not a safetensors file")
    assert load_state(suite / "heads" / "turned.safetensors")["head"].shape[0] == 10
