"""A plain pre-norm Vision Transformer over pixels or over ready-made tokens.

``B`` batch, ``C`` channels, ``R`` tokens with the class token, ``D`` width, ``E`` embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from neurocl.config import Config
from neurocl.errors import UserError


class VitConfig(Config):
    """Size of a :class:`VisionTransformer`.

    Attributes:
        input_shape: pictures (channels, height, width), or tokens (count, features).
        patch_size: side of a patch in pixels; of no meaning for tokens.
        width: D, a multiple of ``heads``.
        depth: number of blocks.
        heads: attention heads.
        embed_dim: E, size of the output.
        mlp_ratio: hidden width of the MLP over ``width``.
    """

    input_shape: tuple[int, ...]
    patch_size: int = 8
    width: int = 192
    depth: int = 6
    heads: int = 3
    embed_dim: int = 192
    mlp_ratio: int = 4


class Attention(nn.Module):
    """Multi-head self-attention; queries, keys and values from one projection, laid out (3, heads, D / heads)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        out: torch.Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return out


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and around a shortcut."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_ratio * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """Pictures [B, C, H, W] or tokens [B, R - 1, F] to embeddings [B, E], read from the class token.

    Parameter names follow timm: ``patch_embed``, ``cls_token``, ``pos_embed``, ``blocks.N.attn.qkv`` ...

    Raises:
        UserError: sizes that do not divide.
    Reference: Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021, arXiv 2010.11929.
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        if config.width % config.heads:
            raise UserError(f"width {config.width} is not a multiple of {config.heads} heads")
        if len(config.input_shape) == 3:
            channels, height, width = config.input_shape
            if height % config.patch_size or width % config.patch_size:
                raise UserError(f"pictures of {height} x {width} do not divide into patches of {config.patch_size}")
            tokens = (height // config.patch_size) * (width // config.patch_size)
            self.patch_embed: nn.Module = nn.Conv2d(channels, config.width, config.patch_size, stride=config.patch_size)
        else:
            tokens, features = config.input_shape
            self.patch_embed = nn.Linear(features, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + 1, config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.embed_dim, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)  # type: ignore[arg-type]
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x)
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(self.norm(x[:, 0]))
        return out
