"""Clients that raise, hang, die or answer nonsense are failures; the others, and the next round, are not affected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.exchange import Fault, ProcessExchange, SequentialExchange, Stores, checked
from neurocl.federated.method import Place, Reply
from neurocl.federated.payload import Payload, encode
from tests.federated.small_problem import config

KINDS = {
    "drop": "dropped",
    "raise": "raised",
    "hang": "hung",
    "die": "died",
    "nan": "not-finite",
    "garbage": "malformed",
}


@pytest.mark.parametrize(("fault", "kind"), KINDS.items())
def test_in_one_process_a_fault_costs_its_client_alone(fault: str, kind: str) -> None:
    problem = problem_for(config())
    method = method_for(problem)
    task = problem.tasks[0]
    place = Place(task, method.phases(task)[0], 0)
    message = method.message(method.initial_state(), place)
    exchange = SequentialExchange(problem, method, Stores(None), [Fault(fault, client=1, task=0, round=0)])
    outcome = exchange(place, dict.fromkeys(range(3), message), 0)
    assert [reply.client for reply in outcome.replies] == [0, 2]
    assert [(failure.client, failure.kind) for failure in outcome.failures] == [(1, kind)]
    again = exchange(place, dict.fromkeys(range(3), message), 1)
    assert [reply.client for reply in again.replies] == [0, 1, 2]
    for before, after in zip(outcome.replies, [again.replies[0], again.replies[2]], strict=True):
        assert encode(before.payload) == encode(after.payload)


@pytest.mark.slow
def test_processes_do_what_one_process_does_and_survive_every_fault() -> None:
    own = config(workers=2, timeout=60.0)
    problem = problem_for(own)
    method = method_for(problem)
    task = problem.tasks[0]
    phase = method.phases(task)[0]
    message = method.message(method.initial_state(), Place(task, phase, 0))
    one = SequentialExchange(problem, method, Stores(None))
    expected = [
        encode(reply.payload) for reply in one(Place(task, phase, 0), dict.fromkeys(range(3), message), 0).replies
    ]
    faults = [Fault(fault, client=1, task=0, round=number) for number, fault in enumerate(KINDS)]
    exchange = ProcessExchange(problem, Stores(None), faults)
    try:
        for number, (fault, kind) in enumerate(KINDS.items()):
            if fault == "hang":
                exchange.config = own.model_copy(update={"timeout": 2.0})
            outcome = exchange(Place(task, phase, number), dict.fromkeys(range(3), message), 0)
            assert [(failure.client, failure.kind) for failure in outcome.failures] == [(1, kind)]
            exchange.config = own
        outcome = exchange(Place(task, phase, 0), dict.fromkeys(range(3), message), 1)
        assert [encode(reply.payload) for reply in outcome.replies] == expected
        processes = [worker.process for worker in exchange._workers]
    finally:
        exchange.close()
    assert all(process.poll() is not None for process in processes)


def test_replies_are_checked_before_anybody_looks_at_them() -> None:
    good = Payload({"x": np.zeros(2, dtype=np.float32)}, {"n": 3})
    assert isinstance(checked(0, encode(good)), Reply)
    for payload, words in (
        (Payload({"x": np.array([1.0, np.inf])}, {"n": 3}), "x holds NaN"),
        (Payload({}, {}), "how many samples"),
        (Payload({}, {"n": -1}), "how many samples"),
        (Payload({}, {"n": "many"}), "how many samples"),
        # Finite, but not so what a server computes of it.
        (Payload({"x": np.array([2e18], dtype=np.float32)}, {"n": 3}), "x holds a number beyond 1e+18"),
        (Payload({"x": np.array([-2e18])}, {"n": 3}), "x holds a number beyond"),
        (Payload({"x": np.array([-(2**63)])}, {"n": 3}), "x holds a number beyond"),
        (Payload({}, {"n": 1e308}), "n holds a number beyond"),
        (Payload({}, {"n": 3, "classes": [0, 2**62]}), "classes holds a number beyond"),
    ):
        found = checked(4, encode(payload))
        assert not isinstance(found, Reply)
        assert found.client == 4
        assert words in found.text
    too_large = checked(0, encode(good), limit=20)
    assert not isinstance(too_large, Reply)


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_a_client_stores_counts_when_its_round_is_over(tmp_path: Path, on_disk: bool) -> None:
    stores = Stores(tmp_path / "clients" if on_disk else None)
    assert stores.read(3) == {}
    stores.write(3, {"a": np.arange(4)})
    assert stores.read(3) == {}
    stores.commit()
    assert np.array_equal(stores.read(3)["a"], np.arange(4))
    stores.read(3)["a"][:] = 0
    assert np.array_equal(stores.read(3)["a"], np.arange(4))


def test_after_a_crash_stores_are_those_of_the_last_saved_round(tmp_path: Path) -> None:
    stores = Stores(tmp_path)
    stores.write(0, {"a": np.array([1])})
    stores.commit()
    stores.write(0, {"a": np.array([2])})
    # The crash comes before the second round was saved, or after it was saved and before its files were renamed.
    assert np.array_equal(Stores(tmp_path, done=1).read(0)["a"], [1])
    stores = Stores(tmp_path, done=1)
    stores.write(0, {"a": np.array([2])})
    assert np.array_equal(Stores(tmp_path, done=2).read(0)["a"], [2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["client-0.safetensors"]
