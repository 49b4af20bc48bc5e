"""Local training: nothing is sent, and what is judged is every client's own model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neurocl.errors import UserError
from neurocl.federated.driver import count_correct, run_federated
from neurocl.federated.exchange import Fault
from neurocl.federated.partition import PartitionConfig
from neurocl.federated.payload import Payload, encode
from tests.federated.adapter_runs import digits_method, place, replies_of
from tests.federated.broken_runs import assert_a_broken_run_ends_like_an_unbroken_one
from tests.federated.small_problem import config, in_memory


def test_one_client_alone_is_fedavg_with_one_client():
    alone = PartitionConfig(num_clients=1)
    plain, _ = in_memory(config(method="fedavg", partition=alone))
    own, _ = in_memory(config(method="local", partition=alone))
    one, two = plain.run(), own.run()
    assert one["metrics"] == two["metrics"]
    assert one["accuracy"] == two["accuracy"]
    store = own.stores.read(0)
    assert sorted(store) == list(plain.state.arrays)
    for name, array in plain.state.arrays.items():
        np.testing.assert_array_equal(store[name], array)


def test_nothing_but_the_number_of_samples_is_sent():
    method = digits_method("local", rounds=1, local_epochs=1)
    state, where = method.initial_state(), place(method)
    assert not method.message(state, where).arrays
    for reply in replies_of(method, state, where):
        assert not reply.payload.arrays
        assert list(reply.payload.meta) == ["n"]
        assert not method.objection(state, where, reply.payload)
    assert method.aggregate(state, where, replies_of(method, state, where)) is state


def test_accuracies_are_means_over_the_clients_models():
    run, log = in_memory(config(method="local"))
    result = run.run()
    last = run.problem.tasks[-1]
    each, shares = [], []
    for client in range(3):
        predict = run.method.predictor(Payload(run.stores.read(client)), last)
        sets = [run.problem.test_samples(task) for task in run.problem.tasks]
        right = [count_correct(predict, samples, last.classes.stop) for samples in sets]
        each.append([100 * count / len(samples) for count, samples in zip(right, sets, strict=True)])
        own = [run.problem.local_test_samples(client, task) for task in run.problem.tasks]
        right = [count_correct(predict, samples, last.classes.stop) for samples in own]
        shares.append(100 * sum(right) / sum(map(len, own)))
    assert len({tuple(row) for row in each}) > 1
    np.testing.assert_allclose(result["accuracy"]["class_il"][-1], np.mean(each, axis=0))
    np.testing.assert_allclose(
        [record for record in log if record["event"] == "task"][-1]["accuracy"], np.mean(each, axis=0)
    )
    assert result["metrics"]["class_il"]["client_accuracy_mean"] == pytest.approx(np.mean(shares))


def test_who_stays_away_changes_nothing_for_the_others_and_keeps_the_model_of_the_start():
    away = [Fault("drop", client=1, task=task, round=number) for task in (0, 1) for number in (0, 1)]
    all_there, one_away = (
        in_memory(config(method="local"))[0],
        in_memory(config(method="local", max_repeats=0), *away)[0],
    )
    all_there.run()
    one_away.run()
    for client in (0, 2):
        assert encode(Payload(one_away.stores.read(client))) == encode(Payload(all_there.stores.read(client)))
    assert one_away.stores.read(1) == {}
    samples = one_away.problem.source.test.x[:5]
    start = one_away.method.predictor(one_away.method.initial_state(), one_away.problem.tasks[-1])
    torch.testing.assert_close(one_away._predictors(one_away.problem.tasks[-1])[1](samples), start(samples))


def test_a_runtime_that_leaves_models_with_distant_clients_is_refused(tmp_path):
    with pytest.raises(UserError, match="no server can judge it"):
        run_federated(config(method="local"), out=tmp_path / "run", connect=lambda *_: pytest.fail("connected"))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_broken_in_the_second_task_ends_like_an_unbroken_one(tmp_path, workers):
    assert_a_broken_run_ends_like_an_unbroken_one(config(method="local", workers=workers), tmp_path, after=4)


def test_no_server_can_take_a_client_out_since_every_client_has_its_own_model():
    method = digits_method("local")
    with pytest.raises(UserError, match="every client has a model of its own"):
        method.forget(method.initial_state(), 0)
