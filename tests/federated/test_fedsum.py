"""FedSum: the sum of the clients' changes."""

from __future__ import annotations

import numpy as np

from tests.federated.adapter_runs import digits_method, place, replies_of

SMALL = {"rounds": 1, "local_epochs": 1}


def test_changes_add_up_with_the_scale():
    method = digits_method("fedsum", {"scale": 0.5}, **SMALL)
    state, where = method.initial_state(), place(method)
    replies = replies_of(method, state, where)
    merged = method.aggregate(state, where, replies)
    for name, start in state.arrays.items():
        changes = sum(reply.payload.arrays[name].astype(np.float64) - start for reply in replies)
        np.testing.assert_allclose(merged.arrays[name], start + 0.5 * changes, rtol=1e-6, atol=1e-7)


def test_one_over_the_number_of_clients_is_fedavg_with_equal_weights():
    summed, averaged = (
        digits_method("fedsum", {"scale": 0.2}, **SMALL),
        digits_method("fedavg", {"weights": "equal"}, **SMALL),
    )
    state, where = summed.initial_state(), place(summed)
    replies = replies_of(summed, state, where)
    found, expected = (method.aggregate(state, where, replies).arrays for method in (summed, averaged))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-7)
