"""Averages that withstand a hostile client."""

from __future__ import annotations

import numpy as np
import pytest

from neurocl.errors import UserError
from neurocl.federated.driver import FederatedRun
from neurocl.federated.exchange import Outcome, SequentialExchange, Stores
from neurocl.federated.method import Reply
from neurocl.federated.payload import Payload
from neurocl.federated.robust import krum_scores
from tests.federated.adapter_runs import at_task, by_hand, digits_method

SMALL = {"rounds": 2, "local_epochs": 1, "classes_per_task": (2,), "beta": 100.0}
ROBUST = ["median", "trimmed-mean", "krum"]


class Attacked(SequentialExchange):
    """Client 0 sends noise that is much larger than weights."""

    def __call__(self, place, messages, attempt):
        outcome = super().__call__(place, messages, attempt)
        noise = np.random.default_rng(place.round)
        arrays = outcome.replies[0].payload.arrays
        spoilt = {name: noise.normal(0, 100, array.shape).astype(array.dtype) for name, array in arrays.items()}
        first = Reply(0, Payload(spoilt, outcome.replies[0].payload.meta))
        return Outcome([first, *outcome.replies[1:]], outcome.failures)


def accuracy(name, exchange):
    method = digits_method(name, **SMALL)
    stores = Stores(None)
    run = FederatedRun(method.problem, method, exchange(method.problem, method, stores), stores)
    return run.run()["metrics"]["class_il"]["final_average_accuracy"]


def combined(name, values, options=None):
    method = digits_method(name, {"train": "head"} | (options or {}), **SMALL)
    zero = {"head.weight": np.zeros(2, np.float32), "head.bias": np.zeros(1, np.float32)}
    rows = [{"head.weight": np.float32([value, -value]), "head.bias": np.float32([value])} for value in values]
    return method.aggregate(Payload(zero), at_task(2), by_hand(rows)).arrays["head.weight"]


def test_one_hostile_client_destroys_fedavg():
    assert accuracy("fedavg", SequentialExchange) > 85
    # Two classes: a coin gets half of them right.
    assert accuracy("fedavg", Attacked) < 60


@pytest.mark.parametrize("name", ROBUST)
def test_one_hostile_client_does_not_destroy_a_robust_average(name):
    honest, attacked = accuracy(name, SequentialExchange), accuracy(name, Attacked)
    assert honest > 85
    assert attacked > honest - 5


@pytest.mark.parametrize("name", ROBUST)
def test_equal_replies_are_returned_and_their_order_does_not_matter(name):
    np.testing.assert_array_equal(combined(name, [3.0] * 5), [3, -3])
    np.testing.assert_array_equal(combined(name, [1, 2, 4, 8, 100]), combined(name, [100, 4, 1, 8, 2]))


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_replies_are_enough(name, count):
    assert 1 <= combined(name, [1.0, 2.0, 3.0][:count])[0] <= count


def test_the_median_takes_the_middle():
    np.testing.assert_array_equal(combined("median", [5, 1, 1e6, 2, 3]), [3, -3])


def test_the_trimmed_mean_leaves_out_both_ends():
    np.testing.assert_allclose(combined("trimmed-mean", [-1e6, 1, 2, 3, 1e6]), [2, -2], rtol=1e-6)
    np.testing.assert_allclose(combined("trimmed-mean", [1, 2, 3, 4, 10], {"trim": 0}), [4, -4], rtol=1e-6)
    np.testing.assert_allclose(combined("trimmed-mean", [1, 2, 3, 4, 90], {"trim": 0.4}), [3, -3], rtol=1e-6)


def test_krum_takes_the_reply_with_the_nearest_neighbours():
    assert combined("krum", [1, 2, 2.1, 4, 100])[0] == np.float32(2)
    np.testing.assert_allclose(
        krum_scores([[np.array([v])] for v in (0.0, 1.0, 3.0, 7.0, 100.0)], 1), [10, 5, 13, 52, 93**2 + 97**2]
    )
    np.testing.assert_allclose(combined("krum", [1, 2, 2.1, 4, 100], {"chosen": 2})[0], 2.05, rtol=1e-6)


def test_krum_says_how_many_clients_it_needs():
    with pytest.raises(UserError, match="at least 7 clients, got 5"):
        digits_method("krum", {"attackers": 2})
