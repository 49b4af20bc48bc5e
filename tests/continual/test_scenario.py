"""Scenarios: class order, unequal tasks, splits, all checked on arrays whose pixels name their class."""

import numpy as np
import pytest
import torch

from neurocl.continual.scenario import Scenario, class_permutation, validation_split
from neurocl.data.dataset import ArrayDataset
from neurocl.errors import UserError
from tests.conftest import reference_cases


def make_dataset(counts=(5, 6, 7, 8, 9)):
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    images = np.tile(labels[:, None, None, None].astype(np.uint8), (1, 1, 2, 2))
    names = tuple(f"class {k}" for k in range(len(counts)))
    return ArrayDataset("toy", images, labels, images[:20], labels[:20], names)


@pytest.mark.parametrize("case", reference_cases("continual-protocol/class_permutation"))
def test_class_permutation_equals_the_reference(case):
    order = class_permutation(len(case["order"]), int(case["seed"]))
    np.testing.assert_array_equal(order, case["order"])
    np.testing.assert_array_equal(order[case["raw_labels"]], case["permuted_labels"])
    np.testing.assert_array_equal(np.argsort(order), case["names_in_new_order"])


@pytest.mark.parametrize("case", reference_cases("continual-protocol/validation_split"))
def test_validation_split_equals_the_reference(case):
    size = float(case["validation_size"])
    fraction = size if size < 1 else size / 100
    train, validation = validation_split(case["targets"], fraction, int(case["seed"]))
    np.testing.assert_array_equal(train, case["train_idx"])
    np.testing.assert_array_equal(validation, case["val_idx"])


def test_unequal_tasks_partition_the_classes():
    scenario = Scenario(make_dataset(), (2, 1, 2))
    assert scenario.offsets.tolist() == [0, 2, 3, 5]
    for index, classes in enumerate(([0, 1], [2], [3, 4])):
        task = scenario.task(index)
        assert sorted(set(task.labels.tolist())) == classes
        assert torch.equal(task.images[:, 0, 0, 0].long(), task.labels)
    assert scenario.task_lengths == [11, 7, 17]
    assert len(scenario.merged_task().labels) == 35


def test_a_class_order_renames_classes_and_pictures_stay_with_their_class():
    scenario = Scenario(make_dataset(), (2, 2), class_order=(4, 2, 0, 1, 3))
    assert scenario.class_names == ("class 4", "class 2", "class 0", "class 1")
    task = scenario.task(0)
    original = torch.tensor([4, 2])[task.labels]
    assert torch.equal(task.images[:, 0, 0, 0].long(), original)


def test_the_validation_part_replaces_the_test_set():
    scenario = Scenario(make_dataset(), (2, 1, 2), val_fraction=0.4)
    assert scenario.task_lengths == [6, 4, 9]
    images, labels = scenario.test_data(0)
    assert len(labels) == 5
    assert torch.equal(images[:, 0, 0, 0].long(), labels)


def test_reduced_budgets_keep_the_first_items_of_each_class():
    scenario = Scenario(make_dataset(), (2, 1, 2), max_train_per_class=3, max_test_per_class=1)
    assert scenario.task_lengths == [6, 3, 6]
    assert len(scenario.test_data(2)[1]) == 2


@pytest.mark.parametrize(
    ("sizes", "order", "message"),
    [
        ((3, 3), None, "sum to at most 5"),
        ((), None, "task_sizes"),
        ((0, 2), None, "positive"),
        ((2,), (0, 0, 1, 2, 3), "each class 0..4"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(sizes, order, message):
    with pytest.raises(UserError, match=message):
        Scenario(make_dataset(), sizes, class_order=order)
