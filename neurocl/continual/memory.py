"""The replay memory: named fields of fixed shape, reservoir or class-balanced replacement, and full state for resuming.

Letters: M capacity, B items offered at once, n items offered before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Field = tuple[tuple[int, ...], torch.dtype]
Int = NDArray[np.int64]


def reservoir_slots(draws: Int, first: int, capacity: int) -> Int:
    """Slot that each offered item goes to, -1 for none.

    Args:
        draws: [B] integers, the b-th uniform in [0, first + b] (both ends included).
        first: number of items offered before.
        capacity: M.

    Reference: Vitter, "Random sampling with a reservoir", 1985, algorithm R.
    """
    order = first + np.arange(len(draws))
    return np.where(order < capacity, order, np.where(draws < capacity, draws, -1))


def balanced_slots(draws: Int, labels: Int, stored: Int, first: int, capacity: int) -> Int:
    """Class-balanced reservoir: every item's slot or -1; ``stored`` (labels per slot, -1 empty) is updated in place.

    A late item is accepted when the plain reservoir would, or when its class is absent or below the median
    count; it evicts the (draw mod count)-th item of the most frequent class (lowest id on ties).
    One item depends on the one before, so this walks the batch; it is not on the default path.
    """
    slots = np.full(len(draws), -1, np.int64)
    num_classes = int(max(labels.max(initial=0), stored.max(initial=0))) + 1
    counts = np.bincount(stored[stored >= 0], minlength=num_classes)
    for index, (draw, label) in enumerate(zip(draws, labels, strict=True)):
        position = first + index
        if position < capacity:
            slots[index] = position
        else:
            rare = counts[label] == 0 or counts[label] < np.median(counts[counts > 0])
            if draw >= capacity and not rare:
                continue
            victim = int(counts.argmax())
            members = np.flatnonzero(stored == victim)
            slots[index] = members[draw % len(members)]
            counts[victim] -= 1
        stored[slots[index]] = label
        counts[label] += 1
    return slots


def greedy_slots(draws: Int, labels: Int, stored: Int, first: int, capacity: int) -> Int:
    """GDumb's greedy balancing: every item's slot or -1; ``stored`` is updated in place.

    A late item is accepted while its class holds fewer than capacity / (classes met) items, and evicts the
    (draw mod count)-th item of the largest class. Reference: Prabhu et al., 2020, algorithm 1.
    """
    slots = np.full(len(draws), -1, np.int64)
    num_classes = int(max(labels.max(initial=0), stored.max(initial=0))) + 1
    counts = np.bincount(stored[stored >= 0], minlength=num_classes)
    for index, (draw, label) in enumerate(zip(draws, labels, strict=True)):
        position = first + index
        if position < capacity:
            slots[index] = position
        else:
            met = np.count_nonzero(counts) + (counts[label] == 0)
            if counts[label] >= capacity / met:
                continue
            victim = int(counts.argmax())
            members = np.flatnonzero(stored == victim)
            slots[index] = members[draw % len(members)]
            counts[victim] -= 1
        stored[slots[index]] = label
        counts[label] += 1
    return slots


class Memory(nn.Module):
    """M items of a stream, each with the same named fields.

    Every tensor, the counter and the generator are part of ``state_dict()``.

    Args:
        capacity: M, at least 1.
        fields: name -> (shape of one item, dtype), for example ``{"image": ((3, 32, 32), torch.uint8)}``.
        seed: of the memory's own generator; two memories with different seeds keep different items.
        policy: ``"reservoir"``, or ``"balanced"`` or ``"greedy"`` (these need a field ``label``).
    """

    def __init__(self, capacity: int, fields: Mapping[str, Field], *, seed: int, policy: str = "reservoir") -> None:
        super().__init__()
        if capacity < 1:
            raise ValueError(f"buffer_size must be at least 1, got {capacity}")
        if policy not in ("reservoir", "balanced", "greedy"):
            raise ValueError(f"policy must be 'reservoir', 'balanced' or 'greedy', got {policy!r}")
        self.capacity = capacity
        self.policy = policy
        self.names = tuple(fields)
        for name, (shape, dtype) in fields.items():
            self.register_buffer(f"field_{name}", torch.zeros((capacity, *shape), dtype=dtype))
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self._seen = 0
        self._generator = torch.Generator().manual_seed(seed)

    def get_extra_state(self) -> Tensor:
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self._generator.set_state(state.cpu())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen = int(self.seen)

    def __len__(self) -> int:
        """Number of items stored."""
        return min(self._seen, self.capacity)

    @property
    def num_seen(self) -> int:
        """Number of items ever offered."""
        return self._seen

    def field(self, name: str) -> Tensor:
        """The stored items' values of one field, [len(self), ...] (a view)."""
        stored: Tensor = getattr(self, f"field_{name}")
        return stored[: len(self)]

    def _draw_slots(self, values: Mapping[str, Tensor], count: int) -> Int:
        """Decide the slots of ``count`` offered items at once."""
        order = self._seen + np.arange(count, dtype=np.int64)
        uniform = torch.rand(count, generator=self._generator, dtype=torch.float64).numpy()
        draws = np.floor(uniform * (order + 1)).astype(np.int64)
        if self.policy == "reservoir":
            return reservoir_slots(draws, self._seen, self.capacity)
        stored = np.full(self.capacity, -1, np.int64)
        stored[: len(self)] = self.field("label").cpu().numpy()
        choose = balanced_slots if self.policy == "balanced" else greedy_slots
        return choose(draws, values["label"].cpu().numpy(), stored, self._seen, self.capacity)

    @torch.no_grad()
    def add(self, **values: Tensor) -> None:
        """Offer B items; where two of them get the same slot the later one stays.

        Args:
            values: every field of the memory, [B, ...].

        Raises:
            ValueError: a field is missing or unknown.
        """
        if set(values) != set(self.names):
            raise ValueError(f"memory holds the fields {sorted(self.names)}, got {sorted(values)}")
        count = len(next(iter(values.values())))
        slots = self._draw_slots(values, count)
        # Of all items that chose a slot the last one stays; indexed writes leave the order of duplicates open.
        chosen, last = np.unique(slots[::-1], return_index=True)
        kept = chosen >= 0
        source = torch.from_numpy(count - 1 - last[kept])
        target = torch.from_numpy(chosen[kept])
        for name in self.names:
            stored: Tensor = getattr(self, f"field_{name}")
            taken = values[name][source.to(values[name].device)]
            stored[target.to(stored.device)] = taken.to(device=stored.device, dtype=stored.dtype)
        self._seen += count
        self.seen.fill_(self._seen)

    def sample(self, count: int) -> dict[str, Tensor]:
        """Draw ``min(count, len(self))`` items without replacement, as copies [count, ...].

        Raises:
            ValueError: the memory is empty.
        """
        if not len(self):
            raise ValueError("cannot draw from an empty memory")
        chosen = torch.randperm(len(self), generator=self._generator)[:count]
        device = self.seen.device
        if device.type != "cpu":
            chosen = chosen.to(device)
        return {name: getattr(self, f"field_{name}")[chosen] for name in self.names}

    @torch.no_grad()
    def replace(self, **values: Tensor) -> None:
        """Throw the content away and store exactly these items (at most M), as herding methods do.

        Raises:
            ValueError: more items than the capacity, or wrong fields.
        """
        if set(values) != set(self.names):
            raise ValueError(f"memory holds the fields {sorted(self.names)}, got {sorted(values)}")
        count = len(next(iter(values.values())))
        if count > self.capacity:
            raise ValueError(f"{count} items do not fit into a memory of {self.capacity}")
        for name in self.names:
            stored: Tensor = getattr(self, f"field_{name}")
            stored[:count] = values[name].to(device=stored.device, dtype=stored.dtype)
            stored[count:] = 0
        self._seen = count
        self.seen.fill_(count)
