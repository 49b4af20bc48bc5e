"""EWC in a federation: the pull and the Fisher information that it grows with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neurocl.federated.ewc import ANCHOR
from neurocl.federated.exchange import Fault, client_of
from neurocl.federated.fisheravg import FISHER, diagonal_fisher
from neurocl.federated.local_training import task_loss
from neurocl.federated.method import Samples
from neurocl.federated.payload import Payload, num_bytes
from tests.federated.adapter_runs import by_hand, digits_method, floats, place, replies_of, run_of
from tests.federated.broken_runs import assert_a_broken_run_ends_like_an_unbroken_one
from tests.federated.small_problem import config, in_memory

SMALL = {"rounds": 1, "local_epochs": 1, "classes_per_task": (2, 2)}


def asked(method, task=0):
    return place(method, task, "fisher")


def test_without_a_pull_it_is_fedavg_bit_for_bit():
    plain, held = run_of(digits_method("fedavg", **SMALL)), run_of(digits_method("ewc", {"strength": 0}, **SMALL))
    plain.run()
    held.run()
    for name, array in plain.state.arrays.items():
        np.testing.assert_array_equal(held.state.arrays[name], array)


def test_with_a_pull_only_the_first_task_is_fedavg():
    for sizes, same in (((2,), True), ((2, 2), False)):
        own = SMALL | {"classes_per_task": sizes}
        plain, held = run_of(digits_method("fedavg", **own)), run_of(digits_method("ewc", {"strength": 1e3}, **own))
        plain.run()
        held.run()
        pairs = [np.array_equal(held.state.arrays[name], array) for name, array in plain.state.arrays.items()]
        assert all(pairs) == same


def test_the_gradient_of_the_pull_is_2_lambda_f_times_the_distance():
    method = digits_method("ewc", {"strength": 3.0}, **SMALL)
    state, where = method.initial_state(), place(method, 1)
    rng = np.random.default_rng(0)
    fisher = {FISHER + name: rng.random(array.shape, np.float32) for name, array in state.arrays.items()}
    anchor = {ANCHOR + name: array + np.float32(0.1) for name, array in state.arrays.items()}
    network = method.loaded(state)
    parameters = dict(network.named_parameters())
    samples = method.problem.train_samples(0, where.task)
    message = Payload({**state.arrays, **fisher, **anchor})
    client = client_of(method.problem, 0, where, {})
    full = method.loss(network, client, where, message)(samples.x, samples.y)
    plain = task_loss(network, where.task)(samples.x, samples.y)
    pulled = torch.autograd.grad(full - plain, list(parameters.values()))
    for name, found in zip(parameters, pulled, strict=True):
        wanted = 2 * 3.0 * fisher[FISHER + name] * (state.arrays[name] - anchor[ANCHOR + name])
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-6)


def test_after_a_task_the_fisher_information_is_the_mean_over_all_samples_at_the_servers_weights():
    run = run_of(digits_method("ewc", **(SMALL | {"classes_per_task": (2,)})))
    run.run()
    method, state = run.method, run.state
    task = method.problem.tasks[0]
    each = [method.problem.train_samples(client, task) for client in range(5)]
    everything = Samples(torch.cat([own.x for own in each]), torch.cat([own.y for own in each]))
    names = method.trained(method.network())
    found = diagonal_fisher(method.loaded(state), names, everything, task)
    for name in names:
        wanted = found[name].numpy() / len(everything)
        np.testing.assert_allclose(state.arrays[FISHER + name], wanted, rtol=1e-4, atol=1e-9)
        np.testing.assert_array_equal(state.arrays[ANCHOR + name], state.arrays[name])


def test_the_fisher_information_of_earlier_tasks_fades():
    method = digits_method("ewc", {"keep": 0.7}, **SMALL)
    state = method.initial_state()
    old = {FISHER + name: np.full_like(array, 2) for name, array in state.arrays.items()}
    new = [{FISHER + name: np.full_like(array, value) for name, array in state.arrays.items()} for value in (3, 9)]
    merged = method.aggregate(Payload({**state.arrays, **old}), asked(method, 1), by_hand(new, [2, 4]))
    for name in old:
        np.testing.assert_allclose(merged.arrays[name], 0.7 * 2 + (3 + 9) / 6, rtol=1e-6)
    for name, array in state.arrays.items():
        np.testing.assert_array_equal(merged.arrays[name], array)


def test_a_lost_question_for_the_fisher_information_leaves_the_next_task_without_a_pull():
    everybody = [Fault("drop", client, task=0, round=0, phase="fisher") for client in range(5)]
    run = run_of(digits_method("ewc", max_repeats=0, **SMALL), everybody)
    assert run.run()["failures"] == {"dropped": 5}
    assert run.state.arrays[FISHER + "head.bias"].any()


def test_what_is_sent_is_the_weights_up_and_once_a_task_the_fisher_information():
    method = digits_method("ewc", **SMALL)
    state = method.initial_state()
    count = floats(state)
    for where in (place(method), asked(method)):
        assert num_bytes(method.message(state, where)) == num_bytes(state)
        (reply,) = replies_of(method, state, where, [0])
        assert floats(reply.payload) == count
    later = method.end_task(method.aggregate(state, asked(method), [reply]), method.problem.tasks[0])
    assert floats(method.message(later, place(method, 1))) == 3 * count
    assert floats(method.message(later, asked(method, 1))) == count


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda arrays: arrays.pop(FISHER + "head.bias"), "missing"),
        (lambda arrays: arrays.update({FISHER + "head.bias": np.zeros(3, np.float32)}), "shape"),
        (lambda arrays: arrays.update({FISHER + "head.bias": np.zeros(10)}), "float64"),
        (lambda arrays: arrays.update({FISHER + "head.bias": np.full(10, -1, np.float32)}), "negative"),
    ],
)
def test_fisher_information_that_cannot_be_one_is_refused(change, words):
    method = digits_method("ewc", **SMALL)
    state, where = method.initial_state(), asked(method)
    (reply,) = replies_of(method, state, where, [0])
    assert not method.objection(state, where, reply.payload)
    arrays = dict(reply.payload.arrays)
    change(arrays)
    assert words in method.objection(state, where, Payload(arrays, reply.payload.meta))
    assert "whole" in method.objection(state, where, Payload(reply.payload.arrays, {"n": 1e-300}))
    assert "missing" in method.objection(state, place(method), reply.payload)


def test_a_run_broken_before_the_fisher_information_counts_ends_like_an_unbroken_one(tmp_path):
    assert_a_broken_run_ends_like_an_unbroken_one(config(method="ewc"), tmp_path, after=2)


def test_a_strong_pull_keeps_the_weights_that_matter():
    first, _ = in_memory(config(method="ewc", classes_per_task=(2,)))
    first.run()
    moved = []
    for strength in (0.0, 1e4):
        run, _ = in_memory(config(method="ewc", options={"strength": strength}))
        run.run()
        steps = {
            name: run.state.arrays[name] - first.state.arrays[name] for name in first.method.initial_state().arrays
        }
        moved.append(sum((first.state.arrays[FISHER + name] * step**2).sum() for name, step in steps.items()))
    assert moved[1] < moved[0] / 4
