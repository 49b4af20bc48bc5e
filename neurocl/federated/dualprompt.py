"""DualPrompt: prompts that all tasks share in the first blocks, and prompts of one task each in later ones.

``L`` keys and as many values of a prompt; ``D`` width, ``d`` size of queries, ``T`` tasks.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from neurocl.errors import UserError
from neurocl.federated.prompt_pool import Choice, Pool, PoolConfig, PoolMethod, Sizes, cosines, uniform

Blocks = tuple[Annotated[int, Field(ge=0)], ...]


class DualPromptConfig(PoolConfig):
    """Of DualPrompt.

    Attributes:
        weights: clients count by their samples, or all the same.
        train: the prompts and the head; the backbone stays as it is.
        backbone_lr: learning rate of the prompts as a share of the head's.
        lr: of the head where the run sets none.
        pull: how much the task's key is pulled to the queries, 1 in the paper. The federated reference code has none,
            so that its keys stay as they were drawn.
        general_length: keys, and as many values, of the shared prompts.
        expert_length: of those of a task.
        general_blocks: with shared prompts; blocks that the transformer does not have are left out.
        expert_blocks: with a task's prompts.
    """

    lr: Annotated[float, Field(gt=0)] = 5e-3
    pull: Annotated[float, Field(ge=0)] = 1.0
    general_length: Annotated[int, Field(ge=1)] = 5
    expert_length: Annotated[int, Field(ge=1)] = 20
    general_blocks: Blocks = (0, 1)
    expert_blocks: Blocks = (2, 3, 4)


class DualPrompts(Pool):
    """Training is told the task; a forecast takes the seen task whose key is nearest."""

    def __init__(self, config: DualPromptConfig, sizes: Sizes, generator: torch.Generator) -> None:
        super().__init__()
        transformer = sizes.depth > 1
        self.general_blocks = [block for block in config.general_blocks if block < sizes.depth or not transformer]
        self.expert_blocks = [block for block in config.expert_blocks if block < sizes.depth or not transformer]
        if not self.expert_blocks:
            raise UserError(f"the transformer has {sizes.depth} blocks, none of them in expert_blocks")
        general, expert = 2 * config.general_length, 2 * config.expert_length
        if not transformer:
            # A perceptron has one place for either kind.
            self.general_blocks, self.expert_blocks = self.general_blocks[:1], self.expert_blocks[:1]
        rows = {"scale": sizes.scale, "generator": generator}
        self.general = nn.ParameterList(uniform(general, sizes.width, **rows) for _ in self.general_blocks)  # type: ignore[arg-type]
        self.expert = nn.ParameterList(uniform(sizes.tasks, expert, sizes.width, **rows) for _ in self.expert_blocks)  # type: ignore[arg-type]
        self.keys = uniform(sizes.tasks, sizes.query, scale=1.0, generator=generator)

    def forward(self, query: Tensor) -> Choice:
        near = cosines(query, self.keys[: self.seen])
        task = near.argmax(dim=1) if self.task is None else torch.full_like(near[:, 0], self.task, dtype=torch.int64)
        prefixes = {
            block: prompt.expand(len(query), -1, -1)
            for block, prompt in zip(self.general_blocks, self.general, strict=True)
        }
        for block, prompt in zip(self.expert_blocks, self.expert, strict=True):
            prefixes[block] = torch.cat([*([prefixes[block]] if block in prefixes else []), prompt[task]], dim=1)
        return Choice(prefixes=prefixes, closeness=near.gather(1, task[:, None]).mean())


class DualPrompt(PoolMethod):
    """FedAvg of shared and of tasks' prompts, of the tasks' keys and the head.

    Reference: Wang et al., "DualPrompt: complementary prompting for rehearsal-free continual learning", ECCV 2022,
    arXiv 2204.04799.
    """

    Config = DualPromptConfig
    config: DualPromptConfig

    def pool(self, sizes: Sizes, generator: torch.Generator) -> Pool:
        return DualPrompts(self.config, sizes, generator)
