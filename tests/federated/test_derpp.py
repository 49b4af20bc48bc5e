"""DER++ in a federation: what clients rehearse, and that it stays with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from neurocl.federated.exchange import client_of
from neurocl.federated.local_training import task_loss
from neurocl.federated.payload import Payload, encode
from neurocl.federated.reservoir import SEEN, Reservoir
from tests.federated.adapter_runs import CLIENTS, digits_method, place, replies_of, run_of
from tests.federated.broken_runs import assert_a_broken_run_ends_like_an_unbroken_one
from tests.federated.small_problem import config

SMALL = {"rounds": 2, "local_epochs": 1, "classes_per_task": (2, 2)}


@pytest.mark.parametrize("options", [{"buffer_size": 0}, {"alpha": 0, "beta": 0}])
def test_without_a_buffer_or_without_weights_it_is_fedavg_bit_for_bit(options):
    plain, rehearsed = run_of(digits_method("fedavg", **SMALL)), run_of(digits_method("derpp", options, **SMALL))
    one, two = plain.run(), rehearsed.run()
    assert encode(plain.state) == encode(rehearsed.state)
    assert one["bytes"] == two["bytes"]


def test_the_loss_is_cross_entropy_and_half_of_each_replay():
    method = digits_method("derpp", **SMALL)
    where, store = place(method, 1), {}
    client = client_of(method.problem, 0, where, store)
    old = method.problem.train_samples(0, method.problem.tasks[0])
    # As many as fit into one replay batch, so that both batches are the whole buffer.
    x, y = old.x[:9], old.y[:9]
    stored = torch.randn(9, 10, generator=torch.Generator().manual_seed(0))
    Reservoir(store, 200, torch.Generator()).offer({"x": x, "y": y, "logits": stored})
    network = method.network()
    torch.nn.init.normal_(network.head.weight, generator=torch.Generator().manual_seed(1))
    found = method.loss(network, client, where, Payload())(client.data.x, client.data.y)
    wanted = task_loss(network, where.task)(client.data.x, client.data.y)
    wanted = wanted + 0.5 * F.mse_loss(network(x), stored) + 0.5 * F.cross_entropy(network(x)[:, :4], y)
    torch.testing.assert_close(found, wanted)
    assert store[SEEN].tolist() == [9 + len(client.data)]


def test_a_buffer_is_bounded_and_holds_what_its_client_had():
    method = digits_method("derpp", {"buffer_size": 20}, **SMALL)
    run = run_of(method)
    run.run()
    for number in range(CLIENTS):
        store = run.stores.read(number)
        own = [method.problem.train_samples(number, task) for task in method.problem.tasks]
        known = {(tuple(x.tolist()), int(y)) for part in own for x, y in zip(part.x, part.y, strict=True)}
        assert store[SEEN].tolist() == [2 * sum(len(part) for part in own)]
        assert [len(store[f"reservoir.{name}"]) for name in ("x", "y", "logits")] == [20, 20, 20]
        pairs = zip(store["reservoir.x"], store["reservoir.y"], strict=True)
        assert all((tuple(x.tolist()), int(y)) in known for x, y in pairs)


def test_a_reply_is_the_weights_and_nothing_else():
    method = digits_method("derpp", **SMALL)
    state, where = method.initial_state(), place(method)
    (reply,) = replies_of(method, state, where, [0])
    assert {name: array.shape for name, array in reply.payload.arrays.items()} == {
        name: array.shape for name, array in state.arrays.items()
    }
    assert list(reply.payload.meta) == ["n"]
    assert not method.objection(state, where, reply.payload)
    arrays = dict(reply.payload.arrays)
    arrays["head.bias"] = np.zeros(3, np.float32)
    assert "shape" in method.objection(state, where, Payload(arrays, {"n": 1}))
    arrays.pop("head.bias")
    assert "missing" in method.objection(state, where, Payload(arrays, {"n": 1}))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_broken_in_the_second_task_ends_like_an_unbroken_one(tmp_path, workers):
    own = config(method="derpp", options={"buffer_size": 40}, workers=workers)
    assert_a_broken_run_ends_like_an_unbroken_one(own, tmp_path, after=4)


def test_who_rehearses_forgets_less():
    final = []
    for name in ("fedavg", "derpp"):
        run = run_of(digits_method(name, rounds=2, local_epochs=3))
        final.append(run.run()["metrics"]["class_il"]["final_average_accuracy"])
    assert final[1] > final[0] + 10
