"""RegMean in a federation: responses, not weights, are averaged."""

from __future__ import annotations

import numpy as np

from neurocl.federated.fed_regmean import GRAM
from neurocl.federated.payload import Payload
from tests.conftest import reference
from tests.federated.adapter_runs import at_task, by_hand, digits_method, place, replies_of

SMALL = {"rounds": 1, "local_epochs": 1}
HEAD_ONLY = {"train": "head"}


def merged_head(weights, grams, server=None, counts=None, bias=None):
    method = digits_method("regmean", HEAD_ONLY, **SMALL)
    weights = np.asarray(weights, np.float32)
    server = np.zeros_like(weights[0]) if server is None else np.asarray(server, np.float32)
    bias = np.zeros(weights.shape[:2], np.float32) if bias is None else bias
    replies = by_hand(
        [
            {"head.weight": own, "head.bias": b, GRAM + "head": np.asarray(gram, np.float32)}
            for own, b, gram in zip(weights, bias, grams, strict=True)
        ],
        counts,
    )
    state = Payload({"head.weight": server, "head.bias": np.zeros(weights.shape[1], np.float32)})
    return method.aggregate(state, at_task(2), replies).arrays


def test_the_merge_is_that_of_the_public_code_whatever_the_server_had():
    case = reference("federated-baselines/regmean")
    rng = np.random.default_rng(0)
    for server in (np.zeros((9, 12)), rng.standard_normal((9, 12))):
        found = merged_head(case["W"], case["grams"], server, case["num_samples"], case["b"])
        np.testing.assert_allclose(found["head.weight"], case["W_merged"], rtol=1e-5)
        np.testing.assert_allclose(found["head.bias"], case["b_merged"], rtol=1e-5)


def test_equal_gram_matrices_give_the_plain_mean():
    rng = np.random.default_rng(1)
    weights, x = rng.standard_normal((3, 4, 6)), rng.standard_normal((20, 6))
    found = merged_head(weights, [x.T @ x] * 3)["head.weight"]
    np.testing.assert_allclose(found, weights.mean(0), atol=1e-5)


def test_clients_in_orthogonal_subspaces_all_get_their_own_responses():
    rng = np.random.default_rng(2)
    basis, weights = np.linalg.qr(rng.standard_normal((6, 6)))[0], rng.standard_normal((2, 4, 6))
    inputs = [rng.standard_normal((20, 3)) @ basis[:, part].T for part in (slice(0, 3), slice(3, 6))]
    found = merged_head(weights, [x.T @ x for x in inputs])["head.weight"]
    for x, own in zip(inputs, weights, strict=True):
        np.testing.assert_allclose(x @ found.T, x @ own.T, atol=1e-4)


def test_what_no_input_reaches_stays_as_the_server_had_it():
    rng = np.random.default_rng(3)
    weights, server, x = rng.standard_normal((2, 4, 6)), rng.standard_normal((4, 6)), rng.standard_normal((20, 6))
    x[:, 2] = 0
    found = merged_head(weights, [x.T @ x] * 2, server)["head.weight"]
    np.testing.assert_allclose(found[:, 2], server[:, 2], rtol=1e-6)


def test_clients_send_gram_matrices_of_every_linear_layer_with_smaller_entries_off_the_diagonal():
    sent = {}
    for alpha in (1.0, 0.5, 0.0):
        method = digits_method("regmean", {"alpha": alpha}, **SMALL)
        state, where = method.initial_state(), place(method)
        (reply,) = replies_of(method, state, where, [0])
        assert not method.objection(state, where, reply.payload)
        sent[alpha] = reply.payload.arrays
    assert sent[1.0][GRAM + "backbone.fc1"].shape == (64, 64)
    assert sent[1.0][GRAM + "backbone.fc2"].shape == sent[1.0][GRAM + "head"].shape == (128, 128)
    for layer in ("backbone.fc1", "backbone.fc2", "head"):
        whole, half, diagonal = (sent[alpha][GRAM + layer] for alpha in (1.0, 0.5, 0.0))
        np.testing.assert_allclose(half, 0.5 * whole + 0.5 * np.diag(np.diagonal(whole)), rtol=1e-6)
        np.testing.assert_allclose(diagonal, np.diagonal(whole), rtol=1e-6)


def test_a_matrix_that_is_no_gram_matrix_is_refused():
    method = digits_method("regmean", **SMALL)
    state, where = method.initial_state(), place(method)
    (reply,) = replies_of(method, state, where, [0])
    bad = Payload({**reply.payload.arrays, GRAM + "head": -reply.payload.arrays[GRAM + "head"]}, {"n": 1})
    assert "no Gram matrix" in method.objection(state, where, bad)
