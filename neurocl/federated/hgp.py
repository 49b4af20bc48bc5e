"""HGP: prompts and head are averaged, then the head is re-trained on draws from the mixtures of all classes seen."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.network import Classifier
from neurocl.federated.problem import Problem
from neurocl.federated.prompts import Init, PrefixAttention, ShiftedInput, with_prompts
from neurocl.federated.prototypes import Prototypes, PrototypesConfig
from neurocl.federated.randomness import torch_stream

Length = Annotated[int, Field(ge=0, multiple_of=2)]


class PromptConfig(FedAvgConfig):
    """Of prompt tuning.

    Attributes:
        length: extra keys and values of each block, together; None for 200, or 8 in a transformer smaller than ViT-B.
        blocks: how many of a transformer's first blocks have a prompt; None for 5, or 2 in a smaller one.
        init: how prompts begin; the published code begins at zeros, which dilute the attention's output at first.
        weights: clients count by their samples, or all the same.
        train: the prompts and the head; the backbone stays as it is.
        backbone_lr: learning rate of the prompts as a share of the head's.
    """

    length: Length | None = None
    blocks: Annotated[int, Field(ge=1)] | None = None
    init: Init = "zeros"
    train: Literal["head"] = "head"


class HgpConfig(PrototypesConfig):
    """Of HGP: the options of ``prompt`` and those of re-training the head.

    Attributes:
        length: as for ``prompt``.
        blocks: as for ``prompt``.
        init: as for ``prompt``.
        train: the prompts and the head; the backbone stays as it is.
        variance_factor: the published constant is 3.
    """

    length: Length | None = None
    blocks: Annotated[int, Field(ge=1)] | None = None
    init: Init = "zeros"
    train: Literal["head"] = "head"
    variance_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3.0


def prompted(problem: Problem, config: PromptConfig | HgpConfig) -> Classifier:
    """The problem's network with prompts at their beginning."""
    network = problem.network()
    with_prompts(
        network,
        problem.source.train.x.shape[1:],
        length=config.length,
        blocks=config.blocks,
        init=config.init,
        generator=torch_stream(problem.config.seed, "prompts", 0),
    )
    return network.to(problem.config.device)


def prompt_names(network: Classifier) -> list[str]:
    """Names of the parameters that belong to prompts."""
    own = {id(module.prompt) for module in network.modules() if isinstance(module, PrefixAttention)}
    own |= {id(module.shift) for module in network.modules() if isinstance(module, ShiftedInput)}
    return [name for name, value in network.named_parameters() if id(value) in own]


class Prompt(FedAvg):
    """FedAvg of prompts and head over a frozen backbone."""

    Config = PromptConfig
    config: PromptConfig

    def network(self) -> Classifier:
        return prompted(self.problem, self.config)

    def trained(self, network: Classifier) -> list[str]:
        return network.head_names() + prompt_names(network)


class Hgp(Prototypes):
    """Hierarchical generative prototypes: client Gaussians, class mixtures, all classes.

    Gaussians of finished tasks describe features under the prompts of their time; prompts move the features little,
    so they still serve.

    Reference: Salami et al., "Federated class-incremental learning with hierarchical generative prototypes", 2024,
    arXiv 2406.02447.
    """

    Config = HgpConfig
    config: HgpConfig

    def network(self) -> Classifier:
        return prompted(self.problem, self.config)

    def trained(self, network: Classifier) -> list[str]:
        return network.head_names() + prompt_names(network)
