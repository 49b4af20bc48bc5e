"""FisherAvg: the clients' Fisher information and the average by it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from neurocl.federated.fisheravg import FISHER, diagonal_fisher
from neurocl.federated.payload import Payload
from tests.conftest import reference
from tests.federated.adapter_runs import at_task, by_hand, digits_method, place, replies_of, run_of

SMALL = {"rounds": 1, "local_epochs": 1}


def test_the_average_is_that_of_the_public_code():
    case = reference("federated-baselines/flat")
    method = digits_method("fisheravg", **SMALL)
    replies = by_hand(
        [{"flat": own, FISHER + "flat": fisher} for own, fisher in zip(case["clients"], case["fisher"], strict=True)]
    )
    merged = method.aggregate(Payload({"flat": case["server"]}), at_task(2), replies)
    np.testing.assert_allclose(merged.arrays["flat"], case["fisheravg"], rtol=1e-6)


def test_the_fisher_information_is_that_of_one_backward_pass_per_sample():
    method = digits_method("fisheravg", **SMALL)
    network, task = method.network(), method.problem.tasks[1]
    torch.nn.init.normal_(network.head.weight, generator=torch.Generator().manual_seed(0))
    samples, names = method.problem.train_samples(0, task), method.trained(network)
    found = diagonal_fisher(network, names, samples, task)
    total = {name: torch.zeros_like(found[name]) for name in names}
    own = dict(network.named_parameters())
    for x, y in zip(samples.x, samples.y, strict=True):
        logits = network(x[None])[:, task.classes.start : task.classes.stop]
        value = F.log_softmax(logits, dim=1)[0, y - task.classes.start]
        for name, gradient in zip(names, torch.autograd.grad(value, [own[name] for name in names]), strict=True):
            total[name] += value.detach().exp() * gradient**2
    for name in names:
        torch.testing.assert_close(found[name], total[name], rtol=1e-4, atol=1e-7)


def test_equal_fisher_information_gives_the_plain_mean():
    method = digits_method("fisheravg", **SMALL)
    rng = np.random.default_rng(0)
    values, fisher = rng.standard_normal((3, 6)).astype(np.float32), rng.random(6).astype(np.float32)
    replies = by_hand([{"flat": own, FISHER + "flat": fisher} for own in values], [1, 10, 100])
    merged = method.aggregate(Payload({"flat": np.zeros(6, np.float32)}), at_task(2), replies)
    np.testing.assert_allclose(merged.arrays["flat"], values.mean(0), rtol=1e-6, atol=1e-7)


def test_negative_fisher_information_is_refused():
    method = digits_method("fisheravg", **SMALL)
    state, where = method.initial_state(), place(method)
    (reply,) = replies_of(method, state, where, [0])
    assert not method.objection(state, where, reply.payload)
    name = FISHER + "head.weight"
    bad = Payload({**reply.payload.arrays, name: reply.payload.arrays[name] - 1}, reply.payload.meta)
    assert "negative" in method.objection(state, where, bad)


def test_a_federation_learns():
    run = run_of(digits_method("fisheravg", rounds=2, local_epochs=2, classes_per_task=(2,)))
    assert run.run()["metrics"]["class_il"]["final_average_accuracy"] > 80
