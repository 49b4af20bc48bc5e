"""TIES in a federation: what stays, who wins the vote, how far the server goes."""

from __future__ import annotations

import numpy as np
import pytest

from neurocl.federated.payload import Payload
from tests.conftest import reference
from tests.federated.adapter_runs import at_task, by_hand, digits_method

SMALL = {"rounds": 1, "local_epochs": 1}


def merged(monkeypatch, state, clients, **options):
    method = digits_method("ties", options, **SMALL)
    monkeypatch.setattr(method, "expected", lambda state, place: list(state.arrays))
    return method.aggregate(Payload(state), at_task(2), by_hand(clients)).arrays


def test_the_merge_is_that_of_the_public_code(monkeypatch):
    case = reference("federated-baselines/flat")
    found = merged(monkeypatch, {"flat": case["server"]}, [{"flat": own} for own in case["clients"]])
    np.testing.assert_allclose(found["flat"], case["ties"], rtol=1e-6)


@pytest.mark.parametrize("cut", [1, 20, 63])
def test_the_threshold_is_that_of_the_whole_network_not_of_each_tensor(monkeypatch, cut):
    case = reference("federated-baselines/flat")
    halves = [{"a": own[:cut], "b": own[cut:]} for own in (case["server"], *case["clients"])]
    found = merged(monkeypatch, halves[0], halves[1:])
    np.testing.assert_allclose(np.concatenate([found["a"], found["b"]]), case["ties"], rtol=1e-6)


def test_one_client_whose_changes_all_stay_is_returned(monkeypatch):
    case = reference("federated-baselines/flat")
    found = merged(monkeypatch, {"flat": case["server"]}, [{"flat": case["clients"][0]}], density=1.0, scale=1.0)
    np.testing.assert_allclose(found["flat"], case["clients"][0], rtol=1e-6)


def test_clients_that_changed_nothing_change_nothing(monkeypatch):
    case = reference("federated-baselines/flat")
    found = merged(monkeypatch, {"flat": case["server"]}, [{"flat": case["server"]}] * 3)
    np.testing.assert_array_equal(found["flat"], case["server"])


def test_a_draw_changes_nothing(monkeypatch):
    change = np.array([1, 2, 3], np.float32)
    found = merged(monkeypatch, {"flat": np.ones(3, np.float32)}, [{"flat": 1 + change}, {"flat": 1 - change}])
    np.testing.assert_array_equal(found["flat"], np.ones(3))
