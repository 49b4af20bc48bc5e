"""FedSum: the server adds up the clients' changes instead of averaging them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.method import Place, Reply, Store, weighted_sum
from neurocl.federated.payload import Payload


class FedSumConfig(FedAvgConfig):
    """Of FedSum.

    Attributes:
        weights: all clients count the same.
        train: the whole network or the head alone.
        backbone_lr: learning rate of the backbone as a share of the head's.
        scale: factor on the sum; one over the number of clients is FedAvg with equal weights.
    """

    weights: Literal["equal"] = "equal"
    scale: Annotated[float, Field(gt=0)] = 1.0


class FedSum(FedAvg):
    """theta + scale sum_k (theta_k - theta).

    Reference: Ilharco et al., "Editing models with task arithmetic", ICLR 2023, arXiv 2212.04089, in every round of
    McMahan et al., AISTATS 2017, arXiv 1602.05629.
    """

    Config = FedSumConfig
    config: FedSumConfig

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        scale, merged = self.config.scale, Store()
        for name in self.expected(state, place):
            models = [reply.payload.arrays[name] for reply in replies]
            shares = [1 - scale * len(models)] + [scale] * len(models)
            merged[name] = weighted_sum([state.arrays[name], *models], shares)
        return Payload({**state.arrays, **merged}, state.meta)
