"""Splits of a task over clients: what must hold for every split, and the laws that the draws follow."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import chi2, chisquare

from neurocl.config import validate
from neurocl.errors import UserError
from neurocl.federated import partition
from neurocl.federated.partition import PartitionConfig, dirichlet_split, per_client_split, quantity_split, split_task
from neurocl.federated.randomness import stream

LABELS = np.repeat(np.arange(10), 100)[np.random.default_rng(0).permutation(1000)]
CONFIGS = [
    PartitionConfig(kind="dirichlet", beta=0.5),
    PartitionConfig(kind="quantity", classes_per_client=2),
    PartitionConfig(kind="per-client", beta=0.1, num_clients=7),
    PartitionConfig(kind="iid", num_clients=7),
]


def counts(owner, labels, num_clients):
    """[K, C] samples of each client and class."""
    table = np.zeros((num_clients, labels.max() + 1), int)
    np.add.at(table, (owner[owner >= 0], labels[owner >= 0]), 1)
    return table


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_every_sample_has_one_owner_among_the_clients(config):
    owner = split_task(config, LABELS, 0)
    assert owner.dtype == np.int64
    assert owner.shape == LABELS.shape
    assert owner.max() < config.num_clients
    unused = len(LABELS) % config.num_clients if config.kind == "per-client" else 0
    assert (owner == -1).sum() == unused
    assert owner.min() >= (-1 if unused else 0)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_the_same_seed_gives_the_same_split_in_another_process(config):
    code = (
        "import sys, numpy as np; from neurocl.federated.partition import *\n"
        f"config = PartitionConfig.model_validate_json({config.model_dump_json()!r})\n"
        "labels = np.repeat(np.arange(10), 100)[np.random.default_rng(0).permutation(1000)]\n"
        "sys.stdout.buffer.write(split_task(config, labels, 3).tobytes())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    np.testing.assert_array_equal(np.frombuffer(there, np.int64), split_task(config, LABELS, 3))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_seed_and_task_change_the_split(config):
    first = split_task(config, LABELS, 0)
    assert (split_task(config, LABELS, 1) != first).any()
    assert (split_task(config.model_copy(update={"seed": 1}), LABELS, 0) != first).any()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_class_numbers_do_not_matter_only_their_order(config):
    np.testing.assert_array_equal(split_task(config, 7 * LABELS + 50, 2), split_task(config, LABELS, 2))


@pytest.mark.parametrize("beta", [0.05, 0.5, 1.0])
def test_dirichlet_gives_every_client_the_minimum(beta):
    for seed in range(10):
        owner = dirichlet_split(LABELS, 10, beta, np.random.default_rng(seed))
        assert np.bincount(owner, minlength=10).min() >= 6


def test_dirichlet_gives_every_client_the_same_mean():
    num_seeds, beta = 400, 0.5
    table = np.stack(
        [
            counts(dirichlet_split(LABELS, 5, beta, np.random.default_rng(seed), min_per_client=0), LABELS, 5)
            for seed in range(num_seeds)
        ]
    )
    # Variance of a Dirichlet-multinomial count of n = 100 samples and share 1/5.
    variance = 100 * 0.2 * 0.8 * (100 + 5 * beta) / (1 + 5 * beta)
    assert np.abs(table.mean(axis=0) - 20).max() < 4.5 * math.sqrt(variance / num_seeds)
    assert table.var(axis=0).mean() == pytest.approx(variance, rel=0.1)
    assert np.abs(table.sum(axis=2).mean(axis=0) - 200).max() < 4 * math.sqrt(10 * variance / num_seeds)


def test_dirichlet_counts_follow_the_dirichlet_multinomial_law():
    # Two clients, beta 1: the share is uniform, so the first client's count of 4 samples is uniform on 0..4.
    labels = np.repeat(np.arange(2000), 4)
    table = counts(dirichlet_split(labels, 2, 1.0, np.random.default_rng(0)), labels, 2)
    assert chisquare(np.bincount(table[0], minlength=5)).pvalue > 0.001
    # Beta 0.5: C(4, j) B(j + 1/2, 4 - j + 1/2) / B(1/2, 1/2) = 35, 20, 18, 20 and 35 of 128 for j = 0..4.
    table = counts(dirichlet_split(labels, 2, 0.5, np.random.default_rng(1)), labels, 2)
    expected = 2000 * np.array([35, 20, 18, 20, 35]) / 128
    assert chisquare(np.bincount(table[0], minlength=5), expected).pvalue > 0.001


def test_dirichlet_deals_the_samples_of_a_class_in_random_order():
    labels = np.zeros(4, int)
    owners = np.stack(
        [dirichlet_split(labels, 2, 50.0, np.random.default_rng(s), min_per_client=2) for s in range(600)]
    )
    patterns = owners @ np.array([8, 4, 2, 1])
    observed = np.bincount(patterns, minlength=16)[[3, 5, 6, 9, 10, 12]]  # the six ways to give two to each
    assert observed.sum() == 600
    assert chisquare(observed).pvalue > 0.001


def test_a_large_beta_is_an_even_multinomial_split():
    labels = np.zeros(6000, int)
    owner = dirichlet_split(labels, 6, 1e9, np.random.default_rng(3))
    assert chisquare(np.bincount(owner, minlength=6)).pvalue > 0.001


def test_clients_hold_fewer_classes_as_beta_falls():
    means = []
    for beta in (0.05, 0.2, 0.5, 1.0, 10.0):
        held = [
            (counts(dirichlet_split(LABELS, 10, beta, np.random.default_rng(seed)), LABELS, 10) > 0).sum(axis=1).mean()
            for seed in range(20)
        ]
        means.append(np.mean(held))
    assert means == sorted(means)
    assert means[0] < 4
    assert means[-1] > 9.9


def test_drawing_again_keeps_the_law_of_the_splits_that_pass():
    # One class, two clients, beta 1, 5 samples, at least 1 each: counts 1..4 of the first client are equally likely.
    labels = np.zeros(5, int)
    first = [
        (dirichlet_split(labels, 2, 1.0, np.random.default_rng(seed), min_per_client=1) == 0).sum()
        for seed in range(1000)
    ]
    observed = np.bincount(first, minlength=6)
    assert observed[[0, 5]].sum() == 0
    assert chisquare(observed[1:5]).pvalue > 0.001


def test_an_impossible_beta_is_told_with_all_its_numbers():
    labels = np.repeat([0, 1], 100)
    with pytest.raises(UserError) as error:
        dirichlet_split(labels, 10, 0.001, np.random.default_rng(0), max_tries=200)
    message = str(error.value)
    assert "beta 0.001" in message
    assert "10 clients" in message
    assert "200 tries" in message
    assert "best minimum was 0" in message
    assert "min_per_client 0" in message


def test_the_best_minimum_reached_is_told():
    for seed in range(10):
        reached = np.bincount(
            dirichlet_split(LABELS, 10, 0.3, np.random.default_rng(seed), min_per_client=0, max_tries=1), minlength=10
        ).min()
        with pytest.raises(UserError, match=rf"in 1 tries .* 100 samples, the best minimum was {reached};"):
            dirichlet_split(LABELS, 10, 0.3, np.random.default_rng(seed), min_per_client=100, max_tries=1)


def test_the_task_is_named_when_its_split_fails():
    config = PartitionConfig(num_clients=10, beta=0.5)
    with pytest.raises(UserError, match=r"task 4: beta 0.5, 10 clients and 59 samples of 10 classes: not enough"):
        split_task(config, LABELS[:59], 4)


@pytest.mark.parametrize("beta", [1e-300, 1e-6, 1e300])
def test_extreme_betas_still_own_every_sample(beta):
    owner = dirichlet_split(LABELS, 10, beta, np.random.default_rng(0), min_per_client=0)
    assert np.bincount(owner, minlength=10).sum() == 1000
    if beta < 1:
        assert ((counts(owner, LABELS, 10) > 0).sum(axis=0) == 1).all()


@pytest.mark.parametrize("beta", [0.0, -1.0, np.nan, np.inf])
def test_a_beta_that_is_no_concentration_is_refused(beta):
    with pytest.raises(UserError, match="beta must be a positive number"):
        dirichlet_split(LABELS, 10, beta, np.random.default_rng(0))
    with pytest.raises(UserError, match="alpha must be a positive number"):
        per_client_split(LABELS, 10, beta, np.random.default_rng(0))


def test_one_client_owns_everything():
    for config in CONFIGS:
        alone = config.model_copy(update={"num_clients": 1, "classes_per_client": 10})
        assert (split_task(alone, LABELS, 0) == 0).all()


def test_an_empty_task_is_split_if_nobody_needs_a_sample():
    nothing = np.empty(0, int)
    assert dirichlet_split(nothing, 3, 0.5, np.random.default_rng(0), min_per_client=0).shape == (0,)
    assert quantity_split(nothing, 3, 2, np.random.default_rng(0)).shape == (0,)


@pytest.mark.parametrize(("num_clients", "classes_per_client"), [(10, 2), (10, 4), (5, 2), (3, 10), (30, 1)])
def test_quantity_clients_hold_only_their_classes_and_all_classes_are_held(num_clients, classes_per_client):
    table = counts(
        quantity_split(LABELS, num_clients, classes_per_client, np.random.default_rng(1)), LABELS, num_clients
    )
    assert ((table > 0).sum(axis=1) <= classes_per_client).all()
    assert (table.sum(axis=0) == 100).all()


def test_quantity_shares_a_class_evenly_among_its_pickers():
    # Three clients with all classes: every sample goes to each of them with probability 1/3.
    labels = np.repeat([0, 1], 3000)
    table = counts(quantity_split(labels, 3, 2, np.random.default_rng(0)), labels, 3)
    assert chisquare(table[:, 0]).pvalue > 0.001
    assert chisquare(table[:, 1]).pvalue > 0.001


def test_quantity_picks_are_uniform_over_those_that_cover_all_classes():
    # Two clients, two classes, one class each: only the two assignments that cover both are left.
    labels = np.array([0, 1])
    owners = np.stack([quantity_split(labels, 2, 1, np.random.default_rng(seed)) for seed in range(400)])
    assert (owners.sum(axis=1) == 1).all()
    assert chisquare(np.bincount(owners[:, 0], minlength=2)).pvalue > 0.001


def test_quantity_that_can_never_cover_the_classes_is_refused_at_once():
    with pytest.raises(UserError, match=r"task 0: 4 clients with 2 of 10 classes each can never hold all classes"):
        split_task(PartitionConfig(kind="quantity", num_clients=4, classes_per_client=2), LABELS, 0)


def test_quantity_that_was_not_found_says_how_far_it_came():
    labels = np.arange(30)
    with pytest.raises(UserError, match=r"in 5 tries at most \d+ of the classes"):
        quantity_split(labels, 30, 1, np.random.default_rng(0), max_tries=5)


@pytest.mark.parametrize("classes_per_client", [0, 11])
def test_quantity_needs_classes_that_exist(classes_per_client):
    with pytest.raises(UserError, match="between 1 and 10"):
        quantity_split(LABELS, 20, classes_per_client, np.random.default_rng(0))


@pytest.mark.parametrize("alpha", [1e-300, 0.01, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("num_clients", [1, 3, 100, 1000])
def test_per_client_sizes_are_equal_and_few_samples_stay_unused(alpha, num_clients):
    owner = per_client_split(LABELS[:997] if num_clients < 1000 else LABELS, num_clients, alpha, stream(0, "a"))
    sizes = np.bincount(owner[owner >= 0], minlength=num_clients)
    assert (sizes == len(owner) // num_clients).all()
    assert (owner == -1).sum() == len(owner) % num_clients


def num_held(table):
    """Mean number of classes per client of a table [K, C]."""
    return (table > 0).sum(axis=1).mean()


def test_per_client_clients_hold_fewer_classes_as_alpha_falls():
    means = [
        np.mean([num_held(counts(per_client_split(LABELS, 20, alpha, stream(s, "a")), LABELS, 20)) for s in range(10)])
        for alpha in (0.01, 0.1, 0.5, 2.0, 50.0)
    ]
    assert means == sorted(means)


def brute_force_per_client(labels, num_clients, alpha, rng):
    """The split as its definition says it: turn by turn, rows set to zero and renormalised when a class runs out."""
    classes, left = np.unique(labels, return_counts=True)
    shares = rng.dirichlet(np.full(len(classes), alpha), size=num_clients)
    table = np.zeros((num_clients, len(classes)), int)
    for client in rng.permutation(np.repeat(np.arange(num_clients), len(labels) // num_clients)):
        chosen = rng.choice(len(classes), p=shares[client])
        table[client, chosen] += 1
        left[chosen] -= 1
        if left[chosen] == 0:
            shares[:, chosen] = 0
            shares[shares.sum(axis=1) == 0] = left > 0
            if left.any():
                shares /= shares.sum(axis=1, keepdims=True)
    return table


def test_per_client_law_is_that_of_taking_samples_one_by_one():
    # Six samples of three classes, two clients of three: the tables of counts must come equally often from both.
    labels = np.array([0, 1, 1, 2, 2, 2])
    rng = np.random.default_rng(0)
    runs = 3000

    def key(table):
        return tuple(table[0])  # the other client has the rest

    ours: dict[tuple[int, ...], int] = {}
    theirs: dict[tuple[int, ...], int] = {}
    for _ in range(runs):
        mine = key(counts(per_client_split(labels, 2, 0.7, rng), labels, 2))
        ours[mine] = ours.get(mine, 0) + 1
        other = key(brute_force_per_client(labels, 2, 0.7, rng))
        theirs[other] = theirs.get(other, 0) + 1
    assert ours.keys() == theirs.keys()
    statistic = sum((ours[k] - theirs[k]) ** 2 / (ours[k] + theirs[k]) for k in ours)
    assert chi2.sf(statistic, len(ours) - 1) > 0.001


def test_per_client_number_of_classes_is_that_of_taking_samples_one_by_one():
    ours = [num_held(counts(per_client_split(LABELS, 20, 0.1, stream(s, "a")), LABELS, 20)) for s in range(30)]
    theirs = [num_held(brute_force_per_client(LABELS, 20, 0.1, stream(s, "b"))) for s in range(30)]
    error = math.sqrt((np.var(ours) + np.var(theirs)) / 29)
    assert abs(np.mean(ours) - np.mean(theirs)) < 4 * error


def test_per_client_split_of_fewer_samples_than_clients_is_refused():
    with pytest.raises(UserError, match="9 samples cannot be dealt to 10 clients"):
        per_client_split(np.arange(9), 10, 0.1, np.random.default_rng(0))


def test_iid_sizes_differ_by_one_at_most_and_classes_are_as_chance_has_it():
    labels = np.repeat(np.arange(4), 2501)
    owner = split_task(PartitionConfig(kind="iid", num_clients=8), labels, 0)
    sizes = np.bincount(owner)
    assert sizes.max() - sizes.min() <= 1
    table = counts(owner, labels, 8)
    assert chisquare(table.ravel()).pvalue > 0.001


def test_test_samples_are_dealt_as_the_training_samples_are():
    labels = np.repeat([0, 1], [10, 8])
    owner = np.concatenate([np.repeat([0, 1, 2], [5, 3, 2]), np.repeat([0, 1], [4, 4])])
    test_labels = np.repeat([0, 1], [30, 4])
    table = counts(partition.test_shares(labels, owner, test_labels, 3, stream(0, "t")), test_labels, 3)
    # Exact quotients leave nothing to chance.
    np.testing.assert_array_equal(table, [[15, 2], [9, 2], [6, 0]])


def test_the_remainder_of_the_test_samples_is_drawn_with_the_training_shares():
    labels, owner, test_labels = np.zeros(8, int), np.repeat([0, 1], [6, 2]), np.zeros(10, int)
    first = np.array(
        [(partition.test_shares(labels, owner, test_labels, 2, stream(s, "t")) == 0).sum() for s in range(800)]
    )
    # 7.5 and 2.5: 7 and 2 are certain, the tenth goes to the first with probability 3/4.
    assert set(first) == {7, 8}
    assert chisquare([(first == 7).sum(), (first == 8).sum()], [200, 600]).pvalue > 0.001


def test_every_client_has_a_test_sample_of_a_class_it_knows():
    labels = np.concatenate([np.zeros(1000, int), np.ones(10, int)])
    owner = np.concatenate([np.repeat([0, 1], [999, 1]), np.repeat([0, 2], [5, 5])])
    for seed in range(20):
        test_labels = np.repeat([0, 1], [12, 3])
        shares = partition.test_shares(labels, owner, test_labels, 3, stream(seed, "t"))
        table = counts(shares, test_labels, 3)
        assert table.sum(axis=1).min() >= 1
        assert table[1, 1] == 0  # client 1 never saw class 1
        np.testing.assert_array_equal(table.sum(axis=0), [12, 3])


def test_a_class_without_training_samples_goes_by_the_shares_of_the_task():
    labels, owner = np.zeros(4, int), np.array([0, 0, 0, 1])
    test_labels = np.array([5, 5, 5, 5])
    table = counts(partition.test_shares(labels, owner, test_labels, 2, stream(0, "t")), test_labels, 2)
    np.testing.assert_array_equal(table[:, 5], [3, 1])


def test_unused_training_samples_have_no_test_share():
    labels, owner = np.zeros(6, int), np.array([0, 1, -1, -1, -1, -1])
    shares = partition.test_shares(labels, owner, np.zeros(10, int), 2, stream(0, "t"))
    np.testing.assert_array_equal(np.bincount(shares), [5, 5])


def test_as_many_test_samples_as_clients_give_each_exactly_one():
    labels, owner = np.repeat(np.arange(3), 40), np.zeros(120, int)
    shares = partition.test_shares(labels, owner, np.array([0, 1, 2, 0, 1]), 5, stream(0, "t"))
    assert sorted(shares) == [0, 1, 2, 3, 4]


def test_fewer_test_samples_than_clients_are_refused():
    with pytest.raises(UserError, match="2 test samples cannot give each of 3 clients one"):
        partition.test_shares(np.zeros(9, int), np.arange(9) % 3, np.zeros(2, int), 3, stream(0, "t"))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "random"}, "kind"),
        ({"num_clients": 0}, "num_clients"),
        ({"beta": 0}, "beta"),
        ({"beta": float("inf")}, "beta"),
        ({"classes_per_client": 0}, "classes_per_client"),
        ({"min_per_client": -1}, "min_per_client"),
        ({"seed": -1}, "seed"),
        ({"alpha": 0.1}, "unknown key 'alpha'"),
    ],
)
def test_a_bad_option_is_named(values, says):
    with pytest.raises(UserError, match=says):
        validate(PartitionConfig, values)
