"""FedProx: FedAvg with a pull towards the server's weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neurocl.federated.local_training import task_loss
from tests.federated.adapter_runs import digits_method, place, replies_of

SMALL = {"rounds": 1, "local_epochs": 1}


def moved(name, options, **config):
    method = digits_method(name, options, **SMALL, **config)
    state = method.initial_state()
    (reply,) = replies_of(method, state, place(method), [0])
    return {own: reply.payload.arrays[own] - state.arrays[own].astype(np.float64) for own in state.arrays}


def length(arrays):
    return np.sqrt(sum(np.square(array).sum() for array in arrays.values()))


def test_without_a_pull_it_is_fedavg_bit_for_bit():
    plain, pulled = moved("fedavg", {}), moved("fedprox", {"mu": 0})
    for name, array in plain.items():
        np.testing.assert_array_equal(array, pulled[name])


def test_the_stronger_the_pull_the_nearer_the_client_stays():
    lengths = [length(moved("fedprox", {"mu": mu})) for mu in (0, 0.1, 10)]
    assert lengths[0] > lengths[1] > lengths[2] > 0


def test_sgd_with_a_pull_of_one_over_the_learning_rate_always_steps_from_the_server():
    # theta - lr (g(theta) + (theta - theta_s) / lr) = theta_s - lr g(theta)
    method = digits_method("fedprox", {"mu": 50}, optimizer="sgd", lr=0.02, batch_size=10_000, rounds=1, local_epochs=3)
    state, where = method.initial_state(), place(method)
    (reply,) = replies_of(method, state, where, [0])
    samples, network = method.problem.train_samples(0, where.task), method.network()
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    for _ in range(3):
        network.zero_grad()
        task_loss(network, where.task)(samples.x, samples.y).backward()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(start[name] - 0.02 * parameter.grad)
    for name, parameter in network.named_parameters():
        np.testing.assert_allclose(reply.payload.arrays[name], parameter.detach().numpy(), atol=1e-6)


def test_a_pull_without_limit_leaves_the_servers_weights():
    strong = moved("fedprox", {"mu": 1e9}, optimizer="sgd", lr=1e-9)
    assert length(strong) == pytest.approx(0, abs=1e-6)
