"""Metrics from the accuracy matrix, against reference values of an independent implementation."""

import numpy as np
import pytest

from neurocl.continual import metrics
from tests.conftest import reference_cases


@pytest.mark.parametrize("case", reference_cases("continual-protocol/metrics"))
def test_metrics_equal_the_reference(case):
    accuracy, untrained = case["acc"], case["random_baseline"]
    assert metrics.final_average_accuracy(accuracy) == pytest.approx(case["faa"], rel=1e-9)
    assert metrics.average_incremental_accuracy(accuracy) == pytest.approx(case["average_incremental"], rel=1e-9)
    assert metrics.backward_transfer(accuracy) == pytest.approx(case["bwt"], rel=1e-9)
    assert metrics.forward_transfer(accuracy, untrained) == pytest.approx(case["fwt"], rel=1e-9)
    assert metrics.forgetting(accuracy) == pytest.approx(case["forgetting_strict"], rel=1e-9)
    assert metrics.forgetting_with_last(accuracy) == pytest.approx(case["forgetting_official"], rel=1e-9)


@pytest.mark.parametrize("case", reference_cases("continual-protocol/class_task_il"))
def test_class_il_and_task_il_equal_the_reference(case):
    last = int(case["last_task"])
    offsets = np.concatenate([[0], np.cumsum(case["classes_per_task"])])
    chosen = case["task"] <= last
    class_il, task_il = metrics.task_accuracies(case["logits"][chosen], case["labels"][chosen], offsets, last)
    np.testing.assert_allclose(class_il, case["class_il"][: last + 1], rtol=1e-9)
    np.testing.assert_allclose(task_il, case["task_il"][: last + 1], rtol=1e-9)


def test_task_il_is_never_below_class_il():
    rng = np.random.default_rng(0)
    offsets = np.array([0, 3, 4, 9])
    class_il, task_il = metrics.task_accuracies(rng.normal(size=(200, 9)), rng.integers(0, 9, 200), offsets, 2)
    assert (task_il >= class_il).all()
    assert task_il[1] == 100.0  # a task of one class leaves nothing to confuse


def test_metrics_leave_the_matrix_alone():
    accuracy = np.array([[90.0, np.nan], [50.0, 80.0]])
    before = accuracy.copy()
    summary = metrics.summarize(accuracy)
    np.testing.assert_array_equal(accuracy, before)
    assert summary["forgetting"] == 40.0
    assert summary["backward_transfer"] == -40.0


def test_one_task_has_nothing_to_forget():
    assert metrics.summarize(np.array([[77.0]])) == {
        "final_average_accuracy": 77.0,
        "average_incremental_accuracy": 77.0,
        "forgetting": 0.0,
        "forgetting_with_last": 0.0,
        "backward_transfer": 0.0,
    }
