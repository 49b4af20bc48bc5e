"""What a client remembers of its stream: a uniform sample of bounded size, in the arrays of its own store.

``M`` capacity, ``B`` samples offered at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from neurocl.federated.method import Store

SEEN = "reservoir.seen"
FIELD = "reservoir."


class Reservoir:
    """Every sample offered so far is in the reservoir with the same probability; M / offered once it is full.

    Its arrays are those of the store, filled in place, so that it goes on where it was in the next round.

    Args:
        store: of the client; filled with ``reservoir.seen`` and one array [M, ...] for every field.
        capacity: M.
        generator: of the choices, another one in every round.

    Reference: Vitter, "Random sampling with a reservoir", ACM TOMS 1985, algorithm R.
    """

    def __init__(self, store: Store, capacity: int, generator: torch.Generator) -> None:
        self._store = store
        self._capacity = capacity
        self._generator = generator
        store.setdefault(SEEN, np.zeros(1, dtype=np.int64))

    def __len__(self) -> int:
        return min(int(self._store[SEEN][0]), self._capacity)

    def offer(self, samples: Mapping[str, Tensor]) -> None:
        """Take in, or not, the rows of tensors [B, ...], the same rows of each."""
        count = len(next(iter(samples.values())))
        first = int(self._store[SEEN][0])
        order = np.arange(first, first + count)
        draws = torch.rand(count, generator=self._generator, dtype=torch.float64).numpy()
        slots = np.where(order < self._capacity, order, np.floor(draws * (order + 1)).astype(np.int64))
        for name, tensor in samples.items():
            rows = tensor.detach().cpu().numpy()
            if FIELD + name not in self._store:
                self._store[FIELD + name] = np.zeros((self._capacity, *rows.shape[1:]), dtype=rows.dtype)
            kept = self._store[FIELD + name]
            # One after the other: two samples may want the same place, and the later one gets it.
            for row, slot in zip(rows, slots, strict=True):
                if slot < self._capacity:
                    kept[slot] = row
        self._store[SEEN][0] = first + count

    def draw(self, size: int) -> dict[str, Tensor]:
        """``size`` different samples, or all if there are fewer."""
        rows = torch.randperm(len(self), generator=self._generator)[:size].numpy()
        return {
            name.removeprefix(FIELD): torch.from_numpy(array[rows])
            for name, array in self._store.items()
            if name.startswith(FIELD) and name != SEEN
        }
