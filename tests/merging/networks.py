"""Small networks with the layout of the reference arrays, shared by the tests that merge whole networks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import reference

Case = dict[str, Tensor]


class Mlp(nn.Module):
    """Linear layers with ReLU between them; ``fc`` holds the linear layers."""

    def __init__(self, widths: tuple[int, ...] = (6, 9, 8, 4)) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(d, o) for d, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.fc):
            x = layer(x if index == 0 else x.relu())
        return x


class Block(nn.Module):
    """Pre-norm transformer block with a fused projection laid out as (3, heads, width)."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        b, r, c = x.shape
        q, k, v = self.qkv(self.ln1(x)).reshape(b, r, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / (c // self.heads) ** 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(b, r, c))
        y: Tensor = x + self.fc2(F.gelu(self.fc1(self.ln2(x))))
        return y


class Transformer(nn.Module):
    """Linear embedding, two blocks, LayerNorm, mean over tokens, and a head if it has ``num_classes``."""

    def __init__(self, num_classes: int = 0) -> None:
        super().__init__()
        self.emb = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(Block(8, 12, 2) for _ in range(2))
        self.lnf = nn.LayerNorm(8)
        self.head = nn.Linear(8, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.lnf(x).mean(1))
        return y


def loaded(network: nn.Module, arrays: Case, prefix: str) -> Any:
    """``network`` in float64 with the arrays whose names start with ``prefix``."""
    values = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    network.double().load_state_dict(values)
    return network


def reference_arrays(name: str) -> Case:
    """A reference file without the ``x/`` in front of its names."""
    return {key.removeprefix("x/"): torch.as_tensor(value) for key, value in reference(name).items()}


def reference_networks(kind: str) -> tuple[Case, Any, list[Any], list[list[Tensor]]]:
    """Arrays, base, experts and batches (of 16 samples) of the reference ``"mlp"`` or ``"transformer"``."""
    arrays = reference_arrays(f"merging-com/{kind}")
    prefix, make = ("mlp/", Mlp) if kind == "mlp" else ("", Transformer)
    base = loaded(make(), arrays, f"{prefix}base/")
    experts = [loaded(make(), arrays, f"{prefix}expert{task}/") for task in range(3)]
    batches = [list(arrays[f"{prefix}X/{task}"].split(16)) for task in range(3)]
    return arrays, base, experts, batches


def jittered(network: nn.Module, seed: int, scale: float = 0.3) -> Any:
    """``network`` with Gaussian noise on all parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.parameters():
            value += scale * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
    return network
