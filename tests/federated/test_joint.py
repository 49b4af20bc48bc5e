"""Joint training: all samples in one place, whatever the federation."""

from __future__ import annotations

import pytest

from neurocl.errors import UserError
from neurocl.federated.catalog import problem_for
from neurocl.federated.config import PrivacyConfig
from neurocl.federated.partition import PartitionConfig
from neurocl.federated.payload import encode
from tests.federated.adapter_runs import digits_method, run_of
from tests.federated.broken_runs import assert_a_broken_run_ends_like_an_unbroken_one
from tests.federated.small_problem import config, in_memory


def test_how_samples_are_dealt_makes_no_difference():
    found = []
    for changes in (
        {},
        {"partition": PartitionConfig(num_clients=7, beta=100.0, seed=3)},
        {"partition": PartitionConfig(kind="quantity", num_clients=4)},
        {"classes_per_task": 5, "participation": 0.5, "min_clients": 2},
    ):
        run, _ = in_memory(config(method="joint", **changes))
        result = run.run()
        found.append((encode(run.state), result["accuracy"], result["metrics"], result["bytes"]))
    assert all(own == found[0] for own in found[1:])


def test_it_is_fedavg_with_one_client_and_one_task():
    joint, _ = in_memory(config(method="joint"))
    alone = config(method="fedavg", classes_per_task=0, partition=PartitionConfig(kind="iid", num_clients=1))
    plain, _ = in_memory(alone)
    one, two = joint.run(), plain.run()
    assert encode(joint.state) == encode(plain.state)
    assert one["metrics"] == two["metrics"]


def test_it_is_far_above_a_federation():
    final = {}
    for name in ("joint", "fedavg"):
        run = run_of(digits_method(name, rounds=2, local_epochs=3))
        final[name] = run.run()["metrics"]["class_il"]["final_average_accuracy"]
    assert final["joint"] > final["fedavg"] + 20


def test_it_has_no_privacy_to_offer():
    with pytest.raises(UserError, match="no privacy"):
        in_memory(config(method="joint", privacy=PrivacyConfig()))


def test_other_processes_make_the_same_problem_of_its_configuration():
    problem = problem_for(config(method="joint"))
    assert (problem.num_clients, len(problem.tasks)) == (1, 1)
    assert problem_for(problem.config).config == problem.config


def test_a_broken_run_ends_like_an_unbroken_one(tmp_path):
    assert_a_broken_run_ends_like_an_unbroken_one(config(method="joint"), tmp_path, after=1)
