"""TIES in a federation: small changes are dropped, the others vote on a sign, those that agree with it are averaged.

``K`` clients, ``P`` trained weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.method import Place, Reply
from neurocl.federated.payload import Payload, arrays_of, tensors
from neurocl.merging.magnitudes import Magnitudes
from neurocl.merging.ties import TiesMeasurement, elect_and_combine


class FedTiesConfig(FedAvgConfig):
    """Of TIES.

    Attributes:
        weights: all clients count the same.
        train: the whole network or the head alone.
        backbone_lr: learning rate of the backbone as a share of the head's.
        density: share of each client's changes that stays, the largest of the whole network.
        scale: factor on the merged change.
    """

    weights: Literal["equal"] = "equal"
    density: Annotated[float, Field(gt=0, le=1)] = 0.3
    scale: Annotated[float, Field(gt=0)] = 0.4


class FedTies(FedAvg):
    """Merge the clients' changes with TIES in every round.

    Reference: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, arXiv 2306.01708.
    """

    Config = FedTiesConfig
    config: FedTiesConfig
    sum_only = False
    reveals = "the client's trained weights, of which the server uses the largest changes"

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        each, names = [tensors(reply.payload) for reply in replies], self.expected(state, place)
        old = {name: value.double() for name, value in tensors(state).items()}
        pieces = {name: torch.stack([own[name].double() for own in each]) for name in names}
        # A vote that is a draw elects nobody, so the sign that prevails over all weights is not asked for.
        measured = TiesMeasurement(len(replies))
        measured.majority = 0
        magnitudes = Magnitudes(len(replies), self._rank)
        while True:
            for name, models in pieces.items():
                magnitudes.update(old[name].flatten(), models.flatten(1))
            if not magnitudes.another_pass():
                break
        measured.thresholds = magnitudes.values[:, 0]
        merged = {}
        for name, models in pieces.items():
            change = elect_and_combine(old[name], models, measured) - old[name]
            merged[name] = (old[name] + self.config.scale * change).float()
        return Payload({**state.arrays, **arrays_of(merged)}, state.meta)

    def _rank(self, num_entries: int) -> list[int]:
        """Of the smallest magnitude, from 1 in ascending order, that is not below the interpolated quantile."""
        return [math.ceil((1 - self.config.density) * (num_entries - 1)) + 1]
