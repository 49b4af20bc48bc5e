"""TARGET: synthetic samples of earlier tasks, who makes them and what clients do with them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from neurocl.federated.catalog import method_for
from neurocl.federated.driver import FederatedRun
from neurocl.federated.exchange import SequentialExchange, Stores, client_of
from neurocl.federated.local_training import task_loss
from neurocl.federated.lwf import distillation
from neurocl.federated.method import Samples
from neurocl.federated.network import Classifier
from neurocl.federated.payload import Payload
from neurocl.federated.problem import Problem, Source
from neurocl.federated.target import SAMPLES, SCORES
from tests.federated.adapter_runs import digits_method, floats, place, replies_of, run_of
from tests.federated.broken_runs import assert_a_broken_run_ends_like_an_unbroken_one
from tests.federated.small_problem import config, in_memory

SMALL = {"rounds": 1, "local_epochs": 1, "classes_per_task": (2, 2, 2)}
SYNTHESIS = {"steps": 2, "inner_steps": 3, "warm_up": 1, "student_steps": 2, "batch_size": 4, "noise": 8}
OPTIONS = {"synthesis": SYNTHESIS}


def test_without_distillation_it_is_fedavg_bit_for_bit():
    plain = run_of(digits_method("fedavg", **SMALL))
    kept = run_of(digits_method("target", {**OPTIONS, "distillation": 0}, **SMALL))
    assert plain.run()["bytes"] == kept.run()["bytes"]
    for name, array in plain.state.arrays.items():
        np.testing.assert_array_equal(kept.state.arrays[name], array)


def test_the_first_task_is_fedavg():
    own = SMALL | {"classes_per_task": (2,)}
    plain, made = run_of(digits_method("fedavg", **own)), run_of(digits_method("target", OPTIONS, **own))
    plain.run()
    made.run()
    # Nobody needs samples of the last task.
    assert list(made.state.arrays) == list(plain.state.arrays)
    for name, array in plain.state.arrays.items():
        np.testing.assert_array_equal(made.state.arrays[name], array)


def test_samples_of_all_tasks_stay_and_their_scores_are_those_of_the_servers_model():
    method = digits_method("target", OPTIONS, **SMALL)
    first, second, last = method.problem.tasks
    rng = np.random.default_rng(0)
    start = {name: array + rng.normal(0, 0.1, array.shape) for name, array in method.initial_state().arrays.items()}
    state = Payload({name: array.astype(np.float32) for name, array in start.items()})
    one = method.end_task(state, first)
    two = method.end_task(one, second)
    assert one.arrays[SAMPLES].shape == (8, 64)
    assert two.arrays[SAMPLES].shape == (16, 64)
    np.testing.assert_array_equal(two.arrays[SAMPLES][:8], one.arrays[SAMPLES])
    for found, seen in ((one, 2), (two, 4)):
        with torch.no_grad():
            wanted = method.loaded(state)(torch.from_numpy(found.arrays[SAMPLES]))[:, :seen]
        np.testing.assert_allclose(found.arrays[SCORES], wanted.numpy(), rtol=1e-5, atol=1e-6)
    assert method.end_task(two, last) is two


def test_samples_are_part_of_what_is_sent():
    method = digits_method("target", OPTIONS, **SMALL)
    state = method.initial_state()
    later = method.end_task(state, method.problem.tasks[0])
    sent = floats(method.message(later, place(method, 1)))
    assert sent == floats(method.message(state, place(method))) + 8 * (64 + 2)


def test_the_loss_adds_the_distillation_of_the_old_classes_on_synthetic_samples():
    method = digits_method("target", OPTIONS, **SMALL)
    where = place(method, 1)
    state = method.end_task(method.initial_state(), method.problem.tasks[0])
    network, client = method.loaded(state), client_of(method.problem, 0, where, {})
    nn.init.normal_(network.head.weight, generator=torch.Generator().manual_seed(0))
    found = method.loss(network, client, where, state)(client.data.x, client.data.y)
    rows = torch.randint(8, (16,), generator=client.generator(where, "synthetic")).numpy()
    x, wanted = (torch.from_numpy(state.arrays[name][rows]) for name in (SAMPLES, SCORES))
    expected = task_loss(network, where.task)(client.data.x, client.data.y)
    torch.testing.assert_close(found, expected + 25 * distillation(network(x)[:, :2], wanted, 2.0))


def test_replies_that_do_not_fit_are_refused():
    method = digits_method("target", OPTIONS, **SMALL)
    state, where = method.end_task(method.initial_state(), method.problem.tasks[0]), place(method, 1)
    (reply,) = replies_of(method, state, where, [0])
    assert SAMPLES not in reply.payload.arrays
    assert not method.objection(state, where, reply.payload)
    arrays = dict(reply.payload.arrays)
    arrays["head.bias"] = np.zeros(3, np.float32)
    assert "shape" in method.objection(state, where, Payload(arrays, {"n": 1}))
    arrays.pop("head.bias")
    assert "missing" in method.objection(state, where, Payload(arrays, {"n": 1}))


def test_a_run_broken_in_the_second_task_ends_like_an_unbroken_one(tmp_path):
    assert_a_broken_run_ends_like_an_unbroken_one(config(method="target", options=OPTIONS), tmp_path, after=4)


def test_it_works_on_pictures():
    source = in_memory(config())[0].problem.source

    def build():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())
            return Classifier(layers, 8 * 4 * 4, 10)

    parts = [Samples(part.x.view(-1, 1, 8, 8), part.y) for part in (source.train, source.test)]
    pictures = Source("pictures", parts[0], parts[1], source.class_names, build)
    problem = Problem(config(method="target", options=OPTIONS), pictures)
    method, stores = method_for(problem), Stores(None)
    run = FederatedRun(problem, method, SequentialExchange(problem, method, stores), stores)
    run.run()
    assert run.state.arrays[SAMPLES].shape == (8, 1, 8, 8)
