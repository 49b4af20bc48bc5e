"""Rows about classes: what travels, what is refused, what is added up and taken out."""

import numpy as np
import pytest
import torch

from neurocl.federated.class_table import CLASSES, COUNTS, MEANS, NOBODY, SPREADS, ClassTable, row_objection, told
from neurocl.federated.method import Reply
from neurocl.federated.payload import Payload, num_bytes


def rows(classes, counts, means, spreads=None):
    spreads = None if spreads is None else torch.tensor(spreads)
    arrays, meta = told(torch.tensor(classes), torch.tensor(counts), torch.tensor(means), spreads)
    return Payload(arrays, meta | {"n": sum(counts)})


@pytest.fixture
def table():
    replies = [
        Reply(2, rows([4, 5], [1, 3], [[1.0, 0.0], [2.0, 2.0]])),
        Reply(7, rows([5], [1], [[6.0, 2.0]])),
    ]
    return ClassTable.received(replies)


def test_a_row_costs_four_bytes_for_each_number():
    message = rows([0, 3, 4], [5, 6, 7], np.zeros((3, 11)).tolist(), np.zeros((3, 11)).tolist())
    assert sum(array.nbytes for array in message.arrays.values()) == 3 * 4 * (2 * 11 + 1)
    assert num_bytes(message) - 3 * 4 * (2 * 11 + 1) == len('{"classes":[0,3,4],"n":18}')


def test_rows_survive_a_state(table):
    again = ClassTable.kept(table.store("kept."), "kept.")
    for name, value in vars(table).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    assert again.clients.tolist() == [2, 2, 7]
    assert again.classes.tolist() == [4, 5, 5]


def test_pooling_gives_the_mean_of_all_samples_and_names_nobody(table):
    pooled = table.pooled()
    assert pooled.classes.tolist() == [4, 5]
    assert pooled.counts.tolist() == [1, 4]
    assert pooled.clients.tolist() == [NOBODY, NOBODY]
    np.testing.assert_array_equal(pooled.means, [[1, 0], [3, 2]])


def test_a_client_is_taken_out_without_a_trace(table):
    np.testing.assert_array_equal(table.without(2).means, [[6, 2]])
    assert table.without(3).classes.tolist() == table.classes.tolist()


def test_pooling_nothing_gives_nothing():
    assert ClassTable.empty(3).pooled().means.shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({CLASSES: "all"}, "list of class numbers"),
        ({CLASSES: [True]}, "list of class numbers"),
        ({CLASSES: [6]}, "among 4 to 5"),
        ({CLASSES: [4, 5]}, "expected int32 [2]"),
        ({COUNTS: np.ones(1, dtype=np.int64)}, "int64"),
        ({COUNTS: np.zeros(1, dtype=np.int32)}, "below 1"),
        ({MEANS: np.zeros((1, 3), dtype=np.float32)}, "expected float32 [1, 2]"),
        ({MEANS: None}, "class.means is missing"),
        ({SPREADS: -np.ones((1, 2), dtype=np.float32)}, "negative"),
        ({SPREADS: None}, "class.spreads is missing"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_with_a_reason(change, reason):
    good = rows([4], [3], [[1.0, 2.0]], [[1.0, 1.0]])
    assert row_objection(good, range(4, 6), 2, spread=(2,)) == ""
    arrays, meta = dict(good.arrays), dict(good.meta)
    for name, value in change.items():
        (meta if name == CLASSES else arrays)[name] = value
        if value is None:
            del arrays[name]
    assert reason in row_objection(Payload(arrays, meta), range(4, 6), 2, spread=(2,))


def test_a_class_may_have_only_so_many_rows():
    twice = rows([4, 4], [2, 2], [[1.0, 2.0], [0.0, 0.0]])
    assert "more than 1" in row_objection(twice, range(4, 6), 2)
    assert row_objection(twice, range(4, 6), 2, repeats=2) == ""
