"""Mixtures of client Gaussians, draws from them, and heads that are re-trained on the draws."""

import itertools

import numpy as np
import pytest
import torch

from neurocl.federated.class_table import ClassTable, told
from neurocl.federated.local_training import class_statistics
from neurocl.federated.method import Reply
from neurocl.federated.payload import Payload
from neurocl.federated.prototypes import (
    Mixture,
    class_covariances,
    draw_epoch,
    mixtures_of,
    normalised_loss,
    rebalance,
)
from tests.conftest import reference


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def mixture_case():
    return {name: torch.tensor(value) for name, value in reference("federated-hgp/mixture").items()}


@pytest.mark.parametrize("factor", [1, 3])
def test_moments_of_mixtures_agree_with_the_reference(mixture_case, factor):
    case = mixture_case
    for number in range(case["counts"].shape[1] - 1):
        has = case["counts"][:, number] > 0
        rows = (case[name][has, number].double() for name in ("counts", "means", "variances"))
        mixture = Mixture.of(*rows, factor=factor)
        mean, covariance = mixture.moments()
        torch.testing.assert_close(mixture.shares, case["component_weights"][has, number], rtol=0, atol=1e-10)
        torch.testing.assert_close(mean, case["mixture_mean"][number], rtol=0, atol=1e-10)
        torch.testing.assert_close(covariance, case[f"mixture_cov_scale{factor}"][number], rtol=0, atol=1e-10)


@pytest.mark.parametrize("full", [False, True])
def test_draws_have_the_moments_of_their_mixture(mixture_case, full):
    case, count = mixture_case, 200_000
    has = case["counts"][:, 0] > 0
    spreads = case["variances"][has, 0]
    spreads = spreads.diag_embed() if full else spreads
    mixture = Mixture.of(case["counts"][has, 0].double(), case["means"][has, 0], spreads)
    mean, covariance = mixture.moments()
    drawn = mixture.sample(count, generator(5))
    away = drawn - mean
    error = (covariance.diagonal() / count).sqrt()
    assert (away.mean(dim=0).abs() < 3 * error).all()
    products = away[:, :, None] * away[:, None, :]
    assert ((products.mean(dim=0) - covariance).abs() < 4 * products.std(dim=0) / count**0.5).all()


def test_diagonal_and_full_covariances_are_the_same_mixture(mixture_case):
    case = mixture_case
    has = case["counts"][:, 1] > 0
    rows = [case[name][has, 1].double() for name in ("counts", "means", "variances")]
    diagonal = Mixture.of(*rows).moments()
    full = Mixture.of(rows[0], rows[1], rows[2].diag_embed()).moments()
    torch.testing.assert_close(diagonal, full, rtol=1e-12, atol=1e-12)


def split_features():
    """Features of one class dealt unevenly to three clients."""
    features = torch.randn(40, 6, dtype=torch.float64, generator=generator(1)) * 2 + 1
    return features, features.split([5, 12, 23])


def test_a_mixture_of_all_clients_has_the_mean_and_the_scatter_of_all_samples():
    features, parts = split_features()
    counts = torch.tensor([float(len(part)) for part in parts], dtype=torch.float64)
    means, variances = (torch.stack([f(part) for part in parts]) for f in (lambda p: p.mean(0), lambda p: p.var(0)))
    mean, covariance = Mixture.of(counts, means, variances).moments()
    torch.testing.assert_close(mean, features.mean(dim=0), rtol=0, atol=1e-12)
    # Within and between as sums of squares over N; a client's unbiased variance has n - 1 below it, its weight n.
    within = sum(n / (n - 1) * part.sub(part.mean(0)).square().sum() for n, part in zip(counts, parts, strict=True))
    between = sum(n * (part.mean(0) - mean).square().sum() for n, part in zip(counts, parts, strict=True))
    expected = (within + between) / len(features) + 6 * 1e-8
    torch.testing.assert_close(covariance.trace(), expected, rtol=1e-12, atol=0)


def table_of(clients):
    replies = []
    for number, (features, labels) in clients.items():
        found = class_statistics(features, labels)
        arrays, meta = told(found.classes, found.counts, found.means, found.variances)
        replies.append(Reply(number, Payload(arrays, meta | {"n": len(labels)})))
    return ClassTable.received(replies)


def test_a_single_sample_counts_only_where_a_class_has_nothing_else():
    features = torch.randn(9, 4, generator=generator(2))
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2, 2])
    one = table_of({0: (features[:6], labels[:6]), 1: (features[6:], labels[6:])})
    found = mixtures_of(one)
    assert sorted(found) == [0, 1, 2]
    # Class 1: one sample at client 0, whose other measured class is 0. Class 2: client 0's one sample is left out.
    torch.testing.assert_close(found[1].means, features[4:5].double(), rtol=1e-6, atol=0)
    expected = features[:4].double().var(dim=0)
    torch.testing.assert_close(found[1].roots[0].square(), expected, rtol=1e-5, atol=1e-7)
    assert len(found[2].shares) == 1


def test_single_samples_alone_make_points():
    found = mixtures_of(table_of({0: (torch.ones(1, 3), torch.tensor([4]))}))
    assert (found[4].sample(5, generator()) - 1).abs().max() < 1e-3


def test_an_epoch_has_equally_many_draws_of_each_class_or_as_chance_will():
    mixtures = {n: Mixture.of(torch.ones(1), torch.full((1, 2), float(n)), torch.zeros(1, 2)) for n in (3, 5, 8)}
    for draw in ("balanced", "multinomial"):
        batches = draw_epoch(mixtures, 64, generator(1), draw=draw)
        assert [len(labels) for _, labels in batches] == [64, 64, 64]
        features, labels = (torch.cat(part) for part in zip(*batches, strict=True))
        torch.testing.assert_close(features, labels[:, None].expand(-1, 2).float(), rtol=0, atol=1e-3)
        counts = [int((labels == n).sum()) for n in mixtures]
        assert (counts == [64, 64, 64]) is (draw == "balanced")
        assert len(batches[0][1].unique()) > 1  # shuffled


def test_covariances_that_no_factorisation_likes_can_be_drawn_from():
    indefinite = -torch.eye(3, dtype=torch.float64)[None]
    mixture = Mixture.of(torch.ones(1), torch.zeros(1, 3, dtype=torch.float64), indefinite)
    assert mixture.sample(10, generator()).abs().max() < 1e-3


def test_statistics_of_ccvr_agree_with_the_reference():
    case = reference("federated-baselines/ccvr_stats")
    features, labels = torch.tensor(case["features"]), torch.tensor(case["labels"])
    found = class_statistics(features, labels, min_count=2)
    np.testing.assert_array_equal(found.classes, case["classes"])
    np.testing.assert_array_equal(found.counts, case["counts"])
    np.testing.assert_allclose(found.means, case["means"], rtol=1e-4)
    np.testing.assert_allclose(found.variances, case["variances"], rtol=1e-4)


def test_full_covariances_over_three_passes_agree_with_the_reference():
    case = reference("federated-baselines/ccvr_stats")
    features, labels = torch.tensor(case["features"]).repeat(3, 1), torch.tensor(case["labels"]).repeat(3)
    classes = torch.tensor(case["classes"])
    found = class_covariances(features, labels, classes)
    np.testing.assert_allclose(found, case["full_cov"], rtol=1e-4, atol=1e-5)
    one_pass = class_covariances(features[:90], labels[:90], classes)
    n = torch.tensor(case["counts"])[:, None, None]
    torch.testing.assert_close(found, one_pass * 3 * (n - 1) / (3 * n - 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lr", [0.003, 0.01])
def test_rebalancing_with_given_batches_agrees_with_the_reference(lr):
    case = reference("federated-hgp/rebalance")
    features, labels = torch.tensor(case["features"]), torch.tensor(case["labels"])
    epochs = [list(zip(x, y, strict=True)) for x, y in zip(features, labels, strict=True)]
    weight, bias, losses = rebalance(
        torch.tensor(case["W0"]), torch.tensor(case["b0"]), epochs, seen=int(case["seen"]), lr=lr
    )
    np.testing.assert_allclose(weight, case[f"W_lr{lr}"], rtol=0, atol=1e-8)
    np.testing.assert_allclose(bias, case[f"b_lr{lr}"], rtol=0, atol=1e-8)
    np.testing.assert_allclose(losses, case[f"losses_lr{lr}"], rtol=0, atol=1e-8)


def test_the_normalised_loss_does_not_see_the_size_of_the_head():
    logits = torch.randn(50, 7, dtype=torch.float64, generator=generator())
    labels = torch.arange(50) % 7
    expected = normalised_loss(logits, labels)
    for size in (0.5, 7.0, 1e4):
        torch.testing.assert_close(normalised_loss(size * logits, labels), expected, rtol=0, atol=1e-10)


def test_the_normalised_loss_of_zeros_is_finite():
    logits = torch.zeros(3, 4, requires_grad=True)
    loss = normalised_loss(logits, torch.tensor([0, 1, 2]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_the_cosine_ends_almost_at_rest():
    features, labels = torch.randn(32, 5, generator=generator()), torch.arange(32) % 3
    weights = [torch.randn(3, 5, generator=generator(1))]
    for count in range(1, 6):
        epochs = itertools.repeat([(features, labels)], count)
        weights.append(rebalance(weights[0], torch.zeros(3), epochs, seen=3, lr=1e-3, cosine_over=5)[0])
    rates = [(1 + np.cos(np.pi * epoch / 5)) / 2 for epoch in range(5)]
    # With one batch an epoch and small steps the gradient hardly changes: steps are sums of past rates by momentum.
    velocity, path = 0.0, []
    for rate in rates:
        velocity = 0.9 * velocity + 1
        path.append(rate * velocity)
    steps = [float((b - a).norm()) for a, b in itertools.pairwise(weights)]
    np.testing.assert_allclose(np.array(steps) / steps[0], path, rtol=0.05)


def test_predictions_of_a_head_that_favours_one_class_come_closer_to_uniform():
    means = 3 * torch.eye(4, dtype=torch.float64)
    mixtures = {n: Mixture.of(torch.ones(1), means[n : n + 1], torch.ones(1, 4)) for n in range(4)}
    weight, bias = means.clone(), torch.tensor([0.0, 0.0, 0.0, 30.0], dtype=torch.float64)
    test = torch.cat([one.sample(200, generator(9)) for one in mixtures.values()])
    truth = torch.arange(4).repeat_interleave(200)

    def measured(weight, bias):
        predicted = (test @ weight.mT + bias).argmax(dim=1)
        chi_square = float(((predicted.bincount(minlength=4) - 200).double().square() / 200).sum())
        return chi_square, float((predicted == truth).double().mean())

    before = measured(weight, bias)
    epochs = [draw_epoch(mixtures, 256, generator(epoch)) for epoch in range(20)]
    after = measured(*rebalance(weight, bias, epochs, seen=4, lr=0.1)[:2])
    assert before == (2400.0, 0.25)
    assert after[0] < before[0] / 10
    assert after[1] > before[1]
