"""FedNCM: what clients' means add up to."""

import numpy as np
import pytest
import torch

from neurocl.errors import UserError
from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.class_table import CLASSES, COUNTS
from neurocl.federated.config import FederatedConfig
from neurocl.federated.driver import FederatedRun
from neurocl.federated.exchange import SequentialExchange, Stores, client_of
from neurocl.federated.fedncm import normalised_rows
from neurocl.federated.local_training import features_of
from neurocl.federated.method import Place, Reply
from neurocl.federated.partition import PartitionConfig
from neurocl.federated.payload import Payload
from tests.conftest import reference


def setup(method="fedncm", **options):
    partition = PartitionConfig(num_clients=4, beta=0.3, min_per_client=0)
    config = FederatedConfig(method=method, options=options, classes_per_task=5, partition=partition)
    problem = problem_for(config)
    return problem, method_for(problem)


def run(problem, method):
    stores = Stores(None)
    run = FederatedRun(problem, method, SequentialExchange(problem, method, stores), stores)
    run.run()
    return run


def test_means_agree_with_the_published_server():
    case = reference("federated-fedcof/stats")
    found = normalised_rows(torch.tensor(case["class_means"]))
    np.testing.assert_allclose(found, case["fedncm"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("forgettable", [True, False])
def test_scores_are_those_of_the_means_of_all_samples_together(forgettable):
    problem, method = setup(forgettable=forgettable)
    finished = run(problem, method)
    network = problem.network()
    features = features_of(network, problem.source.train).double()
    labels = problem.source.train.y
    means = torch.stack([features[labels == number].mean(dim=0) for number in range(10)])
    x = problem.source.test.x
    expected = features_of(network, problem.source.test) @ normalised_rows(means).float().mT
    found = method.predictor(finished.state, problem.tasks[-1])(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert len(finished.state.arrays["told.counts"]) == 10 if not forgettable else True


def test_its_messages_are_those_of_fedcof():
    replies = []
    for name in ("fedncm", "fedcof"):
        problem, method = setup(name)
        place = Place(problem.tasks[0], method.phases(problem.tasks[0])[0], 0)
        replies.append(method.client(client_of(problem, 1, place, {}), place, Payload()))
    assert replies[0].meta == replies[1].meta
    for name, array in replies[0].arrays.items():
        np.testing.assert_array_equal(array, replies[1].arrays[name])
    assert replies[0].arrays[COUNTS].sum() == replies[0].meta["n"]
    assert len(replies[0].meta[CLASSES]) <= 5


def test_forgetting_a_client_is_as_if_it_had_never_been_there():
    problem, method = setup()
    place = Place(problem.tasks[0], method.phases(problem.tasks[0])[0], 0)
    replies = [Reply(k, method.client(client_of(problem, k, place, {}), place, Payload())) for k in range(4)]
    forgotten = method.forget(method.aggregate(method.initial_state(), place, replies), 1)
    others = method.aggregate(method.initial_state(), place, [replies[0], *replies[2:]])
    for name, array in others.arrays.items():
        np.testing.assert_array_equal(forgotten.arrays[name], array)


def test_sums_cannot_forget():
    _, method = setup(forgettable=False)
    with pytest.raises(UserError, match="cannot take one out"):
        method.forget(method.initial_state(), 0)
