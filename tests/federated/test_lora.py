"""LoRA and FFA-LoRA in a federation: what is averaged, what becomes of earlier tasks, and what is sent."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neurocl.errors import UserError
from neurocl.federated.exchange import Failure, Fault, sorted_outcome
from neurocl.federated.lora import FACTOR_A, FACTOR_B, HEAD, PAST, layers_of
from neurocl.federated.method import Reply, shares
from neurocl.federated.network import linear_layers
from neurocl.federated.payload import Payload
from tests.federated.adapter_runs import (
    HEAD_FLOATS,
    LAYERS,
    digits_method,
    floats,
    place,
    replies_of,
    run_of,
)

SMALL = {"rounds": 2, "local_epochs": 1}


def with_random_factors(state: Payload, seed: int) -> Payload:
    rng = np.random.default_rng(seed)
    drawn = {
        name: rng.standard_normal(array.shape).astype(np.float32)
        for name, array in state.arrays.items()
        if name.endswith((FACTOR_A, FACTOR_B))
    }
    return Payload({**state.arrays, **drawn}, state.meta)


def products(payload: Payload) -> dict[str, np.ndarray]:
    return {
        layer: payload.arrays[layer + FACTOR_B].astype(np.float64) @ payload.arrays[layer + FACTOR_A]
        for layer in layers_of(payload)
    }


@pytest.mark.parametrize("rank", [2, 4])
def test_lora_sends_both_factors_and_the_head(rank):
    method = digits_method("lora", {"rank": rank}, **SMALL)
    state = method.initial_state()
    (reply,) = replies_of(method, state, place(method), [0])
    expected = sum(rank * (o + i) for o, i in LAYERS.values()) + HEAD_FLOATS
    assert floats(reply.payload) == expected
    assert floats(method.message(state, place(method))) == expected


def test_ffa_lora_sends_b_and_the_head():
    method = digits_method("ffa-lora", {"rank": 4}, **SMALL)
    (reply,) = replies_of(method, method.initial_state(), place(method), [0])
    assert floats(reply.payload) == sum(4 * o for o, _ in LAYERS.values()) + HEAD_FLOATS


def test_every_linear_layer_of_the_backbone_has_an_adapter_that_changes_nothing_at_first():
    method = digits_method("lora", **SMALL)
    state = method.initial_state()
    assert layers_of(state) == list(LAYERS)
    samples = method.problem.test_samples(method.problem.tasks[0])
    plain, adapted = method.problem.network(), method.loaded(method.message(state, place(method)))
    torch.testing.assert_close(adapted.features(samples.x), plain.features(samples.x), rtol=0, atol=0)


def test_factors_are_averaged_separately_with_the_shares_of_samples():
    method = digits_method("lora", **SMALL)
    where = place(method)
    replies = replies_of(method, method.initial_state(), where)
    merged = method.aggregate(method.initial_state(), where, replies)
    share = shares(replies)
    for name in method.expected(method.initial_state(), where):
        stack = np.stack([reply.payload.arrays[name] for reply in replies]).astype(np.float64)
        np.testing.assert_allclose(merged.arrays[name], np.tensordot(share, stack, 1), rtol=1e-6, atol=1e-9)
    mean = {layer: sum(w * products(r.payload)[layer] for w, r in zip(share, replies, strict=True)) for layer in LAYERS}
    assert any(np.abs(products(merged)[layer] - mean[layer]).max() > 1e-4 for layer in LAYERS)


def test_in_ffa_lora_the_product_of_the_averages_is_the_average_of_the_products():
    method = digits_method("ffa-lora", **SMALL)
    where, state = place(method), method.initial_state()
    replies = replies_of(method, state, where)
    merged = method.aggregate(state, where, replies)
    for layer, (o, i) in LAYERS.items():
        A = state.arrays[layer + FACTOR_A].astype(np.float64)
        mean = sum(
            w * reply.payload.arrays[layer + FACTOR_B] @ A for w, reply in zip(shares(replies), replies, strict=True)
        )
        assert mean.shape == (o, i)
        np.testing.assert_allclose(products(merged)[layer], mean, atol=1e-7)
        np.testing.assert_array_equal(merged.arrays[layer + FACTOR_A], state.arrays[layer + FACTOR_A])


@pytest.mark.parametrize("name", ["lora", "ffa-lora"])
def test_one_client_is_returned_bit_for_bit(name):
    method = digits_method(name, **SMALL)
    where, state = place(method), method.initial_state()
    replies = replies_of(method, state, where, [2])
    merged = method.aggregate(state, where, replies)
    for array in replies[0].payload.arrays:
        np.testing.assert_array_equal(merged.arrays[array], replies[0].payload.arrays[array])


def test_the_order_in_which_replies_arrive_changes_no_bit():
    method = digits_method("lora", **SMALL)
    where, state = place(method), method.initial_state()
    replies = replies_of(method, state, where)
    once = method.aggregate(state, where, replies)
    mixed: list[Reply | Failure] = [replies[index] for index in (3, 0, 4, 2, 1)]
    again = method.aggregate(state, where, sorted_outcome(mixed).replies)
    for name, array in once.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])


@pytest.mark.parametrize("previous", ["individual_mean", "run_mean", "run_sum"])
def test_modules_of_earlier_tasks_add_up_or_average_as_asked(previous):
    method = digits_method("lora", {"previous": previous}, **SMALL)
    state, modules = method.initial_state(), []
    for index, task in enumerate(method.problem.tasks[:4]):
        state = with_random_factors(method.begin_task(state, task), index)
        modules.append(products(state))
        change = method.change(state, index)
        for layer in LAYERS:
            total = np.sum([module[layer] for module in modules], axis=0)
            expected = total if previous == "run_sum" else total / (index + 1)
            np.testing.assert_allclose(change[layer].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("previous", ["individual_mean", "run_mean", "run_sum"])
def test_clients_train_on_top_of_earlier_modules_unless_each_task_stands_alone(previous):
    method = digits_method("lora", {"previous": previous}, **SMALL)
    state = with_random_factors(method.initial_state(), 0)
    module = products(state)
    state = method.begin_task(state, method.problem.tasks[1])
    network = method.loaded(method.message(state, place(method, 1)))
    frozen = linear_layers(method.problem.network())
    for layer in LAYERS:
        below = network.get_submodule(layer).layer.weight - frozen[layer].weight
        expected = np.zeros_like(module[layer]) if previous == "individual_mean" else module[layer]
        np.testing.assert_allclose(below.detach().numpy(), expected, atol=1e-5)


def test_the_tested_network_is_the_trained_one_in_the_first_task():
    method = digits_method("lora", **SMALL)
    state = with_random_factors(method.initial_state(), 0)
    task = method.problem.tasks[0]
    samples = method.problem.test_samples(task)
    head = {
        name: np.random.default_rng(1).standard_normal(state.arrays[name].shape).astype(np.float32) for name in HEAD
    }
    state = Payload({**state.arrays, **head})
    with torch.no_grad():
        trained = method.loaded(method.message(state, place(method)))(samples.x)
    torch.testing.assert_close(method.predictor(state, task)(samples.x), trained, rtol=1e-4, atol=1e-2)


def test_every_task_begins_with_new_factors_that_depend_on_the_seed_alone():
    method = digits_method("lora", **SMALL)
    before = torch.random.get_rng_state()
    first = method.initial_state()
    torch.rand(3)
    again = digits_method("lora", **SMALL).initial_state()
    second = method.begin_task(first, method.problem.tasks[1])
    for layer, (_, i) in LAYERS.items():
        A = first.arrays[layer + FACTOR_A]
        np.testing.assert_array_equal(A, again.arrays[layer + FACTOR_A])
        assert np.abs(A).max() <= 1 / np.sqrt(i)
        assert A.std() == pytest.approx(1 / np.sqrt(3 * i), rel=0.1)
        assert (second.arrays[layer + FACTOR_A] != A).any()
        assert not second.arrays[layer + FACTOR_B].any()
    other = digits_method("lora", seed=1, **SMALL).initial_state()
    assert (other.arrays["backbone.fc1.lora_A"] != first.arrays["backbone.fc1.lora_A"]).any()
    torch.random.set_rng_state(before)


def test_nobody_elses_random_numbers_are_touched():
    method = digits_method("lora", **SMALL)
    before = torch.random.get_rng_state()
    state = method.initial_state()
    replies_of(method, state, place(method), [0])
    assert torch.equal(before, torch.random.get_rng_state())


def test_weight_decay_leaves_rows_of_other_classes_alone():
    method = digits_method("lora", weight_decay=0.5, lr=0.1, **SMALL)
    state = method.initial_state()
    rows = np.random.default_rng(0).standard_normal(state.arrays["head.weight"].shape).astype(np.float32)
    state = Payload({**state.arrays, "head.weight": rows})
    where = place(method)
    merged = method.aggregate(state, where, replies_of(method, state, where, [0, 1])).arrays["head.weight"]
    np.testing.assert_array_equal(merged[2:], rows[2:])
    assert (merged[:2] != rows[:2]).any()


def test_a_run_goes_on_with_the_clients_that_answer():
    method = digits_method("lora", classes_per_task=(2,), **SMALL)
    run = run_of(method, [Fault("drop", 1, 0, 0), Fault("nan", 3, 0, 0), Fault("shape", 4, 0, 1)])
    result = run.run()
    assert result["failures"] == {"dropped": 1, "not-finite": 1, "malformed": 1}
    first = [0, 2, 4]
    state = method.begin_task(method.initial_state(), method.problem.tasks[0])
    alone = method.aggregate(state, place(method), replies_of(method, state, place(method), first))
    last = place(method, number=1)
    alone = method.aggregate(alone, last, replies_of(method, alone, last, [0, 1, 2, 3]))
    np.testing.assert_array_equal(run.state.arrays["backbone.fc2.lora_B"], alone.arrays["backbone.fc2.lora_B"])


def test_replies_that_cannot_be_averaged_are_refused_by_name():
    method = digits_method("lora", **SMALL)
    where, state = place(method), method.initial_state()
    good = {name: state.arrays[name] for name in method.expected(state, where)}
    assert method.objection(state, where, Payload(good, {"n": 1})) == ""
    name = "backbone.fc1.lora_A"
    for bad, text in (
        ({name: good[name].T}, "backbone.fc1.lora_A has shape [64, 4], expected [4, 64]"),
        ({name: good[name].astype(np.int64)}, "backbone.fc1.lora_A is int64, expected float32"),
    ):
        assert method.objection(state, where, Payload({**good, **bad}, {"n": 1})) == text
    del good[name]
    assert method.objection(state, where, Payload(good, {"n": 1})) == "backbone.fc1.lora_A is missing"


def test_there_is_nothing_to_train_but_the_adapters_and_the_head():
    with pytest.raises(UserError, match="train"):
        digits_method("lora", {"train": "head"})


@pytest.mark.parametrize("name", ["lora", "ffa-lora"])
def test_the_first_task_is_learnt(name):
    run = run_of(digits_method(name, classes_per_task=(2,), rounds=4, local_epochs=4))
    assert run.run()["metrics"]["class_il"]["final_average_accuracy"] >= 90


def test_past_modules_are_part_of_the_message_only_when_they_are_trained_upon():
    for previous, expected in (("individual_mean", 0), ("run_sum", len(LAYERS)), ("run_mean", len(LAYERS))):
        method = digits_method("lora", {"previous": previous}, **SMALL)
        state = method.begin_task(method.initial_state(), method.problem.tasks[1])
        sent = method.message(state, place(method, 1))
        assert sum(name.startswith(PAST) for name in sent.arrays) == expected
