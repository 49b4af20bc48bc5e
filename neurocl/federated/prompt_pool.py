"""A frozen backbone that is asked first what it sees, and then gets the prompts that a pool chooses for that.

``B`` samples, ``R`` tokens, ``D`` width of the prompts, ``d`` of the queries, ``L`` rows of a prompt, ``T`` tasks.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from neurocl.backbones.vit import Attention, VisionTransformer
from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.local_training import Loss, make_optimizer, task_loss
from neurocl.federated.method import Client, Place, Task
from neurocl.federated.network import Classifier
from neurocl.federated.payload import Payload
from neurocl.federated.prompts import prefixed
from neurocl.federated.randomness import torch_stream

#: prompts of a perceptron shift its input, whose numbers are about one
SHIFT_SCALE = 0.1


@dataclass
class Choice:
    """What a pool chose.

    Attributes:
        tokens: put in front of the samples' own, [B, L, D].
        prefixes: by block, keys and values of its attention, [B, L, D].
        closeness: how near the chosen keys are to the queries: cosines, summed over keys, mean over samples.
    """

    tokens: Tensor | None = None
    prefixes: dict[int, Tensor] = field(default_factory=dict)
    closeness: Tensor | None = None


class Pool(nn.Module):
    """Base class of pools.

    Attributes:
        task: that is trained; None when forecasts are asked for.
        seen: number of tasks that have been learnt or begun.
    """

    def __init__(self) -> None:
        super().__init__()
        self.task: int | None = None
        self.seen = 1

    @abstractmethod
    def forward(self, query: Tensor) -> Choice:
        """Queries [B, d] -> prompts."""


@dataclass(frozen=True)
class Sizes:
    """What a pool must fit: query size d, width of prompts D, blocks of the transformer, tasks; scale of the start."""

    query: int
    width: int
    depth: int
    tasks: int
    scale: float


class PromptedTransformer(nn.Module):
    """A Vision Transformer that is run twice: plainly for the query, its normalised class token; then with prompts."""

    def __init__(self, transformer: VisionTransformer, pool: Pool) -> None:
        super().__init__()
        self.transformer = transformer
        self.pool = pool
        self.closeness: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = self._embedded(x)
            query = self.transformer.norm(self._blocks(tokens, {}))[:, 0]
        choice: Choice = self.pool(query)
        self.closeness = choice.closeness
        count = 0
        if choice.tokens is not None:
            count = choice.tokens.shape[1]
            tokens = torch.cat([tokens[:, :1], choice.tokens, tokens[:, 1:]], dim=1)
        seen = self.transformer.norm(self._blocks(tokens, choice.prefixes))
        out: Tensor = self.transformer.head(seen[:, 1 : 1 + count].mean(dim=1) if count else seen[:, 0])
        return out

    def _embedded(self, x: Tensor) -> Tensor:
        transformer = self.transformer
        x = transformer.patch_embed(x)
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
        return torch.cat([transformer.cls_token.expand(len(x), -1, -1), x], dim=1) + transformer.pos_embed

    def _blocks(self, x: Tensor, prefixes: dict[int, Tensor]) -> Tensor:
        for index, block in enumerate(self.transformer.blocks):
            attention, normed = block.get_submodule("attn"), block.get_submodule("norm1")(x)
            assert isinstance(attention, Attention)
            x = x + (prefixed(attention, normed, prefixes[index]) if index in prefixes else attention(normed))
            x = x + block.get_submodule("mlp")(block.get_submodule("norm2")(x))
        return x


class PromptedInput(nn.Module):
    """A backbone without attention: its features are the query, and the mean of all chosen rows shifts its input."""

    def __init__(self, backbone: nn.Module, pool: Pool) -> None:
        super().__init__()
        self.backbone = backbone
        self.pool = pool
        self.closeness: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            query = self.backbone(x)
        choice: Choice = self.pool(query)
        self.closeness = choice.closeness
        rows = [*([choice.tokens] if choice.tokens is not None else []), *choice.prefixes.values()]
        shift = torch.stack([prompt.mean(dim=1) for prompt in rows]).sum(dim=0)
        out: Tensor = self.backbone(x + shift.view(x.shape))
        return out


class PoolConfig(FedAvgConfig):
    """Of methods with a pool of prompts.

    Attributes:
        weights: clients count by their samples, or all the same.
        train: the prompts and the head; the backbone stays as it is.
        backbone_lr: learning rate of the prompts as a share of the head's.
        lr: of the head where the run sets none.
        pull: how much the chosen keys are pulled to the queries.
    """

    train: Literal["head"] = "head"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    pull: Annotated[float, Field(ge=0)] = 0.0


class PoolMethod(FedAvg):
    """Base class: pool and head are trained and averaged, number by number, as the federated reference code does."""

    Config = PoolConfig
    config: PoolConfig
    needs_blocks: ClassVar[tuple[int, ...]] = ()
    reveals = "the client's trained prompts, keys and head and its number of samples"

    @abstractmethod
    def pool(self, sizes: Sizes, generator: torch.Generator) -> Pool:
        """A new pool."""

    def network(self) -> Classifier:
        network: Classifier = self.problem.network()
        network.backbone.requires_grad_(False)
        tasks, generator = len(self.problem.tasks), torch_stream(self.problem.config.seed, "prompt pool", 0)
        found = [
            (name, module) for name, module in network.backbone.named_modules() if isinstance(module, VisionTransformer)
        ]
        if not found:
            width = math.prod(self.problem.source.train.x.shape[1:])
            sizes = Sizes(network.head.in_features, width, 1, tasks, SHIFT_SCALE)
            network.backbone = PromptedInput(network.backbone, self.pool(sizes, generator))
            return network.to(self.problem.config.device)
        name, transformer = found[0]
        config = transformer.config
        sizes = Sizes(config.width, config.width, config.depth, tasks, 1.0)
        prompted = PromptedTransformer(transformer, self.pool(sizes, generator))
        if name:
            parent, _, own = name.rpartition(".")
            setattr(network.backbone.get_submodule(parent), own, prompted)
        else:
            network.backbone = prompted
        return network.to(self.problem.config.device)

    def trained(self, network: Classifier) -> list[str]:
        pool = {id(value) for value in prompted_of(network).pool.parameters()}
        return network.head_names() + [name for name, value in network.named_parameters() if id(value) in pool]

    def optimizer(self, network: Classifier) -> torch.optim.Optimizer:
        config = self.problem.config
        lr = self.config.lr if config.lr is None else config.lr
        pool = list(prompted_of(network).pool.parameters())
        # What decays is for after_step to say: prompts and rows of the head that get no gradient must stay as they are.
        groups = [
            {"params": list(network.head.parameters()), "lr": lr},
            {"params": pool, "lr": lr * self.config.backbone_lr},
        ]
        return make_optimizer(config.optimizer, groups, lr)

    def after_step(
        self, network: Classifier, client: Client, place: Place, message: Payload
    ) -> Callable[[], None] | None:
        """Weight decay of the prompts and keys that got a gradient in this step, the others being of other tasks."""
        config = self.problem.config
        if not config.weight_decay:
            return None
        lr = self.config.lr if config.lr is None else config.lr
        kept = 1 - lr * self.config.backbone_lr * config.weight_decay
        pool = list(prompted_of(network).pool.parameters())

        @torch.no_grad()
        def decay() -> None:
            for parameter in pool:
                if parameter.grad is not None:
                    parameter[parameter.grad.flatten(1).any(dim=1)] *= kept

        return decay

    def loss(self, network: Classifier, client: Client, place: Place, message: Payload) -> Loss:
        prompted = prompted_of(network)
        prompted.pool.task, prompted.pool.seen = place.task.index, place.task.index + 1
        scores = task_loss(network, place.task)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            total = scores(x, y)
            if self.config.pull and prompted.closeness is not None:
                total = total - self.config.pull * prompted.closeness
            return total

        return loss

    def model(self, state: Payload, task: Task) -> Classifier:
        network = self.loaded(state)
        pool = prompted_of(network).pool
        pool.task, pool.seen = None, task.index + 1
        return network


def prompted_of(network: Classifier) -> PromptedTransformer | PromptedInput:
    """The module with the pool."""
    return next(m for m in network.modules() if isinstance(m, PromptedTransformer | PromptedInput))


def cosines(query: Tensor, keys: Tensor) -> Tensor:
    """Of queries [B, d] and keys [M, d]: [B, M]."""
    return F.normalize(query, dim=1) @ F.normalize(keys, dim=1).mT


def uniform(*shape: int, scale: float, generator: torch.Generator) -> nn.Parameter:
    """Numbers between -scale and scale."""
    return nn.Parameter(torch.empty(shape).uniform_(-scale, scale, generator=generator))
