"""DOLFIN: adapters that leave earlier tasks' inputs alone, out of Gram matrices that add up over clients."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from neurocl.federated.dolfin import BASIS, DOWN, GRAM, MEMORY, PAST, SUBSPACE, UP, layers_of, memory_of
from neurocl.federated.exchange import Fault
from neurocl.federated.method import shares
from neurocl.federated.network import linear_layers
from neurocl.federated.payload import Payload
from tests.conftest import reference
from tests.federated.adapter_runs import (
    CLIENTS,
    HEAD_FLOATS,
    LAYERS,
    by_hand,
    digits_method,
    floats,
    place,
    replies_of,
    run_of,
)

SMALL = {"rounds": 1, "local_epochs": 1, "classes_per_task": (2, 2, 2)}


@pytest.fixture(scope="module")
def finished():
    """A small run: the method, and its state at the end of every task."""
    torch.set_num_threads(1)
    method = digits_method("dolfin", **SMALL)
    run, states = run_of(method), []
    end_task = method.end_task

    def remember(state, task):
        states.append(end_task(state, task))
        return states[-1]

    method.end_task = remember
    run.run()
    return method, states


def test_down_is_outside_the_space_that_earlier_tasks_need(finished):
    _, states = finished
    for before, after in pairwise(states):
        for layer in LAYERS:
            down = torch.from_numpy(after.arrays[layer + DOWN]).double()
            assert memory_of(before, layer).num_protected > 0
            assert (down @ memory_of(before, layer).projector).abs().max() <= 1e-6
            torch.testing.assert_close(down @ down.T, torch.eye(len(down)).double() / 3, atol=1e-6, rtol=0)


def test_inputs_in_the_protected_space_see_no_change(finished):
    method, states = finished
    rng = np.random.default_rng(0)
    for task in (1, 2):
        old, new = method.change(states[task - 1], task - 1), method.change(states[task], task)
        for layer, (_, inputs) in LAYERS.items():
            x = memory_of(states[task - 1], layer).projector @ torch.from_numpy(rng.standard_normal(inputs))
            assert (new[layer] - old[layer]).abs().max() > 1e-4
            torch.testing.assert_close(new[layer] @ x, old[layer] @ x, atol=1e-6, rtol=0)


def test_inputs_of_earlier_tasks_change_by_no_more_than_what_is_not_protected(finished):
    method, states = finished
    for layer in LAYERS:
        gram = torch.from_numpy(states[0].arrays[GRAM + layer])
        outside = gram - memory_of(states[0], layer).projector @ gram
        change = method.change(states[1], 1)[layer] - method.change(states[0], 0)[layer]
        bound = torch.linalg.matrix_norm(change, 2) * torch.linalg.matrix_norm(outside)
        assert torch.linalg.matrix_norm(change @ gram) <= bound * (1 + 1e-6) + 1e-5


def test_the_memory_grows_and_stays_small(finished):
    _, states = finished
    for layer, (_, inputs) in LAYERS.items():
        sizes = [memory_of(state, layer).num_protected for state in states]
        assert sizes == sorted(sizes)
        assert all(2 * state.arrays[BASIS + layer].shape[1] <= inputs for state in states)


def test_gram_matrices_of_all_clients_add_up_to_that_of_one_with_all_data():
    method = digits_method("dolfin", **SMALL)
    state, where = method.initial_state(), place(method, phase=SUBSPACE)
    federated = method.aggregate(state, where, replies_of(method, state, where))
    x = torch.cat([method.problem.train_samples(client, where.task).x for client in range(CLIENTS)])
    network = method.problem.network()
    inputs = {"backbone.fc1": x, "backbone.fc2": network.backbone.fc1(x).relu()}
    centralised = {GRAM + layer: (own.double().T @ own.double()).detach().numpy() for layer, own in inputs.items()}
    replies = by_hand([{name: gram.astype(np.float32) for name, gram in centralised.items()}])
    alone = method.aggregate(state, where, replies)
    for layer in LAYERS:
        total = centralised[GRAM + layer]
        np.testing.assert_allclose(federated.arrays[GRAM + layer], total, atol=1e-5 * np.abs(total).max())
        one, other = (own.arrays[layer + DOWN].astype(np.float64) for own in (federated, alone))
        np.testing.assert_allclose(one.T @ one, other.T @ other, atol=1e-5)


def test_averaging_up_averages_the_products():
    method = digits_method("dolfin", **SMALL)
    where = place(method, phase=SUBSPACE)
    state = method.initial_state()
    state = method.aggregate(state, where, replies_of(method, state, where))
    where = place(method)
    replies = replies_of(method, state, where)
    merged = method.change(method.aggregate(state, where, replies), 0)
    for layer in LAYERS:
        each = [r.payload.arrays[layer + UP].astype(np.float64) @ state.arrays[layer + DOWN] for r in replies]
        np.testing.assert_allclose(merged[layer].numpy(), np.tensordot(shares(replies), each, 1), atol=1e-7)
        assert np.abs(merged[layer].numpy()).max() > 1e-4


def test_products_of_all_tasks_add_up_as_in_the_reference_case():
    case = reference("federated-dolfin/accumulate")
    method = digits_method("dolfin", **SMALL)
    layer, size = "backbone.fc2", 24
    zero = np.zeros((size, size))
    state = Payload(
        {
            layer + UP: np.zeros((size, 3)),
            layer + DOWN: np.zeros((3, size)),
            PAST + layer: zero,
            GRAM + layer: zero,
            BASIS + layer: zero[:, :0],
        }
    )
    method.wanted = lambda state, place: {layer + UP: ((size, 3), "float64")}
    for task in range(3):
        state = method.begin_task(state, method.problem.tasks[task])
        state = Payload({**state.arrays, layer + DOWN: case["A"][task]}, state.meta)
        replies = by_hand([{layer + UP: own} for own in case["B_clients"][task]], case["num_samples"][task])
        state = method.aggregate(state, place(method, task), replies)
        weight = case["W0"] + method._sums(state)[layer].numpy()
        np.testing.assert_allclose(weight, case["W_after"][task], atol=1e-10)


def test_the_tested_network_is_the_trained_one(finished):
    method, states = finished
    task = method.problem.tasks[-1]
    samples = method.problem.test_samples(task)
    with torch.no_grad():
        trained = method.loaded(method.message(states[-1], place(method, 2)))(samples.x)
    torch.testing.assert_close(method.predictor(states[-1], task)(samples.x), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [2, 4])
def test_clients_send_up_and_the_head_in_a_round_and_gram_matrices_twice_a_task(rank):
    method = digits_method("dolfin", {"rank": rank}, **SMALL)
    state = method.initial_state()
    (reply,) = replies_of(method, state, place(method), [0])
    assert floats(reply.payload) == sum(rank * o for o, _ in LAYERS.values()) + HEAD_FLOATS
    for phase in (SUBSPACE, MEMORY):
        (reply,) = replies_of(method, state, place(method, phase=phase), [0])
        assert floats(reply.payload) == sum(i * i for _, i in LAYERS.values())


def test_a_sketch_of_all_directions_gives_the_whole_gram_matrix_and_less_costs_less():
    whole, full, part = (digits_method("dolfin", {"sketch": size}, **SMALL) for size in (0, 200, 16))
    where, found = place(whole, phase=SUBSPACE), []
    for method in (whole, full, part):
        state = method.initial_state()
        replies = replies_of(method, state, where)
        assert not any(method.objection(state, where, reply.payload) for reply in replies)
        found.append(method.aggregate(state, where, replies))
    assert floats(replies[0].payload) == sum(16 * i for _, i in LAYERS.values())
    for layer in LAYERS:
        exact, same, near = (own.arrays[GRAM + layer] for own in found)
        np.testing.assert_allclose(same, exact, atol=1e-5 * np.abs(exact).max())
        assert np.linalg.norm(near - exact) < 0.1 * np.linalg.norm(exact)


def test_only_keys_and_values_of_attention_are_adapted():
    method = digits_method("dolfin", **SMALL)
    build = method.problem.source.build

    def attention():
        network = build()
        network.backbone.attn = torch.nn.Module()
        network.backbone.attn.qkv = torch.nn.Linear(6, 18)
        return network

    object.__setattr__(method.problem.source, "build", attention)
    network = method.network()
    assert [name for name in method.trained(network) if name.endswith(UP)] == ["backbone.attn.qkv.up"]
    module = network.backbone.attn.qkv
    assert module.up.shape == (12, 4)
    torch.nn.init.ones_(module.up)
    torch.nn.init.ones_(module.down)
    change = module(torch.ones(1, 6)) - module.layer(torch.ones(1, 6))
    assert not change[:, :6].any()
    assert change[:, 6:].all()
    state = method.initial_state()
    state = Payload({**state.arrays, "backbone.attn.qkv.up": np.ones((12, 4), np.float32)}, state.meta)
    assert {name: total.shape for name, total in method.change(state, 0).items()} == {"backbone.attn.qkv": (18, 6)}


def test_a_gram_matrix_that_is_none_is_refused():
    method = digits_method("dolfin", **SMALL)
    state, where = method.initial_state(), place(method, phase=SUBSPACE)
    (reply,) = replies_of(method, state, where, [0])
    assert not method.objection(state, where, reply.payload)
    gram = reply.payload.arrays[GRAM + "backbone.fc2"]
    for bad in (-gram, np.triu(gram), gram[:5], gram.astype(np.float64)):
        assert method.objection(state, where, Payload({**reply.payload.arrays, GRAM + "backbone.fc2": bad}, {"n": 1}))


def test_without_an_answer_to_the_first_phase_the_backbone_stays_as_it_is():
    method = digits_method("dolfin", **SMALL)
    faults = [Fault("drop", client, 1, 0, phase) for client in range(CLIENTS) for phase in (SUBSPACE, MEMORY)]
    method.problem.config.__dict__["max_repeats"] = 0
    run, sums = run_of(method, faults), []
    end_task = method.end_task
    method.end_task = lambda state, task: sums.append(method.change(state, task.index)) or end_task(state, task)
    run.run()
    for layer in LAYERS:
        torch.testing.assert_close(sums[1][layer], sums[0][layer])
        assert (sums[2][layer] != sums[1][layer]).any()


def test_layers_without_free_directions_are_told():
    method = digits_method("dolfin", {"rank": 100}, **SMALL)
    state, where = method.initial_state(), place(method, phase=SUBSPACE)
    assert layers_of(state) == list(LAYERS) == list(linear_layers(method.problem.network()))
    with pytest.warns(UserWarning, match="of 100 directions left"):
        method.aggregate(state, where, replies_of(method, state, where, [0]))


@pytest.mark.slow
def test_less_is_forgotten_than_with_averaged_lora_and_no_less_is_known_in_the_end():
    found = {
        name: [run_of(digits_method(name, seed=seed)).run()["metrics"]["class_il"] for seed in range(3)]
        for name in ("lora", "dolfin")
    }
    mean = {
        (name, key): np.mean([run[key] for run in runs])
        for name, runs in found.items()
        for key in ("forgetting", "final_average_accuracy")
    }
    assert mean["dolfin", "forgetting"] < mean["lora", "forgetting"]
    assert mean["dolfin", "final_average_accuracy"] >= mean["lora", "final_average_accuracy"]
