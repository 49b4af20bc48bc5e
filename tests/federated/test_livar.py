"""LIVAR: the published aggregation, the table of weights, importances, evidence, and whose rows make the head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from neurocl.federated.exchange import Failure, Fault, client_of, sorted_outcome
from neurocl.federated.livar import TABLE, Livar, evidence, layer_weights, row_weights, step_importance
from neurocl.federated.local_training import batches, features_of, task_loss
from neurocl.federated.lora import FACTOR_A, FACTOR_B, HEAD, layers_of
from neurocl.federated.method import Reply, Task, mean_arrays, shares
from neurocl.federated.payload import Payload
from tests.conftest import reference
from tests.federated.adapter_runs import (
    CLASSES,
    HEAD_FLOATS,
    LAYERS,
    at_task,
    by_hand,
    digits_method,
    floats,
    place,
    replies_of,
    run_of,
)

SMALL = {"rounds": 2, "local_epochs": 1, "classes_per_task": 0}


def livar(options: dict[str, Any] | None = None, **config: Any) -> Livar:
    found = digits_method("livar", options, **(SMALL | config))
    assert isinstance(found, Livar)
    return found


def published(**changes: np.ndarray) -> tuple[Payload, list[Reply], dict[str, np.ndarray]]:
    """The oracle's server, its clients' replies, and the oracle."""
    case = reference("federated-livar/round") | changes
    names = [f"layer{index}" for index in range(case["A_clients"].shape[1])]
    r, i = case["A_clients"].shape[2:]
    o = case["B_clients"].shape[2]
    arrays = {"head.weight": case["head_W_server"], "head.bias": case["head_b_server"]}
    for name in names:
        arrays[name + FACTOR_A] = np.zeros((r, i), dtype=np.float32)
        arrays[name + FACTOR_B] = np.zeros((o, r), dtype=np.float32)
        arrays["past." + name] = np.zeros((o, i), dtype=np.float32)
        arrays["delta." + name] = np.zeros((o, i), dtype=np.float32)
    said = np.where(case["stat_counts"] >= 2, case["stat_var"].mean(-1), -case["stat_counts"]).astype(np.float32)
    replies = []
    for k in range(len(said)):
        own = {"head.weight": case["head_W_clients"][k], "head.bias": case["head_b_clients"][k], "evidence": said[k]}
        for index, name in enumerate(names):
            own[name + FACTOR_A], own[name + FACTOR_B] = case["A_clients"][k, index], case["B_clients"][k, index]
        own |= {"importance_a": case["importance_A"][k], "importance_b": case["importance_B"][k]}
        replies.append(own)
    return Payload(arrays), by_hand(replies, case["num_samples"]), case


@pytest.mark.parametrize("product", ["importance_product", "sample_product"])
def test_a_round_is_the_published_one(product):
    state, replies, case = published()
    method, where = livar({"eval_delta": product}), at_task(len(case["head_b_server"]))
    assert all(method.objection(state, where, reply.payload) == "" for reply in replies)
    merged = method.aggregate(state, where, replies).arrays
    expected = case["delta_importance" if product == "importance_product" else "delta_official"]
    for index in range(len(expected)):
        np.testing.assert_allclose(merged[f"layer{index}{FACTOR_A}"], case["A_merged"][index], rtol=0, atol=1e-5)
        np.testing.assert_allclose(merged[f"layer{index}{FACTOR_B}"], case["B_merged"][index], rtol=0, atol=1e-5)
        np.testing.assert_allclose(merged[f"delta.layer{index}"], expected[index], rtol=0, atol=1e-5)
    np.testing.assert_allclose(merged["head.weight"], case["head_W_merged"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(merged["head.bias"], case["head_b_merged"], rtol=0, atol=1e-5)


def test_layer_weights_are_the_published_ones():
    case = reference("federated-livar/round")
    found = layer_weights(case["importance_A"], case["importance_B"])
    np.testing.assert_allclose(found, case["layer_weights"], rtol=0, atol=1e-5)
    quantiles = [*np.quantile(case["importance_A"], [0.25, 0.5]), *np.quantile(case["importance_B"], [0.6, 0.8])]
    np.testing.assert_allclose(quantiles, case["quantiles"], rtol=0, atol=1e-5)


def test_what_is_tested_may_be_the_product_of_the_merged_factors():
    state, replies, _ = published()
    arrays = {name: array for name, array in state.arrays.items() if not name.startswith("delta.")}
    method = livar({"eval_delta": "factor"})
    merged = method.aggregate(Payload(arrays), at_task(6), replies)
    change = method.change(merged, 0)
    for layer in layers_of(merged):
        product = merged.arrays[layer + FACTOR_B].astype(np.float64) @ merged.arrays[layer + FACTOR_A]
        np.testing.assert_allclose(change[layer].numpy(), product, atol=1e-12)


def test_the_table_is_exact_and_ties_at_a_quantile_lie_in_the_middle():
    # Eleven values make the quantiles 25, 50, 60, 80 % fall on 2.5, 5, 6 and 8.
    steps = np.arange(11.0)
    for a, column in ((2, 0), (3, 1), (5, 1), (6, 2)):
        for b, row in ((5, 0), (6, 1), (8, 1), (9, 2)):
            importance_a = np.stack([np.roll(steps, -a), steps]).T
            importance_b = np.stack([np.roll(steps, -b), steps]).T
            # One layer alone would make every sum over clients the same: compare two clients of the first layer.
            found = layer_weights(importance_a[:, :1], importance_b[:, :1])[:, 0]
            rows = np.array([0 if v < 6 else 1 if v <= 8 else 2 for v in importance_b[:, 0]])
            columns = np.array([0 if v < 2.5 else 1 if v <= 5 else 2 for v in importance_a[:, 0]])
            assert (rows[0], columns[0]) == (row, column)
            values = TABLE[rows, columns]
            np.testing.assert_allclose(found, values / values.sum(), rtol=1e-15)
    assert TABLE.tolist() == [
        [0.03813978, 0.03813978, 0.03813978],
        [0.09813978, 0.08813978, 0.07813978],
        [0.19313978, 0.11813978, 0.09313978],
    ]


@pytest.mark.parametrize("K", [1, 2, 7])
def test_weights_of_a_layer_add_up_to_one_and_nobody_is_left_out(K):
    rng = np.random.default_rng(K)
    found = layer_weights(rng.random((K, 4)), rng.random((K, 4)))
    np.testing.assert_allclose(found.sum(0), 1, rtol=1e-14)
    assert found.min() >= 0.03813978 / (K * 0.19313978)


def test_equal_importances_give_uniform_weights():
    np.testing.assert_allclose(layer_weights(np.full((5, 3), 0.1), np.full((5, 3), 0.7)), 0.2, rtol=1e-15)
    np.testing.assert_allclose(layer_weights(np.zeros((4, 3)), np.zeros((4, 3))), 0.25, rtol=1e-15)


def test_the_scale_of_importances_does_not_matter():
    rng = np.random.default_rng(0)
    a, b = rng.random((5, 6)), rng.random((5, 6))
    for scale in (2.0, 1e-3, 7.3):
        np.testing.assert_array_equal(layer_weights(scale * a, b), layer_weights(a, b))
        np.testing.assert_array_equal(layer_weights(a, scale * b), layer_weights(a, b))


def test_permuting_clients_permutes_their_weights():
    rng = np.random.default_rng(0)
    a, b, order = rng.random((5, 6)), rng.random((5, 6)), [3, 0, 4, 2, 1]
    np.testing.assert_allclose(layer_weights(a[order], b[order]), layer_weights(a, b)[order], rtol=1e-15)


def test_importance_of_a_step_is_the_size_of_gradient_times_movement():
    g, moved = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[0.5, 1.0], [-1.0, 9.0]])
    assert step_importance(g, moved) == pytest.approx(abs(0.5 - 2 - 3))
    assert step_importance(g, None) == pytest.approx(2)
    assert step_importance(g, torch.zeros(2, 2)) == 0
    order = [2, 0, 3, 1]
    assert step_importance(g.flatten()[order], moved.flatten()[order]) == pytest.approx(step_importance(g, moved))


def test_entries_of_a_gradient_that_are_not_finite_count_as_zero():
    g = torch.tensor([float("nan"), 2.0, float("inf"), -float("inf")])
    assert step_importance(g, torch.ones(4)) == 2


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_with_plain_sgd_importance_is_lr_times_the_squared_gradient_before_clipping(clip):
    lr = 0.1
    method = livar(optimizer="sgd", lr=lr, batch_size=50, local_epochs=2, clip=clip)
    where, state = place(method), method.initial_state()
    rng = np.random.default_rng(0)
    state = Payload(
        {
            name: rng.normal(0, 0.1, array.shape).astype(np.float32) if name == "head.weight" else array
            for name, array in state.arrays.items()
        }
    )
    message = method.message(state, where)
    client = client_of(method.problem, 1, where, {})
    reply = method.client(client, where, message)

    network = method.loaded(message)
    loss, generator = task_loss(network, where.task), client.generator(where, "batches")
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    layers = layers_of(message)
    expected = {factor: np.zeros(len(layers)) for factor in (FACTOR_A, FACTOR_B)}
    for _ in range(2):
        for batch in batches(client.data, 50, generator):
            network.zero_grad()
            loss(batch.x, batch.y).backward()
            norm = torch.sqrt(sum(p.grad.double().square().sum() for p in trained))
            scale = min(1.0, clip / float(norm)) if clip else 1.0
            own = dict(network.named_parameters())
            for factor, total in expected.items():
                for index, layer in enumerate(layers):
                    total[index] += lr * scale * float(own[layer + factor].grad.double().square().sum())
            with torch.no_grad():
                for parameter in trained:
                    parameter -= lr * scale * parameter.grad
    assert min(total.min() for total in expected.values()) > 0
    np.testing.assert_allclose(reply.arrays["importance_a"], expected[FACTOR_A], rtol=2e-3)
    np.testing.assert_allclose(reply.arrays["importance_b"], expected[FACTOR_B], rtol=2e-3)


def test_importances_add_up_over_rounds_unless_they_begin_anew():
    first, second = {}, {}
    for reset, found in (("never", first), ("round", second)):
        method = livar({"reset": reset})
        state, store = method.initial_state(), {}
        for number in range(2):
            where = place(method, number=number)
            message = method.message(state, where)
            store = {name: array.copy() for name, array in store.items()}
            for array in store.values():
                array.flags.writeable = False  # as it comes from a decoded message
            client = client_of(method.problem, 0, where, store)
            found[number] = method.client(client, where, message).arrays
            store = client.store
    for name in ("importance_a", "importance_b"):
        np.testing.assert_array_equal(first[0][name], second[0][name])
        np.testing.assert_allclose(first[1][name], second[0][name] + second[1][name], rtol=1e-6)


def test_the_sum_of_gradients_is_another_importance():
    found = {}
    for importance in ("path", "gradient"):
        method = livar({"importance": importance})
        (reply,) = replies_of(method, method.initial_state(), place(method), [0])
        found[importance] = reply.payload.arrays
    assert (found["path"]["importance_b"] != found["gradient"]["importance_b"]).all()
    np.testing.assert_array_equal(found["path"]["head.weight"], found["gradient"]["head.weight"])


def test_evidence_is_the_mean_variance_or_minus_the_count():
    task = Task(0, range(3, 8))
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0], [5.0, 5.0], [0.1, 0.3], [0.1, 0.3], [0.1, 0.3]])
    y = torch.tensor([3, 3, 4, 6, 6, 6])
    # Class 3: variances 2 and 8; class 4: one sample; class 6: duplicates.
    np.testing.assert_allclose(evidence(x, y, task), [5, -1, 0, -3, 0], rtol=1e-12)


def test_a_client_sends_the_evidence_of_its_adapted_features():
    for features in ("adapted", "frozen"):
        method = livar({"features": features}, lr=0.1)
        where, state = place(method), method.initial_state()
        (reply,) = replies_of(method, state, where, [0])
        data = method.problem.train_samples(0, where.task)
        network = method.loaded(reply.payload) if features == "adapted" else method.problem.network()
        expected = evidence(features_of(network, data), data.y, where.task)
        np.testing.assert_allclose(reply.payload.arrays["evidence"], expected, rtol=1e-5)


def test_rows_are_weighted_by_variance_alone_or_by_counts_where_there_is_none():
    said = np.array([[4.0, 0.0, -1.0, 0.0], [1.0, 2.0, -3.0, 0.0], [-9.0, 0.0, 0.0, 0.0]])
    expected = np.array([[0.8, 0, 0.25, 0], [0.2, 1, 0.75, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(row_weights(said, counts=True), expected)
    expected[:, 2] = 0
    np.testing.assert_allclose(row_weights(said, counts=False), expected)


def test_a_client_with_two_distant_samples_outweighs_one_with_hundreds():
    task, rng = Task(0, range(1)), np.random.default_rng(0)
    two = torch.tensor([[0.0] * 4, [10.0] * 4])
    many = torch.from_numpy(rng.standard_normal((500, 4)))
    said = np.stack([evidence(x, torch.zeros(len(x), dtype=torch.int64), task) for x in (two, many)])
    assert row_weights(said, counts=True)[0, 0] > 0.95


def test_equal_statistics_give_uniform_rows():
    np.testing.assert_allclose(row_weights(np.full((4, 3), 0.7), counts=True), 0.25, rtol=1e-15)


@pytest.mark.parametrize("single", ["count", "keep"])
def test_rows_follow_whoever_has_the_class(single):
    counts = reference("federated-livar/round")["stat_counts"].copy()
    counts[:, 1] = [0, 7, 0, 0]
    counts[:, 2] = [0, 1, 0, 3]
    counts[3, 2] = 1
    state, replies, case = published(stat_counts=counts)
    head = livar({"single": single}).aggregate(state, at_task(6), replies).arrays
    for name, key in (("head.weight", "head_W"), ("head.bias", "head_b")):
        before, each = case[key + "_server"], case[key + "_clients"]
        np.testing.assert_array_equal(head[name][-1], before[-1])
        np.testing.assert_array_equal(head[name][1], each[1, 1])
        expected = (each[1, 2] + each[3, 2]) / 2 if single == "count" else before[2]
        np.testing.assert_allclose(head[name][2], expected, rtol=1e-6)


def test_the_order_in_which_replies_arrive_changes_no_bit():
    state, replies, _ = published()
    mixed: list[Reply | Failure] = [replies[index] for index in (3, 0, 2, 1)]
    method = livar()
    once = method.aggregate(state, at_task(6), replies)
    again = method.aggregate(state, at_task(6), sorted_outcome(mixed).replies)
    for name, array in once.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])


def test_one_client_is_returned():
    method = livar()
    where, state = place(method), method.initial_state()
    (reply,) = replies_of(method, state, where, [2])
    merged = method.aggregate(state, where, [reply]).arrays
    for layer in LAYERS:
        for factor in (FACTOR_A, FACTOR_B):
            np.testing.assert_array_equal(merged[layer + factor], reply.payload.arrays[layer + factor])
    own = reply.payload.arrays["evidence"] != 0
    np.testing.assert_array_equal(merged["head.weight"][own], reply.payload.arrays["head.weight"][own])
    np.testing.assert_array_equal(merged["head.weight"][~own], state.arrays["head.weight"][~own])


def test_lora_plus_two_importances_a_layer_and_one_number_a_class_are_sent():
    method = livar({"rank": 4})
    (reply,) = replies_of(method, method.initial_state(), place(method), [0])
    lora = sum(4 * (o + i) for o, i in LAYERS.values()) + HEAD_FLOATS
    assert floats(reply.payload) == lora + 2 * len(LAYERS) + CLASSES


def test_a_run_goes_on_with_the_clients_that_answer():
    method = livar(rounds=1)
    run = run_of(method, [Fault("drop", 1, 0, 0), Fault("nan", 3, 0, 0)])
    run.run()
    state = method.begin_task(method.initial_state(), method.problem.tasks[0])
    alone = method.aggregate(state, place(method), replies_of(method, state, place(method), [0, 2, 4]))
    for name, array in alone.arrays.items():
        np.testing.assert_array_equal(array, run.state.arrays[name])


def test_importances_of_clients_whose_reply_was_lost_are_forgotten():
    run = run_of(livar(rounds=1), [Fault("nan", 2, 0, 0)])
    run.run()
    assert run.stores.read(2) == {}
    assert run.stores.read(1)["importance_b"].all()


def test_replies_that_cannot_be_merged_are_refused_by_name():
    state, replies, _ = published()
    method, good = livar(), replies[0].payload
    for name, bad, text in (
        ("importance_a", good.arrays["importance_a"][:2], "importance_a has shape [2], expected [6]"),
        ("importance_b", -good.arrays["importance_b"], "importance_b has negative entries"),
        ("evidence", good.arrays["evidence"].astype(np.float64), "evidence is float64, expected float32"),
    ):
        assert method.objection(state, at_task(6), Payload({**good.arrays, name: bad}, good.meta)) == text


@pytest.mark.parametrize("previous", ["individual_mean", "run_sum"])
@pytest.mark.parametrize("product", ["importance_product", "factor"])
def test_later_tasks_are_handled_as_in_lora(previous, product):
    method = livar({"previous": previous, "eval_delta": product}, classes_per_task=(2, 2))
    modules = []
    original = method.end_task

    def watched(state: Payload, task: Task) -> Payload:
        modules.append(method.module(state))
        return original(state, task)

    method.end_task = watched  # type: ignore[method-assign]
    run = run_of(method)
    run.run()
    for layer, change in method.change(run.state, 1).items():
        total = modules[0][layer] + modules[1][layer]
        torch.testing.assert_close(change, total if previous == "run_sum" else total / 2, rtol=1e-5, atol=1e-6)


class SampleHead(Livar):
    """LIVAR with the head averaged by samples."""

    def aggregate(self, state: Payload, place: Any, replies: Any) -> Payload:
        merged = super().aggregate(state, place, replies)
        return Payload({**merged.arrays, **mean_arrays(replies, HEAD, shares(replies))}, merged.meta)


@pytest.mark.slow
def test_on_uneven_digits_variance_is_no_worse_a_weight_for_the_head_than_samples():
    found: dict[str, list[float]] = {"variance": [], "samples": []}
    for seed in range(5):
        method = livar(rounds=3, local_epochs=3, beta=0.1, seed=seed)
        for name, kind in (("variance", Livar), ("samples", SampleHead)):
            result = run_of(kind(method.problem, method.config)).run()
            found[name].append(result["metrics"]["class_il"]["final_average_accuracy"])
    assert np.mean(found["variance"]) >= np.mean(found["samples"]) - 2
