"""Metrics of a federated run, against examples worked by hand."""

import numpy as np
import pytest

from neurocl.federated import metrics

# Three tasks of 10, 20 and 70 test samples. Per cent: 80 / 90, 50 / 60, 75, 90.
CORRECT = np.array([[8, 99, 99], [9, 10, 99], [6, 15, 63]])
TOTAL = np.array([10, 20, 70])


def test_accuracies_are_per_cent_of_each_tasks_test_set():
    nan = np.nan
    np.testing.assert_array_equal(
        metrics.accuracy_matrix(CORRECT, TOTAL), [[80, nan, nan], [90, 50, nan], [60, 75, 90]]
    )


def test_final_average_accuracy_counts_samples_and_macro_counts_tasks():
    assert metrics.final_average_accuracy(CORRECT, TOTAL) == pytest.approx(84)  # (6 + 15 + 63) / 100
    assert metrics.final_macro_accuracy(CORRECT, TOTAL) == pytest.approx(75)  # (60 + 75 + 90) / 3


def test_incremental_accuracy_averages_the_micro_accuracies_after_each_task():
    after_each = [80, 100 * 19 / 30, 84]
    assert metrics.average_incremental_accuracy(CORRECT, TOTAL) == pytest.approx(np.mean(after_each))


def test_forgetting_is_measured_from_the_best_accuracy_before_the_last_task():
    # Task 0: best 90, now 60. Task 1: best before the last task 50, now 75.
    assert metrics.forgetting(metrics.accuracy_matrix(CORRECT, TOTAL)) == pytest.approx((30 - 25) / 2)


def test_published_forgetting_divides_by_all_tasks_and_starts_right_after_learning():
    assert metrics.forgetting_fm(metrics.accuracy_matrix(CORRECT, TOTAL)) == pytest.approx((20 - 25 + 0) / 3)


def test_backward_transfer_is_the_change_since_learning():
    accuracy = metrics.accuracy_matrix(CORRECT, TOTAL)
    assert metrics.backward_transfer(accuracy) == pytest.approx((-20 + 25) / 2)
    assert metrics.forgetting_fm(accuracy) == pytest.approx(-metrics.backward_transfer(accuracy) * 2 / 3)


def test_tasks_of_equal_size_have_equal_micro_and_macro_accuracy():
    summary = metrics.summarize(np.array([[3, 0], [2, 5]]), np.array([7, 7]))
    assert summary["final_average_accuracy"] == pytest.approx(summary["final_macro_accuracy"])


def test_one_task_has_nothing_to_forget():
    assert metrics.summarize(np.array([[3]]), np.array([4])) == {
        "final_average_accuracy": 75.0,
        "final_macro_accuracy": 75.0,
        "average_incremental_accuracy": 75.0,
        "forgetting": 0.0,
        "forgetting_fm": 0.0,
        "backward_transfer": 0.0,
    }


def test_entries_above_the_diagonal_are_not_looked_at():
    other = CORRECT.copy()
    other[np.triu_indices(3, 1)] = -5
    assert metrics.summarize(other, TOTAL) == metrics.summarize(CORRECT, TOTAL)


@pytest.mark.parametrize(
    ("correct", "total"),
    [
        (np.zeros((2, 3), int), np.array([5, 5])),
        (np.zeros((0, 0), int), np.zeros(0, int)),
        (np.array([[6]]), np.array([5])),
        (np.array([[-1]]), np.array([5])),
        (np.array([[0]]), np.array([0])),
    ],
)
def test_impossible_counts_are_refused(correct, total):
    with pytest.raises(ValueError, match="correct"):
        metrics.accuracy_matrix(correct, total)


def test_fairness_is_the_spread_over_clients_that_have_test_samples():
    accuracies = metrics.client_accuracies(np.array([9, 3, 0]), np.array([10, 6, 0]))
    np.testing.assert_array_equal(accuracies, [90, 50, np.nan])
    fairness = metrics.client_fairness(accuracies)
    assert fairness == {"client_accuracy_mean": 70.0, "client_accuracy_std": 20.0, "client_accuracy_min": 50.0}


def test_fairness_without_any_test_sample_is_refused():
    with pytest.raises(ValueError, match="no client"):
        metrics.client_fairness(np.array([np.nan]))


def test_bytes_to_a_target_are_those_of_the_first_time_it_is_reached():
    num_bytes, accuracy = np.array([10, 20, 30, 40]), np.array([np.nan, 55.0, 50.0, 70.0])
    assert metrics.bytes_to_accuracy(num_bytes, accuracy, 55.0) == 20
    assert metrics.bytes_to_accuracy(num_bytes, accuracy, 56.0) == 40
    assert metrics.bytes_to_accuracy(num_bytes, accuracy, 71.0) is None
    assert metrics.bytes_to_accuracy(np.empty(0, int), np.empty(0), 0.0) is None


def test_a_log_of_bytes_that_shrinks_is_refused():
    with pytest.raises(ValueError, match="add up"):
        metrics.bytes_to_accuracy(np.array([10, 5]), np.array([1.0, 2.0]), 1.0)
