"""FedCOF against the published server, by Monte Carlo, and as sums that clients enter and leave."""

import itertools

import numpy as np
import pytest
import torch

from neurocl.errors import UserError
from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.class_table import CLASSES, COUNTS, MEANS
from neurocl.federated.config import FederatedConfig
from neurocl.federated.driver import FederatedRun
from neurocl.federated.exchange import SequentialExchange, Stores, client_of
from neurocl.federated.fed3r import ridge_weights
from neurocl.federated.fedcof import ClassSums, fedcof_gram, fedcof_weights, part_means
from neurocl.federated.fedncm import normalised_rows
from neurocl.federated.method import Phase, Place, Reply
from neurocl.federated.network import HEAD_BIAS, HEAD_WEIGHT
from neurocl.federated.partition import PartitionConfig
from neurocl.federated.payload import Payload
from tests.conftest import reference


@pytest.fixture(scope="module")
def case():
    return {name: torch.tensor(value) for name, value in reference("federated-fedcof/stats").items()}


def sums_of(counts, means):
    return ClassSums.zeros(means.shape[1]).add(counts.double(), means)


def classes_of(case):
    for number in range(case["counts"].shape[1]):
        has = case["counts"][:, number] > 0
        yield sums_of(case["counts"][has, number], case["client_means"][has, number])


def test_covariances_agree_with_the_published_server(case):
    for sums, expected, mean in zip(classes_of(case), case["class_cov_no_shrink"], case["class_means"], strict=True):
        torch.testing.assert_close(sums.covariance(), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(sums.total / sums.count, mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", ["1.0", "0.1", "0.0"])
def test_classifiers_agree_with_the_published_server(case, gamma):
    gram, _ = fedcof_gram(classes_of(case), float(gamma))
    torch.testing.assert_close(gram, case[f"gram_{gamma}"], rtol=1e-10, atol=1e-9)
    weight = fedcof_weights(classes_of(case), float(gamma))
    torch.testing.assert_close(weight, case[f"W64_{gamma}"], rtol=0, atol=1e-5)
    torch.testing.assert_close(weight, case[f"fedcof_{gamma}"].double(), rtol=0, atol=1e-5)


COUNTS_OF_CLIENTS = torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64)


def estimates(num_clients, repeats=4000, size=16, exponential=False):
    """Estimates [repeats, d, d] of one covariance, which comes back too."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(size, size, dtype=torch.float64, generator=generator) / size**0.5
    counts = COUNTS_OF_CLIENTS.repeat(num_clients)[:num_clients]
    total = int(counts.sum())
    noise = torch.randn(repeats, total, size, dtype=torch.float64, generator=generator)
    if exponential:
        noise = torch.empty_like(noise).exponential_(generator=generator) - 1
    features = noise @ mixing.mT + 3
    owners = torch.arange(num_clients).repeat_interleave(counts.long())
    means = torch.zeros(repeats, num_clients, size, dtype=torch.float64).index_add(1, owners, features)
    means = means / counts[:, None]
    found = torch.stack([sums_of(counts, one).covariance() for one in means])
    return found, mixing @ mixing.mT


def largest_z(found, truth):
    return float(((found.mean(dim=0) - truth) / (found.std(dim=0) / len(found) ** 0.5)).abs().max())


@pytest.mark.parametrize("exponential", [False, True])
@pytest.mark.parametrize("num_clients", [2, 4])
def test_the_estimate_is_unbiased(num_clients, exponential):
    found, truth = estimates(num_clients, exponential=exponential)
    assert largest_z(found, truth) < 5


def test_dividing_by_k_would_be_caught():
    found, truth = estimates(2)
    assert largest_z(found / 2, truth) > 5


@pytest.mark.parametrize("num_clients", [2, 5, 20])
def test_the_error_falls_with_the_number_of_clients_as_theory_says(num_clients):
    found, truth = estimates(num_clients, repeats=1000)
    error = (found - truth).square().sum(dim=(1, 2))
    expected = float((truth.trace() ** 2 + truth.square().sum()) / (num_clients - 1))
    assert abs(float(error.mean()) - expected) < 5 * float(error.std()) / len(error) ** 0.5


def test_one_sample_a_client_gives_the_sample_covariance():
    features = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sums_of(torch.ones(30), features).covariance(), features.mT.cov(), rtol=0, atol=1e-12)


def test_clients_come_and_go_in_any_order(case):
    rng = np.random.default_rng(0)
    for number in range(case["counts"].shape[1]):
        has = torch.nonzero(case["counts"][:, number]).flatten()
        counts, means = case["counts"][has, number].double(), case["client_means"][has, number]
        sums = ClassSums.zeros(means.shape[1])
        for row in rng.permutation(len(has)):
            sums.add(counts[row : row + 1], means[row : row + 1])
        torch.testing.assert_close(sums.covariance(), sums_of(counts, means).covariance(), rtol=0, atol=1e-9)
        sums.remove(counts[:1], means[:1])
        torch.testing.assert_close(sums.covariance(), sums_of(counts[1:], means[1:]).covariance(), rtol=0, atol=1e-9)


def test_a_shift_between_clients_is_taken_for_spread():
    generator = torch.Generator().manual_seed(2)
    counts = torch.full((400,), 4.0, dtype=torch.float64)
    means = torch.randn(400, 6, dtype=torch.float64, generator=generator) / 2
    shifts = torch.randn(400, 6, dtype=torch.float64, generator=generator)
    apart = sums_of(counts, means + shifts).covariance().trace() - sums_of(counts, means).covariance().trace()
    assert float(apart) == pytest.approx(4 * 6, rel=0.2)  # n times the variance of the shift, in each direction


def test_one_mean_of_a_class_leaves_gamma_or_the_other_classes(case):
    known = next(iter(classes_of(case)))
    lonely = sums_of(torch.tensor([5.0]), torch.ones(1, 10, dtype=torch.float64))
    plain, _ = fedcof_gram([known, lonely], 0.5, "gamma")
    pooled, _ = fedcof_gram([known, lonely], 0.5, "pool")
    torch.testing.assert_close(pooled - plain, 4 * known.covariance(), rtol=0, atol=1e-10)
    middle = known.total + lonely.total
    count = known.count + 5
    eye = torch.eye(10, dtype=torch.float64)
    expected = (known.count - 1) * known.covariance() + 0.5 * (count - 2) * eye + torch.outer(middle, middle) / count
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-9)


def test_classes_of_one_sample_each_still_give_a_classifier():
    points = torch.eye(3, 4, dtype=torch.float64)
    weight = fedcof_weights([sums_of(torch.ones(1), point[None]) for point in points])
    assert (points @ weight.mT).argmax(dim=1).tolist() == [0, 1, 2]


def test_automatic_gamma_does_not_see_the_scale_of_features(case):
    weight = fedcof_weights(classes_of(case))
    for sums_scale in (1e-3, 1e3):
        scaled = [
            ClassSums(sums.count, sums.groups, sums_scale * sums.total, sums_scale**2 * sums.outer)
            for sums in classes_of(case)
        ]
        torch.testing.assert_close(fedcof_weights(scaled), weight, rtol=0, atol=1e-8)


def test_much_shrinkage_points_along_the_class_means(case):
    weight = fedcof_weights(classes_of(case), 1e9)
    torch.testing.assert_close(weight, normalised_rows(case["class_means"]), rtol=0, atol=1e-6)


def test_parts_of_a_class_are_large_enough_and_hold_every_sample_once():
    features = torch.arange(11.0)[:, None]
    counts, means = part_means(features, 4, 2, torch.Generator().manual_seed(0))
    assert sorted(counts.tolist()) == [2, 3, 3, 3]
    assert float((counts[:, None] * means).sum()) == pytest.approx(55)
    assert part_means(features[:3], 4, 2, torch.Generator())[0].tolist() == [3]
    assert part_means(features, 9, 5, torch.Generator())[0].tolist() == [6, 5]


# The one number that the published set-up leaves open; here the true covariances reach their published 93 per cent.
SEPARATION = 0.6


def synthetic(seed, num_clients, num_classes=20, size=32, per_class=60):
    """Features of classes with one covariance, test features, and the owner of each training sample."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((size, size)))[0]
    root = turn * np.sqrt(np.exp(np.linspace(-2, 2, size)))
    centres = SEPARATION * rng.standard_normal((num_classes, size))
    labels = np.repeat(np.arange(num_classes), per_class)
    train, test = (centres[labels] + rng.standard_normal((len(labels), size)) @ root.T for _ in range(2))
    shares = rng.dirichlet(np.full(num_clients, 0.5), size=num_classes)
    owner = np.array([rng.choice(num_clients, p=shares[label]) for label in labels])
    return torch.tensor(train), torch.tensor(test), torch.tensor(labels), owner


def accuracies(seed, numbers_of_clients):
    """Per cent: of means, of ridge regression, of true covariances, of FedCOF for each number of clients."""
    found = {}
    for num_clients in numbers_of_clients:
        train, test, labels, owner = synthetic(seed, num_clients)
        classes = [train[labels == number] for number in range(20)]

        def score(weight, test=test, labels=labels):
            return 100 * float(((test @ weight.mT).argmax(dim=1) == labels).double().mean())

        sums = []
        for number, own in enumerate(classes):
            owners = owner[(labels == number).numpy()]
            parts = [own[torch.from_numpy(owners == client)] for client in np.unique(owners)]
            counts = torch.tensor([float(len(part)) for part in parts], dtype=torch.float64)
            sums.append(sums_of(counts, torch.stack([part.mean(dim=0) for part in parts])))
        found[num_clients] = score(fedcof_weights(sums, 0.1))
        everyone = [sums_of(torch.ones(len(own)), own) for own in classes]
        found["oracle"] = score(fedcof_weights(everyone, 0.1))
        found["means"] = score(normalised_rows(torch.stack([own.mean(dim=0) for own in classes])))
        found["fed3r"] = score(ridge_weights(train.mT @ train, torch.stack([own.sum(dim=0) for own in classes]), 0.01))
    return found


def test_fifty_clients_means_do_nearly_what_all_covariances_do():
    numbers = (5, 20, 50, 200)
    runs = [accuracies(seed, numbers) for seed in range(5)]
    mean = {name: np.mean([run[name] for run in runs]) for name in runs[0]}
    print({name: round(float(value), 1) for name, value in mean.items()})
    assert mean[50] >= mean["means"] + 15
    assert mean[50] >= mean["oracle"] - 2
    for fewer, more in itertools.pairwise(numbers):
        assert mean[more] >= mean[fewer] - 1


def setup(**options):
    num_clients = options.pop("num_clients", 5)
    config = FederatedConfig(
        method="fedcof",
        options=options,
        partition=PartitionConfig(num_clients=num_clients, beta=0.5, min_per_client=0),
        rounds=1,
        local_epochs=1,
    )
    problem = problem_for(config)
    return problem, method_for(problem)


def run(problem, method):
    stores = Stores(None)
    run = FederatedRun(problem, method, SequentialExchange(problem, method, stores), stores)
    return run.run(), run.state


STATISTICS = Phase("statistics", 1, train=False)


def reply_of(problem, method, number, state=None):
    place = Place(problem.tasks[0], STATISTICS, 0)
    message = method.message(state or method.initial_state(), place)
    return method.client(client_of(problem, number, place, {}), place, message)


def test_a_message_holds_four_bytes_for_each_number_of_each_class():
    problem, method = setup()
    reply = reply_of(problem, method, 0)
    assert sum(array.nbytes for array in reply.arrays.values()) == 4 * (128 + 1) * len(reply.meta[CLASSES])


def test_nothing_is_sent_down_when_nothing_is_trained():
    problem, method = setup()
    assert method.message(method.initial_state(), Place(problem.tasks[0], STATISTICS, 0)).arrays == {}


def test_subsets_send_more_means_of_the_same_samples():
    problem, method = setup(subsets=3)
    reply, whole = reply_of(problem, method, 0), reply_of(*setup(), 0)
    assert len(reply.meta[CLASSES]) > len(whole.meta[CLASSES])
    assert reply.arrays[COUNTS].sum() == whole.arrays[COUNTS].sum()
    sizes = dict(zip(whole.meta[CLASSES], whole.arrays[COUNTS], strict=True))
    for number, count in zip(reply.meta[CLASSES], reply.arrays[COUNTS], strict=True):
        assert count >= min(2, sizes[number])
    assert method.objection(method.initial_state(), Place(problem.tasks[0], STATISTICS, 0), reply) == ""


def test_small_classes_are_kept_private_on_request():
    problem, method = setup(min_count=30)
    replies = [reply_of(problem, method, number) for number in range(5)]
    assert all((reply.arrays[COUNTS] >= 30).all() for reply in replies)
    everything = [reply_of(*setup(), number) for number in range(5)]
    assert sum(len(r.meta[CLASSES]) for r in replies) < sum(len(r.meta[CLASSES]) for r in everything)


def test_sums_and_kept_means_make_the_same_classifier():
    weights = []
    for forgettable in (True, False):
        problem, method = setup(forgettable=forgettable)
        weights.append(method.classifier(run(problem, method)[1]))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-9)


def test_forgetting_a_client_is_as_if_it_had_never_been_there():
    problem, method = setup()
    place = Place(problem.tasks[0], STATISTICS, 0)
    replies = [Reply(number, reply_of(problem, method, number)) for number in range(5)]
    everyone = method.aggregate(method.initial_state(), place, replies)
    others = method.aggregate(method.initial_state(), place, replies[:2] + replies[3:])
    forgotten = method.forget(everyone, 2)
    torch.testing.assert_close(method.classifier(forgotten), method.classifier(others), rtol=0, atol=0, equal_nan=True)
    for name, array in others.arrays.items():
        np.testing.assert_array_equal(forgotten.arrays[name], array)


@pytest.mark.parametrize("options", [{"forgettable": False}, {"then": "lp"}])
def test_what_cannot_be_forgotten_is_said(options):
    _, method = setup(**options)
    with pytest.raises(UserError, match="fedcof"):
        method.forget(method.initial_state(), 0)


def test_classes_that_nobody_told_are_never_predicted():
    problem, method = setup()
    place = Place(problem.tasks[1], STATISTICS, 0)
    client = client_of(problem, 0, place, {})
    state = method.aggregate(method.initial_state(), place, [Reply(0, method.client(client, place, Payload()))])
    scores = method.predictor(state, problem.tasks[1])(problem.test_samples(problem.tasks[0]).x)
    assert set(scores.argmax(dim=1).tolist()) <= set(problem.tasks[1].classes)
    assert scores[:, 0].eq(-torch.inf).all()


def test_a_reply_without_any_class_is_welcome():
    problem, method = setup(min_count=10_000)
    place = Place(problem.tasks[0], STATISTICS, 0)
    reply = reply_of(problem, method, 0)
    assert reply.arrays[MEANS].shape == (0, 128)
    assert method.objection(method.initial_state(), place, reply) == ""
    for forgettable in (True, False):
        _, method = setup(min_count=10_000, forgettable=forgettable)
        state = method.aggregate(method.initial_state(), place, [Reply(0, reply)])
        assert method.predictor(state, problem.tasks[0])(problem.source.test.x[:2]).eq(-torch.inf).all()


def test_rounds_begin_with_the_classifier_as_head_and_no_bias():
    problem, method = setup(then="lp")
    place = Place(problem.tasks[0], STATISTICS, 0)
    replies = [Reply(number, reply_of(problem, method, number)) for number in range(5)]
    state = method.aggregate(method.initial_state(), place, replies)
    rows = list(problem.tasks[0].classes)
    np.testing.assert_array_equal(state.arrays[HEAD_WEIGHT][rows], method.classifier(state)[rows].float().numpy())
    assert HEAD_BIAS not in state.arrays
    assert [phase.name for phase in method.phases(problem.tasks[0])] == ["statistics", "round"]


@pytest.mark.parametrize(("then", "trained"), [("lp", 1), ("ft", 5)])
def test_rounds_train_the_head_or_everything(then, trained):
    problem, method = setup(then=then)
    result, state = run(problem, method)
    before = method.initial_state()
    moved = [name for name in before.arrays if name in state.arrays and "." in name and not name.startswith("told.")]
    assert len(moved) == trained
    assert all(not np.array_equal(before.arrays[name], state.arrays[name]) for name in moved)
    assert result["failures"] == {}


def test_train_is_decided_by_then():
    with pytest.raises(UserError, match="use then lp or ft"):
        setup(train="head")


def test_on_digits_more_clients_make_up_for_their_small_shares():
    few, many = (run(*setup(num_clients=number))[0] for number in (3, 20))
    name = "final_average_accuracy"
    assert many["metrics"]["class_il"][name] > few["metrics"]["class_il"][name]
