"""CODA-Prompt: prompts are sums of components, weighted by how a sample looks through each component's attention.

``M`` components of ``L`` rows and width ``D``; queries of size ``d``; ``T`` tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from neurocl.errors import UserError
from neurocl.federated.local_training import Loss
from neurocl.federated.method import Client, Place, Task
from neurocl.federated.network import Classifier
from neurocl.federated.payload import Payload, arrays_of
from neurocl.federated.prompt_pool import Choice, Pool, PoolConfig, PoolMethod, Sizes, prompted_of
from neurocl.federated.randomness import torch_stream

LARGEST_POOL = 100


class CodaPromptConfig(PoolConfig):
    """Of CODA-Prompt.

    Attributes:
        weights: clients count by their samples, or all the same.
        train: the prompts and the head; the backbone stays as it is.
        backbone_lr: learning rate of the prompts as a share of the head's.
        lr: of the head where the run sets none.
        pull: of no meaning here: keys learn through the weights of their components.
        pool: M, of which every task brings M / T; None for 100, or as many as can be orthogonal.
        length: L, even: half keys, half values.
        blocks: the first so many have prompts.
        orthogonal: how much components, keys and attentions are kept orthogonal while they learn; they begin so.
    """

    pool: Annotated[int, Field(ge=1)] | None = None
    length: Annotated[int, Field(ge=2, multiple_of=2)] = 8
    blocks: Annotated[int, Field(ge=1)] = 5
    orthogonal: Annotated[float, Field(ge=0)] = 0.0


class Components(nn.Module):
    """Those of one block: prompts [M, L D], keys and attentions [M, d]."""

    def __init__(self, count: int, length: int, sizes: Sizes) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.zeros(count, length * sizes.width))
        self.keys = nn.Parameter(torch.zeros(count, sizes.query))
        self.attentions = nn.Parameter(torch.zeros(count, sizes.query))

    def forward(self, query: Tensor, old: int, now: int) -> Tensor:
        """Rows [B, L D] of the components up to ``now``, of which the first ``old`` do not learn."""
        prompts, keys, attentions = (
            torch.cat([value[:old].detach(), value[old:now]]) for value in (self.prompts, self.keys, self.attentions)
        )
        looked = F.normalize(query[:, None] * attentions, dim=2)  # [B, M, d]
        weights = (looked * F.normalize(keys, dim=1)).sum(dim=2)
        return weights @ prompts

    def penalty(self, old: int, now: int) -> Tensor:
        """How far all three are from orthonormal rows."""
        total = self.keys.new_zeros(())
        for value in (self.prompts, self.keys, self.attentions):
            rows = torch.cat([value[:old].detach(), value[old:now]])
            total = total + (rows @ rows.mT - torch.eye(now).to(rows)).square().mean()
        return total


class ComponentPool(Pool):
    """The components of every block; those of later tasks are not used yet."""

    def __init__(self, config: CodaPromptConfig, sizes: Sizes) -> None:
        super().__init__()
        self.length, self.width = config.length, sizes.width
        most = min(LARGEST_POOL, sizes.query, config.length * sizes.width)
        self.each = (most if config.pool is None else config.pool) // sizes.tasks
        if not self.each:
            raise UserError(f"a pool of {config.pool or most} components has none for each of {sizes.tasks} tasks")
        if self.each * sizes.tasks > min(sizes.query, config.length * sizes.width):
            raise UserError(f"{config.pool} components cannot be orthogonal among queries of {sizes.query} numbers")
        count = min(config.blocks, sizes.depth)
        self.blocks = nn.ModuleList(Components(self.each * sizes.tasks, config.length, sizes) for _ in range(count))

    @property
    def learning(self) -> tuple[int, int]:
        """Components of earlier tasks, and these with those of the current one."""
        now = self.each * self.seen
        return (now if self.task is None else self.each * self.task), now

    def forward(self, query: Tensor) -> Choice:
        found = {
            index: block(query, *self.learning).view(len(query), self.length, self.width)
            for index, block in enumerate(self.blocks)
        }
        return Choice(prefixes=found)


class CodaPrompt(PoolMethod):
    """FedAvg of prompt components, their keys and attentions, and the head; every task adds components.

    Reference: Smith et al., "CODA-Prompt: continual decomposed attention-based prompting for rehearsal-free continual
    learning", CVPR 2023, arXiv 2211.13218.
    """

    Config = CodaPromptConfig
    config: CodaPromptConfig

    def pool(self, sizes: Sizes, generator: torch.Generator) -> Pool:
        return ComponentPool(self.config, sizes)

    def begin_task(self, state: Payload, task: Task) -> Payload:
        """New components: orthonormal, and orthogonal to all earlier ones."""
        network = self.loaded(state)
        pool = prompted_of(network).pool
        assert isinstance(pool, ComponentPool)
        start, stop = pool.each * task.index, pool.each * (task.index + 1)
        generator = torch_stream(self.problem.config.seed, "prompt components", task.index)
        learnt = {id(value) for value in pool.parameters()}
        fresh = {}
        for name, value in network.named_parameters():
            if id(value) in learnt:
                rows = value.detach().cpu().clone()
                rows[start:stop] = orthonormal_rows(rows[:start], stop - start, generator)
                fresh[name] = rows
        return Payload({**state.arrays, **arrays_of(fresh)}, state.meta)

    def loss(self, network: Classifier, client: Client, place: Place, message: Payload) -> Loss:
        plain = super().loss(network, client, place, message)
        pool = prompted_of(network).pool
        assert isinstance(pool, ComponentPool)
        blocks: Sequence[nn.Module] = list(pool.blocks)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            total = plain(x, y)
            if self.config.orthogonal:
                for block in blocks:
                    assert isinstance(block, Components)
                    total = total + self.config.orthogonal * block.penalty(*pool.learning)
            return total

        return loss


def orthonormal_rows(before: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """New rows [count, D] of length one, orthogonal to each other and to the span of the rows [b, D] before."""
    drawn = torch.randn(before.shape[1], count, dtype=torch.float64, generator=generator)
    if len(before):
        span = torch.linalg.qr(before.double().mT).Q
        drawn = drawn - span @ (span.mT @ drawn)
    rows: Tensor = torch.linalg.qr(drawn).Q.mT
    return rows.to(before.dtype)
