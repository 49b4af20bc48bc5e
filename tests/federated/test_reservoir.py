"""The reservoir of a client: a uniform sample of its stream in its store."""

from __future__ import annotations

import numpy as np
import torch

from neurocl.federated.reservoir import SEEN, Reservoir


def generator(seed):
    return torch.Generator().manual_seed(seed)


def offered(capacity, numbers, batch, seed, store=None):
    store = {} if store is None else store
    reservoir = Reservoir(store, capacity, generator(seed))
    for rows in torch.as_tensor(numbers).split(batch):
        reservoir.offer({"x": rows[:, None].float(), "y": rows})
    return reservoir, store


def test_all_are_kept_until_it_is_full():
    reservoir, _ = offered(8, range(8), 3, 0)
    assert sorted(reservoir.draw(100)["y"].tolist()) == list(range(8))


def test_every_sample_is_kept_with_the_same_probability():
    capacity, stream, repeats = 8, 30, 3000
    counts = np.zeros(stream)
    for seed in range(repeats):
        reservoir, _ = offered(capacity, range(stream), 7, seed)
        kept = reservoir.draw(capacity)["y"].numpy()
        assert len(set(kept)) == capacity
        counts[kept] += 1
    share = capacity / stream
    deviation = np.sqrt(repeats * share * (1 - share))
    assert np.abs(counts - repeats * share).max() < 5 * deviation
    # Counts are not independent: their sum is fixed.
    assert np.square((counts - repeats * share) / deviation).sum() < stream + 5 * np.sqrt(2 * stream)


def test_it_never_grows_and_remembers_how_many_there_were():
    reservoir, store = offered(5, range(100), 16, 0)
    assert len(reservoir) == 5
    assert store[SEEN].tolist() == [100]
    assert {name: array.shape for name, array in store.items()} == {
        SEEN: (1,),
        "reservoir.x": (5, 1),
        "reservoir.y": (5,),
    }


def test_fields_stay_together():
    found = offered(10, range(200), 16, 1)[0].draw(10)
    assert found["x"][:, 0].long().tolist() == found["y"].tolist()


def test_it_goes_on_from_a_stored_copy():
    _, whole = offered(6, range(20), 4, 3)
    random = generator(3)
    first: dict[str, np.ndarray] = {}
    for part in (range(12), range(12, 20)):
        reservoir = Reservoir(first, 6, random)
        for rows in torch.as_tensor(part).split(4):
            reservoir.offer({"x": rows[:, None].float(), "y": rows})
        first = {name: array.copy() for name, array in first.items()}
    for name, array in whole.items():
        np.testing.assert_array_equal(first[name], array)


def test_a_draw_has_no_sample_twice():
    reservoir, _ = offered(20, range(20), 16, 0)
    drawn = reservoir.draw(12)["y"].tolist()
    assert len(set(drawn)) == len(drawn) == 12
