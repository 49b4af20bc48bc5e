"""Fed3R: sums over clients are those of all data together."""

import numpy as np
import pytest
import torch

from neurocl.errors import UserError
from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.class_table import CLASSES
from neurocl.federated.config import FederatedConfig
from neurocl.federated.driver import FederatedRun
from neurocl.federated.exchange import SequentialExchange, Stores, client_of
from neurocl.federated.fed3r import GRAM, SUMS, ridge_weights
from neurocl.federated.local_training import features_of
from neurocl.federated.method import Place, Reply
from neurocl.federated.partition import PartitionConfig
from neurocl.federated.payload import Payload
from tests.conftest import reference


def setup(**options):
    partition = PartitionConfig(num_clients=4, beta=0.3, min_per_client=0)
    config = FederatedConfig(method="fed3r", options=options, classes_per_task=5, partition=partition)
    problem = problem_for(config)
    return problem, method_for(problem)


def first_replies(problem, method):
    place = Place(problem.tasks[0], method.phases(problem.tasks[0])[0], 0)
    return place, [Reply(k, method.client(client_of(problem, k, place, {}), place, Payload())) for k in range(4)]


def test_the_classifier_agrees_with_the_published_server():
    case = reference("federated-fedcof/stats")
    features, labels = torch.tensor(case["features"]).double(), torch.tensor(case["labels"])
    sums = torch.stack([features[labels == number].sum(dim=0) for number in range(6)])
    found = ridge_weights(features.mT @ features, sums, 0.01)
    np.testing.assert_allclose(found, case["fed3r_0.01"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("forgettable", [True, False])
def test_clients_and_tasks_add_up_to_ridge_regression_on_all_data(forgettable):
    problem, method = setup(forgettable=forgettable)
    stores = Stores(None)
    run = FederatedRun(problem, method, SequentialExchange(problem, method, stores), stores)
    run.run()
    features = features_of(problem.network(), problem.source.train).double()
    totals = method.totals(run.state)
    np.testing.assert_allclose(totals["gram"], features.mT @ features, rtol=1e-5, atol=1e-2)
    labels = problem.source.train.y
    sums = np.stack([features[labels == number].sum(dim=0) for number in range(10)])
    np.testing.assert_allclose(totals["sums"], sums, rtol=1e-5, atol=1e-3)
    assert totals["known"].all()


def test_a_message_costs_second_moments_and_one_sum_for_each_class():
    problem, method = setup()
    _, replies = first_replies(problem, method)
    for reply in replies:
        size = sum(array.nbytes for array in reply.payload.arrays.values())
        assert size == 4 * 128**2 + 4 * 128 * len(reply.payload.meta[CLASSES])


def test_forgetting_a_client_is_as_if_it_had_never_been_there():
    problem, method = setup(forgettable=True)
    place, replies = first_replies(problem, method)
    forgotten = method.forget(method.aggregate(method.initial_state(), place, replies), 2)
    others = method.aggregate(method.initial_state(), place, [*replies[:2], replies[3]])
    assert forgotten.arrays.keys() == others.arrays.keys()
    for name, array in method.totals(others).items():
        np.testing.assert_array_equal(method.totals(forgotten)[name], array)


def test_sums_cannot_forget():
    _, method = setup()
    with pytest.raises(UserError, match="cannot take one out"):
        method.forget(method.initial_state(), 0)


def test_classes_that_nobody_has_are_never_predicted():
    problem, method = setup()
    place, replies = first_replies(problem, method)
    state = method.aggregate(method.initial_state(), place, replies)
    scores = method.predictor(state, problem.tasks[0])(problem.source.test.x[:50])
    assert scores[:, 5:].eq(-torch.inf).all()
    assert scores[:, :5].isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        {GRAM: np.zeros((3, 3), dtype=np.float32)},
        {GRAM: np.zeros((128, 128))},
        {SUMS: np.zeros((1, 7), dtype=np.float32)},
        {SUMS: None},
        {CLASSES: [9]},
        {CLASSES: [0, 0]},
        {CLASSES: 1},
    ],
)
def test_replies_that_do_not_fit_are_refused(change):
    problem, method = setup()
    place, replies = first_replies(problem, method)
    payload = replies[0].payload
    assert method.objection(method.initial_state(), place, payload) == ""
    arrays, meta = dict(payload.arrays), dict(payload.meta)
    for name, value in change.items():
        (meta if name == CLASSES else arrays)[name] = value
        if value is None:
            del arrays[name]
    assert method.objection(method.initial_state(), place, Payload(arrays, meta))
