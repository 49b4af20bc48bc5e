"""Prompts: a few learnable numbers in front of a frozen backbone, without a change to the backbone's own code.

``B`` batch, ``R`` tokens, ``D`` width, ``h`` heads, ``L`` prompt length.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurocl.backbones.vit import Attention, VisionTransformer
from neurocl.errors import UserError
from neurocl.federated.network import Classifier

Init = Literal["zeros", "uniform", "orthonormal"]
#: width of ViT-B
LARGE_WIDTH = 768


class PrefixAttention(nn.Module):
    """Self-attention with extra keys and values that are the same for all samples: prefix tuning.

    Keys and values [L / 2, D] are cut into heads like the others, not projected, and put in front of them; queries stay
    as they are. Zeros are not neutral: zero keys draw their share of the attention and zero values dilute the output.

    Args:
        attention: of a block; its parameters are used as they are.
        prompt: [L, D], first half keys, second half values.

    Reference: Li and Liang, "Prefix-tuning", ACL 2021, arXiv 2101.00190; Wang et al., "DualPrompt", ECCV 2022,
    arXiv 2204.04799.
    """

    def __init__(self, attention: Attention, prompt: Tensor) -> None:
        super().__init__()
        self.attention = attention
        self.prompt = nn.Parameter(prompt)

    def forward(self, x: Tensor) -> Tensor:
        return prefixed(self.attention, x, self.prompt.expand(len(x), -1, -1))


def prefixed(attention: Attention, x: Tensor, prompt: Tensor) -> Tensor:
    """Self-attention of x [B, R, D] with extra keys and values.

    Args:
        attention: of a block.
        x: its input.
        prompt: [B, L, D], first half keys, second half values.
    """
    batch, tokens, width = x.shape
    heads = attention.heads
    qkv = attention.qkv(x).view(batch, tokens, 3, heads, width // heads)
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
    extra = prompt.reshape(batch, 2, prompt.shape[1] // 2, heads, width // heads).permute(1, 0, 3, 2, 4)
    mixed = F.scaled_dot_product_attention(
        queries, torch.cat([extra[0], keys], dim=2), torch.cat([extra[1], values], dim=2)
    )
    out: Tensor = attention.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
    return out


class ShiftedInput(nn.Module):
    """A backbone that sees ``x + shift``: what a prompt is for a perceptron, which has no attention.

    Args:
        backbone: from samples to features.
        shift: shape of one sample.
    """

    def __init__(self, backbone: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.shift = nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.backbone(x + self.shift)
        return out


def initial_prompt(rows: int, columns: int, init: Init, generator: torch.Generator) -> Tensor:
    """Numbers [rows, columns]: zeros, uniform within 1 / sqrt(columns), or orthonormal rows (columns if fewer)."""
    if init == "zeros":
        return torch.zeros(rows, columns)
    if init == "uniform":
        return (2 * torch.rand(rows, columns, generator=generator) - 1) / math.sqrt(columns)
    drawn = torch.randn(max(rows, columns), min(rows, columns), dtype=torch.float64, generator=generator)
    span: Tensor = torch.linalg.qr(drawn).Q.float()
    return (span if rows >= columns else span.mT).contiguous()


def with_prompts(
    network: Classifier,
    sample: torch.Size,
    *,
    length: int | None,
    blocks: int | None,
    init: Init,
    generator: torch.Generator,
) -> list[str]:
    """Freeze the backbone and put prompts on it, in place: prefixes in a Vision Transformer, else a shift of the input.

    Args:
        network: changed.
        sample: shape of one sample.
        length: L, even; None for 200 at the width of ViT-B and above, 8 below. 0 for plain attention.
        blocks: the first so many get prompts of their own; None for 5, or 2 below the width of ViT-B.
        init: how prompts begin.
        generator: of their numbers.

    Returns: names of the prompts.
    Raises:
        UserError: more blocks than there are.
    """
    network.backbone.requires_grad_(False)
    transformers = [module for module in network.backbone.modules() if isinstance(module, VisionTransformer)]
    if not transformers:
        shift = initial_prompt(1, math.prod(sample), init, generator).view(sample)
        network.backbone = ShiftedInput(network.backbone, shift)
        return ["backbone.shift"]
    transformer = transformers[0]
    width = transformer.config.width
    large = width >= LARGE_WIDTH
    count = (5 if large else 2) if blocks is None else blocks
    if count > len(transformer.blocks):
        raise UserError(f"prompts for {count} blocks, the transformer has {len(transformer.blocks)}")
    size = (200 if large else 8) if length is None else length
    for block in transformer.blocks[:count]:
        attention = block.get_submodule("attn")
        assert isinstance(attention, Attention)
        block.register_module("attn", PrefixAttention(attention, initial_prompt(size, width, init, generator)))
    return [name for name, _ in network.named_parameters() if name.endswith(".attn.prompt")]
