"""The network of a federated run: a backbone, a linear head over all classes, and adapters of its linear layers.

``B`` batch, ``C`` classes, ``d`` features, ``o`` outputs and ``i`` inputs of a linear layer, ``r`` rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurocl.errors import UserError

HEAD_WEIGHT, HEAD_BIAS = "head.weight", "head.bias"


class Classifier(nn.Module):
    """Samples [B, ...] -> features [B, d] -> logits [B, C].

    Args:
        backbone: from samples to features.
        num_features: d.
        num_classes: C, of all tasks.
    """

    def __init__(self, backbone: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, d]."""
        out: Tensor = self.backbone(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits

    def head_names(self) -> list[str]:
        """Names of the head's parameters."""
        return [HEAD_WEIGHT, HEAD_BIAS]

    def backbone_names(self) -> list[str]:
        """Names of all other parameters."""
        return [name for name, _ in self.named_parameters() if not name.startswith("head.")]


class LoraLinear(nn.Module):
    """A frozen linear layer plus B A, without the scaling of the original: W x + b + B A x.

    Args:
        layer: the layer that is adapted; its parameters are frozen.
        rank: r.

    ``lora_A`` [r, i] starts Kaiming-uniform, ``lora_B`` [o, r] at zero.
    Reference: Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022, arXiv 2106.09685.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(rank, layer.in_features))
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)
        return out


def linear_layers(network: Classifier) -> dict[str, nn.Linear]:
    """The linear layers of the backbone by name, in order: the places of LoRA."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and name != "head"}


def with_lora(network: Classifier, rank: int, places: Sequence[str] = ()) -> list[str]:
    """Freeze the backbone and put LoRA on its linear layers, in place.

    Args:
        network: changed.
        rank: r.
        places: parts of names, such as ``attn.qkv``; empty for every linear layer of the backbone.

    Returns: names of the adapted layers.
    Raises:
        UserError: no linear layer has such a name.
    """
    for parameter in network.backbone.parameters():
        parameter.requires_grad_(False)
    found = [name for name in linear_layers(network) if not places or any(place in name for place in places)]
    if not found:
        raise UserError(f"no linear layer of the backbone is called {' or '.join(places)}")
    for name in found:
        parent, _, own = name.rpartition(".")
        owner = network.get_submodule(parent)
        setattr(owner, own, LoraLinear(getattr(owner, own), rank))
    return found


def parameters_of(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The named parameters, by name."""
    own = dict(network.named_parameters())
    return {name: own[name] for name in names}


@torch.no_grad()
def load(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters and buffers of the same names.

    Raises:
        UserError: a name that the network does not have, or another shape.
    """
    own = dict(network.named_parameters()) | dict(network.named_buffers())
    for name, value in tensors.items():
        if name not in own or own[name].shape != value.shape:
            have = f"has {list(own[name].shape)}" if name in own else "does not have it"
            raise UserError(f"{name} {list(value.shape)} does not fit the network, which {have}")
        own[name].copy_(value)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[nn.Module]:
    """Eval mode without gradients, and back."""
    was = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield network
    finally:
        network.train(was)
