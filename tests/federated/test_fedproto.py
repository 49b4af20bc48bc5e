"""FedProto: prototypes are count-weighted means, and draw the clients' class means."""

import numpy as np
import pytest
import torch

from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.class_table import CLASSES, MEANS, ClassTable, told
from neurocl.federated.config import FederatedConfig
from neurocl.federated.exchange import client_of
from neurocl.federated.fedproto import KNOWN, PROTOTYPES, prototype_distance
from neurocl.federated.local_training import class_statistics, features_of
from neurocl.federated.method import Phase, Place, Reply
from neurocl.federated.partition import PartitionConfig
from neurocl.federated.payload import Payload
from tests.conftest import reference


def setup(method="fedproto", **options):
    partition = PartitionConfig(num_clients=3, beta=0.3)
    config = FederatedConfig(method=method, options=options, partition=partition, rounds=2, local_epochs=2)
    problem = problem_for(config)
    return problem, method_for(problem)


def one_round(problem, method, state, number=0):
    place = Place(problem.tasks[0], Phase("round", 2), number)
    message = method.message(state, place)
    replies = [Reply(k, method.client(client_of(problem, k, place, {}), place, message)) for k in range(3)]
    assert [method.objection(state, place, reply.payload) for reply in replies] == [""] * 3
    return replies, method.aggregate(state, place, replies)


def test_prototypes_agree_with_the_published_server():
    case = reference("federated-baselines/fedproto")
    replies = []
    for client, (counts, means) in enumerate(zip(case["counts"], case["client_protos"], strict=True)):
        has = np.flatnonzero(counts)
        arrays, meta = told(*(torch.tensor(values) for values in (has, counts[has], means[has])))
        replies.append(Reply(client, Payload(arrays, meta)))
    pooled = ClassTable.received(replies).pooled()
    known = ~np.isnan(case["global_protos"]).any(axis=1)
    np.testing.assert_array_equal(pooled.classes, np.flatnonzero(known))
    np.testing.assert_allclose(pooled.means, case["global_protos"][known], rtol=1e-6)


def test_the_distance_is_summed_over_the_known_classes_of_the_batch():
    features = torch.tensor([[1.0, 1.0], [3.0, 1.0], [0.0, 0.0], [5.0, 5.0]])
    labels = torch.tensor([0, 0, 1, 3])
    prototypes = torch.tensor([[0.0, 0.0], [1.0, 3.0], [9.0, 9.0], [7.0, 7.0]])
    known = torch.tensor([True, True, True, False])
    # Class 0: mean (2, 1), (4 + 1) / 2. Class 1: (1 + 9) / 2. Class 2 is not in the batch, class 3 has no prototype.
    assert float(prototype_distance(features, labels, prototypes, known)) == pytest.approx(2.5 + 5)


def test_the_first_round_is_fedavg_since_there_are_no_prototypes():
    problem, method = setup(weights="samples")
    _, state = one_round(problem, method, method.initial_state())
    plain_problem, plain = setup("fedavg")
    _, expected = one_round(plain_problem, plain, plain.initial_state())
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(state.arrays[name], array)
    assert state.arrays[KNOWN].tolist() == [True, True] + [False] * 8


def test_clients_tell_the_means_of_their_trained_features():
    problem, method = setup()
    replies, _ = one_round(problem, method, method.initial_state())
    reply = replies[1].payload
    data = problem.train_samples(1, problem.tasks[0])
    found = class_statistics(features_of(method.loaded(reply), data), data.y)
    assert reply.meta[CLASSES] == found.classes.tolist()
    np.testing.assert_allclose(reply.arrays[MEANS], found.means, rtol=1e-6)


def test_prototypes_draw_class_means_towards_them():
    distances = []
    for pull in (0.0, 10.0):
        problem, method = setup(pull=pull)
        _, state = one_round(problem, method, method.initial_state())
        replies, _ = one_round(problem, method, state, 1)
        told = ClassTable.received(replies)
        distances.append(float(np.square(told.means - state.arrays[PROTOTYPES][told.classes]).mean()))
    assert distances[1] < distances[0] / 2


def test_only_the_prototypes_of_the_task_are_sent():
    problem, method = setup()
    _, state = one_round(problem, method, method.initial_state())
    message = method.message(state, Place(problem.tasks[0], Phase("round", 2), 1))
    assert message.arrays[PROTOTYPES].shape == (2, 128)
    assert message.arrays.keys() - {PROTOTYPES, KNOWN} == set(method.trained(method.network()))
