"""Suites of experts: training, going on after an interruption, evaluation, and the comparison of all merges."""

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from neurocl.devices import prepare
from neurocl.errors import UserError
from neurocl.merging import comparison
from neurocl.merging.comparison import CONTENDERS, Calibration, Contender, compare, read_comparison, scaled, sweep
from neurocl.merging.evaluation import Evaluator, Scores
from neurocl.merging.plots import save_plots
from neurocl.merging.suite import LOGIT_SCALE, Suite, load_state, logits, network, suite_config
from neurocl.merging.tables import comparison_table
from neurocl.merging.training import Fit, class_means, train_suite

SMALL = {
    "tasks": ("turned", "inverted"),
    "width": 32,
    "depth": 2,
    "heads": 2,
    "pretrain_epochs": 12,
    "pretrain_lr": 5e-3,
    "epochs": 6,
    "lr": 2e-3,
    "batch_size": 32,
}


@pytest.fixture(scope="module")
def runtime():
    return prepare("cpu", "fp32", 1, keep_memory=False)


@pytest.fixture(scope="module")
def suite(tmp_path_factory, runtime):
    return train_suite(suite_config("digits", **SMALL), tmp_path_factory.mktemp("suites") / "digits", runtime=runtime)


@pytest.fixture
def evaluator(suite, runtime):
    return Evaluator(suite, runtime)


def digest(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_experts_are_better_on_their_task_than_the_base(evaluator, suite):
    base = evaluator.scores(suite.base).absolute
    for task, value in evaluator.experts().items():
        assert value > base[task]


def test_the_head_of_a_task_is_the_class_means_of_the_base(suite, runtime):
    items = suite.items("turned", "train")
    base = network(suite.network_config, suite.base)
    with torch.inference_mode():
        unit = F.normalize(base(items.batch(torch.arange(len(items)))), dim=1)
    by_hand = torch.stack([unit[items.labels == label].mean(dim=0) for label in range(10)])
    torch.testing.assert_close(suite.heads["turned"], F.normalize(by_hand, dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(class_means(base, items, 10, runtime), suite.heads["turned"], rtol=1e-4, atol=1e-5)


def test_logits_are_scaled_cosines():
    head = F.normalize(torch.randn(3, 4), dim=1)
    values = logits(5 * head, head)
    torch.testing.assert_close(values.diagonal(), torch.full((3,), LOGIT_SCALE))


def test_a_suite_that_lost_an_expert_is_finished_with_the_same_bytes(suite, tmp_path, runtime):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(suite.path, copy)
    shutil.rmtree(copy / "experts" / "inverted")
    lines: list[str] = []
    with pytest.raises(UserError, match="the expert inverted is missing"):
        _ = Suite.open(copy).experts
    train_suite(suite_config("digits", **SMALL), copy, runtime=runtime, say=lines.append)
    assert digest(copy) == digest(suite.path)
    assert "turned: there already" in lines


def test_a_folder_with_another_suite_is_not_touched(suite, runtime, tmp_path):
    with pytest.raises(UserError, match="a suite of another configuration"):
        train_suite(suite_config("digits", **{**SMALL, "seed": 1}), suite.path, runtime=runtime)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        train_suite(suite_config("digits", **SMALL), tmp_path, runtime=runtime)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("turnde",)}, "has no task 'turnde'"),
        ({"epochs": 0}, "epochs"),
        ({"epoch": 3}, "unknown key 'epoch'; did you mean 'epochs'"),
        ({"width": 30, "heads": 4}, "width must be a multiple of heads, got 30 and 4"),
    ],
)
def test_a_wrong_configuration_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        suite_config("digits", **changes)
    with pytest.raises(UserError, match="digits, pictures"):
        suite_config("letters")


def test_the_learning_rate_warms_up_and_falls_to_zero():
    fit = Fit(epochs=1, lr=1.0, batch_size=1, weight_decay=0.0, warmup=0.1)
    factors = [fit.factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[-1] < 1e-3
    assert all(later <= earlier for earlier, later in pairwise(factors[10:]))


def test_normalised_accuracy_is_the_mean_of_ratios():
    scores = Scores({"a": 40.0, "b": 90.0}, {"a": 80.0, "b": 90.0})
    assert scores.normalised == {"a": 50.0, "b": 100.0}
    assert scores.mean_normalised == 75.0
    assert scores.mean_absolute == 65.0


def test_an_expert_that_gets_nothing_right_has_no_share_to_take():
    with pytest.raises(UserError, match="the expert of b gets no picture right"):
        _ = Scores({"a": 40.0, "b": 0.0}, {"a": 80.0, "b": 0.0}).normalised


def test_an_experts_normalised_accuracy_on_its_own_task_is_one_hundred(evaluator, suite):
    scores = evaluator.scores(suite.experts["turned"])
    assert scores.normalised["turned"] == 100.0


def test_accuracy_equals_counting_by_hand(evaluator, suite):
    items = suite.items("inverted", "test")
    model = network(suite.network_config, suite.base)
    with torch.inference_mode():
        embedding = F.normalize(model(items.batch(torch.arange(len(items)))), dim=1)
    right = int(((embedding @ suite.heads["inverted"].T).argmax(dim=1) == items.labels).sum())
    assert evaluator.of_task(suite.base, "inverted") == 100 * right / len(items)


def test_the_sweep_stops_after_three_scales_without_a_better_mean(evaluator, suite, monkeypatch):
    means = iter([50.0, 60.0, 55.0, 54.0, 53.0, 99.0])
    asked = []

    def scores(state, split):
        asked.append(split)
        value = next(means)
        return Scores({"turned": value}, {"turned": 100.0})

    monkeypatch.setattr(evaluator, "scores", scores)
    best, seen = sweep(evaluator, suite.base, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    assert best == 0.2
    assert list(seen) == ["0.1", "0.2", "0.3", "0.4", "0.5"]
    assert set(asked) == {"val"}


def test_scaling_goes_from_the_base_to_the_merged_model_and_beyond(suite):
    merged = suite.experts["turned"]
    assert torch.equal(scaled(suite.base, merged, 0.0)["pos_embed"], suite.base["pos_embed"])
    assert scaled(suite.base, merged, 1.0) is merged
    twice = scaled(suite.base, merged, 2.0)["pos_embed"]
    torch.testing.assert_close(twice, 2 * merged["pos_embed"] - suite.base["pos_embed"])


def test_calibration_sees_the_same_unlabelled_training_pictures_every_time(suite, runtime):
    calibration = Calibration(suite, 20, runtime)
    first, second = calibration.batches("turned"), calibration.batches("turned")
    assert sum(map(len, first)) == 20
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_merge_of_the_comparison_runs_and_a_second_run_adds_nothing(suite, runtime, tmp_path):
    chosen = [
        Contender("ada-merging", options={"num_steps": 3})
        if item.method == "ada-merging"
        else dataclasses.replace(item, alphas=item.alphas[:2])
        for item in CONTENDERS
    ]
    outcomes = compare(suite, tmp_path, runtime=runtime, chosen=chosen, num_examples=24, max_items=40)
    names = [outcome.name for outcome in outcomes]
    assert names[:2] == ["base", "experts"]
    assert set(names[2:]) == {item.name for item in CONTENDERS} | set(comparison.MASKS)
    for outcome in outcomes:
        assert set(outcome.absolute) == {"turned", "inverted"}
        assert math.isfinite(outcome.normalised)
    before = (tmp_path / "comparison.json").read_bytes()
    again = compare(suite, tmp_path, runtime=runtime, chosen=chosen, num_examples=24, max_items=40)
    assert (tmp_path / "comparison.json").read_bytes() == before
    assert [outcome.absolute for outcome in again] == [outcome.absolute for outcome in outcomes]
    with pytest.raises(UserError, match="another suite or setting"):
        compare(suite, tmp_path, runtime=runtime, chosen=chosen, num_examples=25, max_items=40)
    pictures = save_plots(outcomes, tmp_path / "plots")
    assert [path.name for path in pictures] == ["accuracy.png", "scale.png", "alignment.png"]
    assert all(path.stat().st_size > 5000 for path in pictures)


def test_interrupted_comparisons_keep_what_is_done(suite, runtime, tmp_path, monkeypatch):
    chosen = [Contender("average"), Contender("task-arithmetic", (0.5,)), Contender("ties")]
    real = comparison.merged_with

    def stop_at_ties(contender, suite, calibration):
        if contender.method == "ties":
            raise KeyboardInterrupt
        return real(contender, suite, calibration)

    monkeypatch.setattr(comparison, "merged_with", stop_at_ties)
    with pytest.raises(KeyboardInterrupt):
        compare(suite, tmp_path, runtime=runtime, chosen=chosen, with_masks=False, with_alignment=False)
    kept = [outcome.name for outcome in read_comparison(tmp_path)]
    assert kept == ["base", "experts", "average", "task-arithmetic"]


def test_the_average_is_measured_as_the_mean_of_the_weights(suite, runtime, tmp_path, evaluator):
    outcomes = compare(suite, tmp_path, runtime=runtime, chosen=[Contender("average")], with_masks=False)
    mean = {name: sum(state[name] for state in suite.experts.values()) / 2 for name in suite.base}
    assert outcomes[-1].absolute == evaluator.scores(mean).absolute


def test_tables_come_in_four_forms_and_best_first(suite, runtime, tmp_path):
    outcomes = compare(suite, tmp_path, runtime=runtime, chosen=[Contender("average")], with_masks=False)
    markdown = comparison_table(outcomes, "md").splitlines()
    assert markdown[0] == "| merge | alpha | turned | inverted | mean % | of experts % | s |"
    assert markdown[2].startswith("| experts |")
    assert comparison_table(outcomes, "csv").splitlines()[0] == "merge,alpha,turned,inverted,mean %,of experts %,s"
    rows = json.loads(comparison_table(outcomes, "json"))
    assert [row["name"] for row in rows] == sorted(
        (row["name"] for row in rows), key=lambda name: -next(r["mean"] for r in rows if r["name"] == name)
    )
    assert "of experts %" in comparison_table(outcomes)


def test_unknown_contenders_are_named_with_the_closest_one():
    with pytest.raises(UserError, match="did you mean 'iso-c'"):
        comparison.contenders(["iso_c"])


def test_states_load_from_folders_and_files_alike(suite):
    folder = load_state(suite.path / "base")
    file = load_state(suite.path / "base" / "model.safetensors")
    assert folder.keys() == file.keys()
    assert all(torch.equal(folder[name], file[name]) for name in folder)
