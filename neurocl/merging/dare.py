"""DARE: drop entries of the task vectors at random and scale up the rest, then merge.

Whether an entry is dropped depends on the seed, the name of its tensor, the number of its model and its place in the
tensor, and on nothing else: not on the order of tensors, on threads, on slices or on the device.

``N`` models, ``*shape`` the shape of one parameter, n entries of one piece.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from neurocl.merging.average import shares_of
from neurocl.merging.method import measured_on, merge_method
from neurocl.merging.sums import StreamSum
from neurocl.merging.ties import Combine, Count, Density, Sign, TiesMeasurement, Trim, elect_and_combine

Rescale = Literal["probability", "l1"]
Then = Literal["task-arithmetic", "average"]
DropRate = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0)]

# One step of the Philox counter makes four 64-bit words; every entry takes half a word.
DRAWS_PER_STEP = 8


class DareMeasurement:
    """The factor by which what is left of each task vector is scaled up.

    With ``rescale="probability"`` that is 1 / (1 - drop_rate) and nothing is measured.
    """

    def __init__(
        self, num_models: int, drop_rate: float = 0.9, rescale: Rescale = "probability", seed: int = 0
    ) -> None:
        self._num_models = num_models
        self._drop_rate = drop_rate
        self._rescale: Rescale = rescale
        self.reads_data = rescale != "probability"
        self._seed = seed
        self._before: dict[str, list[StreamSum]] = defaultdict(self._sums)
        self._after: dict[str, list[StreamSum]] = defaultdict(self._sums)
        self._scales: dict[str, list[float]] = {}

    def _sums(self) -> list[StreamSum]:
        return [StreamSum() for _ in range(self._num_models)]

    def update(self, base: Tensor, models: Tensor, *, name: str = "", offset: int = 0) -> None:
        """Take in one piece of the tensor ``name`` that begins at ``offset``: ``base`` [n], ``models`` [N, n]."""
        if self._rescale == "probability":
            return
        for index, model in enumerate(models):
            task_vector = model - base
            kept = keep_mask(task_vector, self._drop_rate, self._seed, name, index, offset)
            self._before[name][index].add(task_vector.abs())
            self._after[name][index].add(torch.where(kept, task_vector, 0.0).abs())

    def another_pass(self) -> bool:
        """False: one pass gives all norms."""
        for name, before in self._before.items():
            totals = [(whole.total(), left.total()) for whole, left in zip(before, self._after[name], strict=True)]
            self._scales[name] = [whole / left if left > 0 else 1.0 for whole, left in totals]
        return False

    def scale(self, name: str, index: int) -> float:
        """Factor for what is left of model ``index`` in the tensor ``name``."""
        return 1 / (1 - self._drop_rate) if self._rescale == "probability" else self._scales[name][index]


@merge_method("dare", measure=DareMeasurement, order_matters=True, returns_single=False)
def dare(
    base: Tensor,
    models: Tensor,
    *,
    weights: Tensor | None = None,
    name: str = "",
    offset: int = 0,
    measured: DareMeasurement | None = None,
    drop_rate: DropRate = 0.9,
    rescale: Rescale = "probability",
    then: Then = "task-arithmetic",
    seed: Seed = 0,
) -> Tensor:
    """Drop random entries of the task vectors, scale up the rest, add or average.

    Args:
        base: pre-trained tensor, [*shape].
        models: fine-tuned tensors, [N, *shape].
        weights: of the task vectors, [N], 1 if not given.
        name: of the tensor; together with ``seed`` it decides what is dropped.
        offset: place of the first entry in the flattened tensor.
        measured: scales; taken over ``models`` if not given.
        drop_rate: probability that an entry is dropped.
        rescale: probability scales by 1 / (1 - drop_rate), which keeps the expectation; l1 keeps the L1 norm of every
            tensor.
        then: what is done with the results: their sum is added to the base (task-arithmetic), or their average.
        seed: of the random numbers.

    Returns: merged tensor, [*shape].

    Reference: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    ICML 2024, arXiv 2311.03099.
    """
    if measured is None:
        measured = measured_on(DareMeasurement(len(models), drop_rate, rescale, seed), base, models, name=name)
    if then == "average":
        weights = shares_of(torch.ones(len(models)).to(models) if weights is None else weights)
    total = torch.zeros_like(base)
    for index, left in enumerate(dropped(base, models, measured, drop_rate, seed, name, offset)):
        total += left if weights is None else left * weights[index]
    return base + total


class DareTiesMeasurement:
    """What TIES needs to know about the task vectors after DARE."""

    def __init__(
        self,
        num_models: int,
        drop_rate: float = 0.9,
        rescale: Rescale = "probability",
        seed: int = 0,
        density: float = 0.2,
        count: Count = "published",
        sign: Sign = "total",
        weights: Tensor | None = None,
    ) -> None:
        self.dare = DareMeasurement(num_models, drop_rate, rescale, seed)
        self.ties = TiesMeasurement(num_models, density, count, sign, weights)
        self._scaled = rescale == "probability"
        self._drop_rate = drop_rate
        self._seed = seed

    def update(self, base: Tensor, models: Tensor, *, name: str = "", offset: int = 0) -> None:
        """Take in one piece of the tensor ``name`` that begins at ``offset``: ``base`` [n], ``models`` [N, n]."""
        if not self._scaled:
            self.dare.update(base, models, name=name, offset=offset)
            return
        left = dropped(base, models, self.dare, self._drop_rate, self._seed, name, offset)
        self.ties.update(torch.zeros_like(base), left)

    def another_pass(self) -> bool:
        """True until the scales of DARE and then the thresholds and votes of TIES are known."""
        if not self._scaled:
            self.dare.another_pass()
            self._scaled = True
            return True
        return self.ties.another_pass()


@merge_method("dare-ties", measure=DareTiesMeasurement, measure_scope="model", order_matters=True, returns_single=False)
def dare_ties(
    base: Tensor,
    models: Tensor,
    *,
    weights: Tensor | None = None,
    name: str = "",
    offset: int = 0,
    measured: DareTiesMeasurement | None = None,
    drop_rate: DropRate = 0.9,
    rescale: Rescale = "probability",
    seed: Seed = 0,
    density: Density = 0.2,
    trim: Trim = "model",
    count: Count = "published",
    sign: Sign = "total",
    combine: Combine = "mean",
) -> Tensor:
    """Drop random entries of the task vectors, scale up the rest, merge with TIES.

    Args:
        base: pre-trained tensor, [*shape].
        models: fine-tuned tensors, [N, *shape].
        weights: of the models, [N]; they scale the trimmed task vectors before the vote.
        name: of the tensor; together with ``seed`` it decides what is dropped.
        offset: place of the first entry in the flattened tensor.
        measured: scales, thresholds and prevailing sign; taken over ``models`` if not given.
        drop_rate: probability that an entry is dropped.
        rescale: probability scales by 1 / (1 - drop_rate); l1 keeps the L1 norm of every tensor.
        seed: of the random numbers.
        density: share of all entries that TIES keeps of each task vector; dropped ones count.
        trim: whether that share is of the whole model or of every tensor.
        count: published keeps floor(density * n) + 1 of n entries, exact floor(density * n).
        sign: elected by the sum of the trimmed task vectors (total) or of their signs (frequency).
        combine: mean or sum of the agreeing entries (weighted), or the one of largest magnitude (max).

    Returns: merged tensor, [*shape].

    Reference: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    ICML 2024, arXiv 2311.03099.
    """
    if measured is None:
        measurement = DareTiesMeasurement(len(models), drop_rate, rescale, seed, density, count, sign, weights)
        measured = measured_on(measurement, base, models, name=name)
    left = dropped(base, models, measured.dare, drop_rate, seed, name, offset)
    merged = elect_and_combine(torch.zeros_like(base), left, measured.ties, weights=weights, sign=sign, combine=combine)
    return base + merged


def dropped(
    base: Tensor, models: Tensor, measured: DareMeasurement, drop_rate: float, seed: int, name: str, offset: int
) -> Tensor:
    """The task vectors with entries dropped and the rest scaled up, [N, *shape]."""
    left = models - base
    for index, task_vector in enumerate(left):
        kept = keep_mask(task_vector, drop_rate, seed, name, index, offset)
        task_vector.copy_(scaled_where(task_vector, kept, measured.scale(name, index)))
    return left


def scaled_where(task_vector: Tensor, kept: Tensor, scale: float) -> Tensor:
    """``task_vector`` times ``scale`` where ``kept``, elsewhere 0."""
    return torch.where(kept, task_vector * scale, 0.0)


def keep_mask(like: Tensor, drop_rate: float, seed: int, name: str, index: int, offset: int = 0) -> Tensor:
    """Which entries stay: true with probability 1 - ``drop_rate``, to within 2^-32.

    Args:
        like: gives shape and device.
        drop_rate: in [0, 1).
        seed, name, index: of the run, the tensor and the model.
        offset: place of the first entry in the flattened tensor.

    Returns: [*shape] bool, a slice of the same endless row of decisions for every ``offset``.

    Reference: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    key = hashlib.blake2b(f"{seed}/{index}/{name}".encode(), digest_size=16).digest()
    first, skipped = divmod(offset, DRAWS_PER_STEP)
    generator = np.random.Philox(key=int.from_bytes(key, "little"), counter=first)
    words = generator.random_raw((skipped + like.numel() + 1) // 2)
    draws = words.astype("<u8", copy=False).view("<u4")[skipped : skipped + like.numel()]
    return torch.from_numpy(draws >= round(drop_rate * 2**32)).view(like.shape).to(like.device)
