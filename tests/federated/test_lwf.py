"""LwF in a federation: what is distilled, and from whom."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from neurocl.federated.exchange import client_of
from neurocl.federated.lwf import TEACHER, distillation
from neurocl.federated.payload import Payload
from tests.federated.adapter_runs import digits_method, floats, place, replies_of, run_of
from tests.federated.broken_runs import assert_a_broken_run_ends_like_an_unbroken_one
from tests.federated.small_problem import config

SMALL = {"rounds": 1, "local_epochs": 1, "classes_per_task": (2, 2)}


def scores(seed, size=(6, 4)):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_gradient_is_that_of_the_difference_of_softened_probabilities():
    student, teacher = scores(0).requires_grad_(), scores(1)
    (found,) = torch.autograd.grad(distillation(student, teacher, 2.0), student)
    wanted = ((student / 2).softmax(1) - (teacher / 2).softmax(1)) / (2 * len(student))
    torch.testing.assert_close(found, wanted)


def test_softening_is_the_root_of_the_probabilities_renormalised():
    student, teacher = scores(0), scores(1)
    roots = [F.softmax(own, dim=1) ** (1 / 3) for own in (student, teacher)]
    ours, theirs = (own / own.sum(dim=1, keepdim=True) for own in roots)
    torch.testing.assert_close(distillation(student, teacher, 3.0), -(theirs * ours.log()).sum(dim=1).mean())


def test_without_distillation_it_is_fedavg_bit_for_bit():
    plain, kept = run_of(digits_method("fedavg", **SMALL)), run_of(digits_method("lwf", {"distillation": 0}, **SMALL))
    plain.run()
    kept.run()
    for name, array in plain.state.arrays.items():
        np.testing.assert_array_equal(kept.state.arrays[name], array)


def test_the_teacher_is_the_servers_model_of_the_last_task():
    first, both = (run_of(digits_method("lwf", **(SMALL | {"classes_per_task": sizes}))) for sizes in ((2,), (2, 2)))
    plain = run_of(digits_method("fedavg", **(SMALL | {"classes_per_task": (2,)})))
    for run in (first, both, plain):
        run.run()
    start = first.method.initial_state()
    assert floats(first.method.message(first.state, place(first.method))) == 2 * floats(start)
    for name, array in plain.state.arrays.items():
        np.testing.assert_array_equal(first.state.arrays[name], array)
        np.testing.assert_array_equal(first.state.arrays[TEACHER + name], array)
    for name in start.arrays:
        np.testing.assert_array_equal(both.state.arrays[TEACHER + name], both.state.arrays[name])


@pytest.mark.parametrize(("classes", "distilled"), [("old", slice(0, 2)), ("task", slice(2, 4))])
def test_the_loss_adds_half_the_distillation_of_the_chosen_classes(classes, distilled):
    method = digits_method("lwf", {"classes": classes}, **SMALL)
    where, start = place(method, 1), method.initial_state()
    rng = np.random.default_rng(0)
    drawn = [
        {name: array + rng.normal(0, 0.1, array.shape).astype(np.float32) for name, array in start.arrays.items()}
        for _ in range(2)
    ]
    message = Payload({**drawn[0], **{TEACHER + name: array for name, array in drawn[1].items()}})
    network, client = method.loaded(message), client_of(method.problem, 0, where, {})
    x, y = client.data.x, client.data.y
    found = method.loss(network, client, where, message)(x, y)
    logits, wanted = network(x), method.loaded(Payload(drawn[1]))(x)
    expected = F.cross_entropy(logits[:, 2:4], y - 2)
    expected = expected + 0.5 * distillation(logits[:, distilled], wanted[:, distilled], 2.0)
    torch.testing.assert_close(found, expected)


def test_replies_that_do_not_fit_are_refused_and_a_teacher_in_a_reply_changes_nothing():
    method = digits_method("lwf", **SMALL)
    state, where = method.end_task(method.initial_state(), method.problem.tasks[0]), place(method, 1)
    (reply,) = replies_of(method, state, where, [0])
    assert not method.objection(state, where, reply.payload)
    assert not [name for name in reply.payload.arrays if name.startswith(TEACHER)]
    arrays = dict(reply.payload.arrays)
    arrays.pop("head.weight")
    assert "missing" in method.objection(state, where, Payload(arrays, {"n": 1}))
    arrays["head.weight"] = np.zeros((3, 3), np.float32)
    assert "shape" in method.objection(state, where, Payload(arrays, {"n": 1}))
    forged = Payload({**reply.payload.arrays, TEACHER + "head.bias": np.ones(10, np.float32)}, {"n": 1})
    merged = method.aggregate(state, where, [type(reply)(0, forged)])
    np.testing.assert_array_equal(merged.arrays[TEACHER + "head.bias"], state.arrays[TEACHER + "head.bias"])


def test_a_run_broken_in_the_second_task_ends_like_an_unbroken_one(tmp_path):
    assert_a_broken_run_ends_like_an_unbroken_one(config(method="lwf"), tmp_path)
