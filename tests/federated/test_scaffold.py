"""SCAFFOLD: control variates, and what becomes of them."""

from __future__ import annotations

import numpy as np
import pytest

from neurocl.errors import UserError
from neurocl.federated.partition import PartitionConfig
from neurocl.federated.payload import Payload
from neurocl.federated.scaffold import CONTROL
from tests.federated.adapter_runs import digits_method, place, replies_of, run_of
from tests.federated.small_problem import config, in_memory

SMALL = {"rounds": 2, "local_epochs": 1, "classes_per_task": (2,), "optimizer": "sgd"}


def test_adamw_is_refused_in_one_line():
    with pytest.raises(UserError, match="plain SGD") as caught:
        digits_method("scaffold", optimizer="adamw")
    assert "\n" not in str(caught.value)


def test_with_one_client_it_is_sgd():
    one = {"partition": PartitionConfig(num_clients=1), "optimizer": "sgd", "lr": 0.05, "rounds": 3}
    plain, _ = in_memory(config(method="fedavg", **one))
    controlled, _ = in_memory(config(method="scaffold", **one))
    plain.run()
    controlled.run()
    for name, array in plain.state.arrays.items():
        np.testing.assert_allclose(controlled.state.arrays[name], array, rtol=0, atol=1e-7)


def test_the_first_round_is_that_of_sgd_with_equal_weights():
    scaffold = digits_method("scaffold", lr=0.05, **SMALL)
    fedavg = digits_method("fedavg", {"weights": "equal"}, lr=0.05, **SMALL)
    merged = []
    for method in (scaffold, fedavg):
        state, where = method.initial_state(), place(method)
        merged.append(method.aggregate(state, where, replies_of(method, state, where)))
    for name, array in merged[1].arrays.items():
        np.testing.assert_array_equal(merged[0].arrays[name], array)


def test_the_servers_control_variate_is_the_mean_of_the_clients():
    method = digits_method("scaffold", **SMALL)
    run = run_of(method)
    run.run()
    names = [name for name in run.state.arrays if name.startswith(CONTROL)]
    assert names
    for name in names:
        own = [run.stores.read(client)[name].astype(np.float64) for client in range(5)]
        np.testing.assert_allclose(run.state.arrays[name], np.mean(own, axis=0), rtol=1e-4, atol=1e-6)
        assert run.state.arrays[name].any()


def test_a_clients_control_variate_is_its_mean_gradient():
    method = digits_method("scaffold", lr=0.05, batch_size=10_000, **SMALL)
    state, where = method.initial_state(), place(method)
    (reply,) = replies_of(method, state, where, [1])
    for name in method.expected(state, where):
        gradient = (state.arrays[name].astype(np.float64) - reply.payload.arrays[name]) / 0.05
        np.testing.assert_allclose(reply.payload.arrays[CONTROL + name], gradient, atol=1e-6)


def test_clients_that_do_not_take_part_keep_their_share_of_the_control_variate():
    method = digits_method("scaffold", **SMALL)
    state, where = method.initial_state(), place(method)
    replies = replies_of(method, state, where, [1, 3])
    merged = method.aggregate(state, where, replies)
    name = CONTROL + "head.weight"
    expected = sum(reply.payload.arrays[name].astype(np.float64) for reply in replies) / 5
    np.testing.assert_allclose(merged.arrays[name], expected, atol=1e-7)


def test_half_a_server_step_goes_half_the_way():
    whole, half = (digits_method("scaffold", {"server_lr": step}, **SMALL) for step in (1, 0.5))
    state, where = whole.initial_state(), place(whole)
    replies = replies_of(whole, state, where)
    far, near = (method.aggregate(state, where, replies).arrays["head.weight"] for method in (whole, half))
    start = state.arrays["head.weight"]
    np.testing.assert_allclose(near - start, (far - start) / 2, atol=1e-7)


def test_a_reply_without_control_variates_is_refused():
    method = digits_method("scaffold", **SMALL)
    state, where = method.initial_state(), place(method)
    (reply,) = replies_of(method, state, where, [0])
    assert not method.objection(state, where, reply.payload)
    plain = {name: array for name, array in reply.payload.arrays.items() if not name.startswith(CONTROL)}
    assert "missing" in method.objection(state, where, Payload(plain, {"n": 1}))
