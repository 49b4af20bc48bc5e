"""L2P: each sample takes the prompts of a shared pool whose keys are nearest to it.

``M`` prompts of ``L`` rows and width ``D``; queries of size ``d``.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from neurocl.federated.prompt_pool import Choice, Pool, PoolConfig, PoolMethod, Sizes, cosines, uniform


class L2pConfig(PoolConfig):
    """Of L2P.

    Attributes:
        weights: clients count by their samples, or all the same.
        train: the prompts and the head; the backbone stays as it is.
        backbone_lr: learning rate of the prompts as a share of the head's.
        lr: of the head where the run sets none.
        pull: how much the chosen keys are pulled to the queries, 0.5 in the paper. The federated reference code has
            none, so that its keys stay as they were drawn.
        pool: M.
        length: L.
        chosen: prompts for each sample.
    """

    pull: Annotated[float, Field(ge=0)] = 0.5
    pool: Annotated[int, Field(ge=1)] = 10
    length: Annotated[int, Field(ge=1)] = 5
    chosen: Annotated[int, Field(ge=1)] = 5

    @model_validator(mode="after")
    def _enough(self) -> L2pConfig:
        if self.chosen > self.pool:
            raise ValueError(f"chosen must be at most pool, got {self.chosen} of {self.pool}")
        return self


class NearestPrompts(Pool):
    """The prompts with the nearest keys, put in front of a sample's tokens, whose outputs are then averaged."""

    def __init__(self, config: L2pConfig, sizes: Sizes, generator: torch.Generator) -> None:
        super().__init__()
        self.chosen = config.chosen
        self.prompts = uniform(config.pool, config.length, sizes.width, scale=sizes.scale, generator=generator)
        self.keys = uniform(config.pool, sizes.query, scale=1.0, generator=generator)

    def forward(self, query: Tensor) -> Choice:
        nearest = cosines(query, self.keys).topk(self.chosen, dim=1)
        return Choice(tokens=self.prompts[nearest.indices].flatten(1, 2), closeness=nearest.values.sum(dim=1).mean())


class L2p(PoolMethod):
    """FedAvg of a pool of prompts, its keys and the head.

    Reference: Wang et al., "Learning to prompt for continual learning", CVPR 2022, arXiv 2112.08654.
    """

    Config = L2pConfig
    config: L2pConfig

    def pool(self, sizes: Sizes, generator: torch.Generator) -> Pool:
        return NearestPrompts(self.config, sizes, generator)
