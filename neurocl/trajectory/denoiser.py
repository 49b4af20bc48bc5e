"""Stage 2: the network that guesses clean codes from noisy ones and the past, and the trunk that all priors share.

``N`` samples, ``S`` scenes, ``A`` agents, ``T_p`` predicted steps, ``d`` width, ``K`` codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from neurocl.config import Config
from neurocl.trajectory.blocks import LayerMemory, SceneStack, being_exported, sinusoidal_positions, xavier_
from neurocl.trajectory.vqvae import Context

FASTEST_TIME = 4000.0


class TrunkConfig(Config):
    """Shape of the networks of stage 2.

    Attributes:
        num_predicted: T_p.
        context_width: width of the past tokens of stage 1.
        width: d.
        heads: of every attention; four are twice as fast as eight.
        hidden: width inside feed-forward parts.
        layers: over the future.
        context_layers: over the past.
        dropout: in all of them.
        agent_attention: the futures of the agents of a scene see each other: joint forecasts.
        geometry: relative positions and velocities enter attention among agents.
    """

    num_predicted: Annotated[int, Field(ge=1)] = 12
    context_width: Annotated[int, Field(ge=2)] = 64
    width: Annotated[int, Field(ge=4, multiple_of=2)] = 64
    heads: Annotated[int, Field(ge=1)] = 4
    hidden: Annotated[int, Field(ge=1)] = 128
    layers: Annotated[int, Field(ge=1)] = 1
    context_layers: Annotated[int, Field(ge=1)] = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    agent_attention: bool = True
    geometry: bool = True

    @model_validator(mode="after")
    def _fits(self) -> TrunkConfig:
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, got {self.heads} and {self.width}")
        return self

    @classmethod
    def faithful(cls, **options: Any) -> TrunkConfig:
        """The prior of the paper: agents forecast apart, no geometry, eight heads."""
        return cls(**{"heads": 8, "agent_attention": False, "geometry": False} | options)


@dataclass(frozen=True)
class Memory:
    """What the trunk keeps of the past, computed once however many samples and steps follow.

    Attributes:
        layers: prepared keys, values and geometry of each layer over the future.
        present: agents whose futures may be seen by others, bool [S, A, 1], or None for all.
    """

    layers: list[LayerMemory]
    present: Tensor | None


class FutureTrunk(nn.Module):
    """An encoder of the past, and layers over the future that look at it.

    Args:
        config: the shape.
        num_times: diffusion times; 0 for a trunk without time.
        causal: a step sees only itself and earlier ones.
    """

    positions: Tensor
    frequencies: Tensor

    def __init__(self, config: TrunkConfig, *, num_times: int = 0, causal: bool = False) -> None:
        super().__init__()
        self.config = config
        self.num_times = num_times
        width = config.width
        narrow = config.context_width == width
        self.adapt: nn.Module = nn.Identity() if narrow else nn.Linear(config.context_width, width)
        shape = width, config.heads, config.hidden, config.dropout
        self.past = SceneStack(config.context_layers, *shape, geometry=config.geometry)
        self.future = SceneStack(
            config.layers,
            *shape,
            cross=True,
            agents=config.agent_attention,
            geometry=config.geometry,
            adaptive=num_times > 0,
            causal=causal,
        )
        self.register_buffer("positions", sinusoidal_positions(config.num_predicted, width), persistent=False)
        half = width // 2
        rate = math.log(max(num_times, 2)) / (half - 1)
        self.register_buffer("frequencies", torch.exp(-rate * torch.arange(half)), persistent=False)

    def prepare(self, context: Context, hidden: Tensor | None = None) -> Memory:
        """Encode the past and project it for all samples.

        Args:
            context: from stage 1, without gradients.
            hidden: scenes whose agents do not see their own pasts, bool [S], for guidance.
        """
        absorb = not self.training
        everyone, count = context.everyone, context.present.shape[1]
        tokens = self.adapt(everyone.embedded)[:, :, None]
        related = everyone.related if self.config.geometry else None
        memory = self.past.prepare(tokens[:, :, 0], None, related)
        tokens = self.past(tokens, memory, time_mask=everyone.seen, agent_mask=everyone.seen)[:, :count, 0]
        related = context.related if self.config.geometry else None
        seen = context.seen
        if hidden is not None:
            seen = seen & ~hidden[:, None, None]
        present: Tensor | None = context.present[..., None]
        allowed: Tensor | None = seen
        # Attention is faster without a mask; a graph that is exported has to keep it.
        if absorb and not being_exported():
            present = None if bool(context.present.all()) else present
            allowed = None if bool(seen.all()) else seen
        return Memory(self.future.prepare(tokens, allowed, related, absorb=absorb), present)

    def forward(self, x: Tensor, memory: Memory, t: Tensor | None = None) -> Tensor:
        """Futures [S, A, N, T, d] through the layers.

        Args:
            x: embedded futures, without positions; T at most T_p.
            memory: from :meth:`prepare`.
            t: diffusion times, without dimensions, or [S, A] or [S, 1]; None for a trunk without time.
        """
        condition = None
        if t is not None:
            condition = self.time_embedding(t)
            if t.ndim:
                condition = condition[:, :, None, None]
        x = x + self.positions[: x.shape[3]]
        out: Tensor = self.future(x, memory.layers, agent_mask=memory.present, condition=condition)
        return out

    def time_embedding(self, t: Tensor) -> Tensor:
        """Sines and cosines of times [...]: [..., d]."""
        angle = t[..., None] / self.num_times * FASTEST_TIME * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class CodeDenoiser(nn.Module):
    """p(clean codes | noisy codes, past): embedding, trunk, logits.

    Args:
        config: of the trunk.
        num_codes: K; the mask is code number K.
        num_steps: diffusion steps.

    Reference: Gu et al., "Vector quantized diffusion model for text-to-image synthesis", CVPR 2022, arXiv 2111.14822.
    """

    def __init__(self, config: TrunkConfig, num_codes: int, num_steps: int = 100) -> None:
        super().__init__()
        self.codes = CodeEmbedding(num_codes + 1, config.width)
        self.trunk = FutureTrunk(config, num_times=num_steps)
        self.logits = nn.Linear(config.width, num_codes)
        xavier_(self)

    def prepare(self, context: Context, hidden: Tensor | None = None) -> Memory:
        """See :meth:`FutureTrunk.prepare`."""
        return self.trunk.prepare(context, hidden)

    def forward(self, x_t: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """Logits of the clean codes.

        Args:
            x_t: tokens, int64 [N, S, A, T_p], or [S, A, T_p] for one sample of each scene.
            t: times, without dimensions, or [S, A] or [S, 1].
            memory: from :meth:`prepare`.
        Returns: [N, S, A, T_p, K], or without N.
        """
        sampled = x_t.ndim == 4
        tokens = x_t.permute(1, 2, 0, 3) if sampled else x_t[:, :, None]
        out: Tensor = self.logits(self.trunk(self.codes(tokens), memory, t))
        return out.permute(2, 0, 1, 3, 4) if sampled else out[:, :, 0]


class CodeEmbedding(nn.Module):
    """Embedding followed by a linear map times sqrt(d), worked out per code rather than per token."""

    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_codes, width)
        # The factor below brings this to the size of the positions; larger codes would drown them.
        nn.init.xavier_uniform_(self.table.weight)
        self.linear = nn.Linear(width, width)

    def forward(self, codes: Tensor) -> Tensor:
        """int64 [...] -> [..., d]."""
        mapped = self.linear(self.table.weight) * math.sqrt(self.linear.out_features)
        return nn.functional.embedding(codes, mapped)
