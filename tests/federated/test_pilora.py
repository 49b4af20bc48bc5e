"""PILoRA: the sum of tasks' adapters, distances as scores, and how clients' prototypes are weighed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.exchange import client_of
from neurocl.federated.method import Phase, Place, Reply
from neurocl.federated.payload import Payload
from neurocl.federated.pilora import (
    COUNTS,
    MEANS,
    PROTOTYPES,
    IncrementalLora,
    PiLora,
    mean_distances,
    weighed_prototype,
)
from tests.federated.small_problem import config, in_memory


def a_method(backbone: str = "perceptron", **options: Any) -> PiLora:
    found = method_for(problem_for(config(method="pilora", backbone=backbone, options=options)))
    assert isinstance(found, PiLora)
    return found


def place(method: PiLora, task: int = 0) -> Place:
    return Place(method.problem.tasks[task], Phase("round"), 0)


def reply_of(method: PiLora, state: Payload, client: int = 0, task: int = 0) -> Reply:
    where = place(method, task)
    return Reply(
        client, method.client(client_of(method.problem, client, where, {}), where, method.message(state, where))
    )


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(tasks: int = 3) -> IncrementalLora:
    layer = torch.nn.Linear(4, 6).double()
    lora = IncrementalLora(layer, {"q": slice(0, 2), "v": slice(4, 6)}, tasks, 2).double()
    with torch.no_grad():
        for index, value in enumerate(lora.parameters()):
            if value.requires_grad:
                value.copy_(drawn(*value.shape, seed=index))
    return lora


def test_the_adapters_of_all_tasks_so_far_are_added_to_their_rows() -> None:
    lora, x = filled(), drawn(5, 4)
    for seen in (1, 2, 3):
        lora.seen = seen
        expected = lora.layer(x).clone()
        for task in range(seen):
            expected[:, 0:2] += x @ lora.q_A[task].mT @ lora.q_B[task].mT
            expected[:, 4:6] += x @ lora.v_A[task].mT @ lora.v_B[task].mT
        torch.testing.assert_close(lora(x), expected, rtol=0, atol=1e-12)


def test_only_the_adapter_of_the_task_learns() -> None:
    lora = filled()
    lora.seen = 2
    (lora(drawn(5, 4)).square().sum() + lora.overlap() + lora.size()).backward()
    for name in ("q_A", "q_B", "v_A", "v_B"):
        gradient = getattr(lora, name).grad
        assert gradient[1].any()
        assert not gradient[0].any()
        assert not gradient[2].any()
    assert lora.layer.weight.grad is None


def test_overlap_and_size_are_sums_of_absolute_numbers() -> None:
    lora = filled()
    lora.seen = 3
    expected = sum(float((a[2] @ a[earlier].mT).abs().sum()) for a in (lora.q_A, lora.v_A) for earlier in range(2))
    assert float(lora.overlap()) == pytest.approx(expected)
    assert float(lora.size()) == pytest.approx(float(lora.q_A[2].abs().sum() + lora.v_A[2].abs().sum()))
    lora.seen = 1
    assert float(lora.overlap()) == 0.0


def test_distances_are_root_mean_squares() -> None:
    features, prototypes = drawn(4, 7), drawn(3, 7, seed=1)
    expected = ((features[:, None] - prototypes) ** 2).mean(dim=2).sqrt()
    torch.testing.assert_close(mean_distances(features, prototypes), expected)


def test_equal_prototypes_stay_and_one_client_is_believed() -> None:
    same = drawn(1, 5).expand(4, -1)
    torch.testing.assert_close(weighed_prototype(same, drawn(3, 5, seed=1), 5.0), same[0])
    torch.testing.assert_close(weighed_prototype(same[:1], drawn(3, 5, seed=1), 5.0), same[0])


def test_prototypes_are_weighed_by_a_softmax_of_stretched_inverse_distances() -> None:
    prototypes, means = drawn(3, 5), drawn(2, 5, seed=1)
    near = np.array([1 / sum(float((p - m).norm()) for m in means) for p in prototypes])
    stretched = 5.0 * (near - near.min()) / (near.max() - near.min())
    weights = np.exp(stretched) / np.exp(stretched).sum()
    expected = sum(w * p for w, p in zip(weights, prototypes, strict=True))
    torch.testing.assert_close(weighed_prototype(prototypes, means, 5.0), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weighed_prototype(prototypes, means, 0.0), prototypes.mean(dim=0))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(weighed_prototype(prototypes[order], means, 5.0), expected, rtol=1e-9, atol=1e-9)


def test_the_loss_is_that_of_the_paper() -> None:
    method = a_method(orthogonal=0.5, sparse=0.01, pull=0.001, temperature=2.0)
    state = method.initial_state()
    network = method.with_factors(state, 2)
    adapted = next(module for module in network.modules() if isinstance(module, IncrementalLora))
    samples = method.problem.train_samples(0, method.problem.tasks[1])
    prototypes = torch.from_numpy(state.arrays[PROTOTYPES])
    start = method.problem.tasks[1].classes.start
    loss = method._loss(network, prototypes[:start], torch.nn.Parameter(prototypes[start:4]))
    distances = mean_distances(network.features(samples.x), prototypes[:4])
    own = distances[torch.arange(len(samples)), samples.y].mean()
    expected = F.cross_entropy(-distances / 2.0, samples.y) + 0.001 * own
    expected = expected + 0.5 * adapted.overlap() + 0.01 * adapted.size()
    assert float(adapted.overlap()) > 0
    torch.testing.assert_close(loss(samples.x, samples.y), expected)


@pytest.mark.parametrize(("backbone", "parts"), [("perceptron", {"w"}), ("vit", {"q", "v"})])
def test_a_client_sends_the_tasks_factors_prototypes_and_class_means(backbone: str, parts: set[str]) -> None:
    method = a_method(backbone)
    state = method.initial_state()
    reply = reply_of(method, state, task=1).payload
    assert {name.rpartition("_")[0] for name in reply.arrays if name.endswith("_A")} == parts
    size = method.problem.num_features
    assert reply.arrays[PROTOTYPES].shape == reply.arrays[MEANS].shape == (2, size)
    labels = method.problem.train_samples(0, method.problem.tasks[1]).y
    assert reply.arrays[COUNTS].tolist() == [int((labels == number).sum()) for number in (2, 3)]
    assert not method.objection(state, place(method, 1), reply)


def test_a_task_leaves_earlier_factors_and_prototypes_as_they_were() -> None:
    method = a_method()
    state = method.initial_state()
    first = method.aggregate(state, place(method), [reply_of(method, state, client) for client in range(3)])
    second = method.aggregate(first, place(method, 1), [reply_of(method, first, client, 1) for client in range(3)])
    for name, array in first.arrays.items():
        count = 2 if name == PROTOTYPES else 1
        assert np.array_equal(array[:count], second.arrays[name][:count])
        assert not np.array_equal(array[count:], second.arrays[name][count:])


def test_a_class_that_nobody_has_keeps_its_prototype() -> None:
    method = a_method()
    state = method.initial_state()
    reply = reply_of(method, state)
    arrays = dict(reply.payload.arrays)
    arrays[COUNTS] = np.array([5, 0])
    after = method.aggregate(state, place(method), [Reply(0, Payload(arrays, reply.payload.meta))])
    assert np.array_equal(after.arrays[PROTOTYPES][1], state.arrays[PROTOTYPES][1])
    np.testing.assert_allclose(after.arrays[PROTOTYPES][0], arrays[PROTOTYPES][0], rtol=1e-6)


def test_replies_that_do_not_fit_are_named() -> None:
    method = a_method()
    state = method.initial_state()
    good = reply_of(method, state).payload
    for name in good.arrays:
        missing = {key: array for key, array in good.arrays.items() if key != name}
        assert name in method.objection(state, place(method), Payload(missing, good.meta))
        wrong = {**good.arrays, name: good.arrays[name][:1]}
        if good.arrays[name].shape != wrong[name].shape:
            assert "shape" in method.objection(state, place(method), Payload(wrong, good.meta))
    negative = {**good.arrays, COUNTS: -good.arrays[COUNTS] - 1}
    assert "negative" in method.objection(state, place(method), Payload(negative, good.meta))


def test_a_run_learns_the_digits() -> None:
    run, _ = in_memory(config(method="pilora", backbone="vit", classes_per_task=(4,), rounds=4, local_epochs=5))
    assert run.run()["metrics"]["class_il"]["final_average_accuracy"] > 60
