"""Averages that a few hostile clients cannot move far: coordinate-wise median, trimmed mean, Krum.

``K`` replies, ``P`` trained weights. Clients count all the same: nobody can check how many samples they claim.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from neurocl.errors import UserError
from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.method import MethodConfig, Place, Reply, weighted_sum
from neurocl.federated.payload import Payload


class RobustConfig(FedAvgConfig):
    """Of the median.

    Attributes:
        weights: all clients count the same.
        train: the whole network or the head alone.
        backbone_lr: learning rate of the backbone as a share of the head's.
    """

    weights: Literal["equal"] = "equal"


class RobustAverage(FedAvg):
    """Base class: the server combines every trained array by itself."""

    Config = RobustConfig
    config: RobustConfig
    sum_only = False
    reveals = "the client's trained weights, each on its own, and its number of samples"

    @abstractmethod
    def combined(self, arrays: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
        """One array out of those of K clients."""

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        merged = {
            name: self.combined([reply.payload.arrays[name] for reply in replies]).astype(state.arrays[name].dtype)
            for name in self.expected(state, place)
        }
        return Payload({**state.arrays, **merged}, state.meta)


class Median(RobustAverage):
    """The median of every weight: unmoved by less than half of the clients.

    Reference: Yin et al., "Byzantine-robust distributed learning: towards optimal statistical rates", ICML 2018, arXiv
    1803.01498.
    """

    def combined(self, arrays: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
        return np.asarray(np.median(np.stack(arrays).astype(np.float64), axis=0))


class TrimmedMeanConfig(RobustConfig):
    """Of the trimmed mean.

    Attributes:
        weights: all clients count the same.
        train: the whole network or the head alone.
        backbone_lr: learning rate of the backbone as a share of the head's.
        trim: share of the values that is left out at either end; rounded up, so that any share leaves out at least one.
    """

    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2


class TrimmedMean(RobustAverage):
    """The mean of every weight without the largest and smallest values.

    Reference: Yin et al., "Byzantine-robust distributed learning: towards optimal statistical rates", ICML 2018, arXiv
    1803.01498.
    """

    Config = TrimmedMeanConfig
    config: TrimmedMeanConfig

    def combined(self, arrays: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
        count = len(arrays)
        # The tolerance keeps 0.2 of 15 at 3; of one or two replies nothing can be left out.
        cut = min(int(np.ceil(self.config.trim * count - 1e-9)), (count - 1) // 2)
        ordered = np.sort(np.stack(arrays).astype(np.float64), axis=0)
        return np.asarray(ordered[cut : count - cut].mean(axis=0))


class KrumConfig(RobustConfig):
    """Of Krum.

    Attributes:
        weights: all chosen clients count the same.
        train: the whole network or the head alone.
        backbone_lr: learning rate of the backbone as a share of the head's.
        attackers: f, the number of hostile clients to withstand; more than 2 f + 2 clients are needed.
        chosen: how many of the best replies are averaged; 1 is Krum, more Multi-Krum.
    """

    attackers: Annotated[int, Field(ge=0)] = 1
    chosen: Annotated[int, Field(ge=1)] = 1


class Krum(FedAvg):
    """The reply that is nearest to its K - f - 2 nearest neighbours.

    Reference: Blanchard et al., "Machine learning with adversaries: Byzantine tolerant gradient descent", NeurIPS 2017,
    arXiv 1703.02757.
    """

    Config = KrumConfig
    config: KrumConfig
    sum_only = False
    reveals = "the client's trained weights, each on its own, and its number of samples"

    def __init__(self, problem: Any, config: MethodConfig) -> None:
        super().__init__(problem, config)
        needed = 2 * self.config.attackers + 3
        if problem.num_clients < needed:
            asked = f"krum with {self.config.attackers} attackers needs at least {needed} clients"
            raise UserError(f"{asked}, got {problem.num_clients}")

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        names = self.expected(state, place)
        scores = krum_scores(
            [[reply.payload.arrays[name] for name in names] for reply in replies], self.config.attackers
        )
        best = np.sort(np.argsort(scores, kind="stable")[: self.config.chosen])
        chosen = [replies[index].payload.arrays for index in best]
        equal = np.full(len(chosen), 1 / len(chosen))
        merged = {name: weighted_sum([arrays[name] for arrays in chosen], equal) for name in names}
        return Payload({**state.arrays, **merged}, state.meta)


def krum_scores(replies: Sequence[Sequence[NDArray[Any]]], attackers: int) -> NDArray[np.float64]:
    """Sum of the squared distances from each reply to its K - f - 2 nearest (at least one), [K].

    Args:
        replies: the arrays of each.
        attackers: f.
    """
    count = len(replies)
    distances = np.zeros((count, count))
    for first in range(count):
        for second in range(first + 1, count):
            distance = sum(
                float(np.square(np.subtract(a, b, dtype=np.float64)).sum())
                for a, b in zip(replies[first], replies[second], strict=True)
            )
            distances[first, second] = distances[second, first] = distance
    nearest = max(1, count - attackers - 2)
    # A reply's distance from itself comes first.
    return np.asarray(np.sort(distances, axis=1)[:, 1 : 1 + nearest].sum(axis=1))
