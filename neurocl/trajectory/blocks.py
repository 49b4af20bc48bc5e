"""Transformer blocks on dense scenes: attention over time for each agent, over agents for each time step.

``S`` scenes, ``A`` agents (padded), ``N`` samples of one scene, ``T`` time steps, ``d`` width, ``h`` heads, ``c`` width
of a head, ``L`` queries, ``M`` keys, ``F`` features of a pair of agents. Every mask is true where a key may be seen; a
query that may see nothing gets zeros.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_RELATIONS = 8
TOKENS_ON_CPU, TOKENS_ON_GPU = 1 << 13, 1 << 20
RELATION_HIDDEN = 32


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """Sines on even and cosines on odd channels, base 10000: [length, width].

    Reference: Vaswani et al., "Attention is all you need", NeurIPS 2017, section 3.5.
    """
    position = torch.arange(length, dtype=torch.float64)[:, None]
    frequency = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10_000.0) / width))
    table = torch.zeros(length, width, dtype=torch.float64)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)[:, : width // 2]
    return table.float()


def relations(
    position: Tensor,
    velocity: Tensor,
    frame: Tensor | None = None,
    *,
    present: Tensor | None = None,
    neighbours: int = 0,
) -> Tensor:
    """What agent i sees of agent j, [S, A, A, F + 1].

    These are the displacement, its length, the relative velocity, the closing speed and j's velocity; and last a one
    where i looks at j, which it does at itself and its nearest neighbours.

    Args:
        position: of the last step, [S, A, 2], in network units.
        velocity: of the last step, [S, A, 2], in network units per step.
        frame: rotations to the axes of each agent i, [S, A, 2, 2]; None for the axes of the data.
        present: agents that are there, bool [S, A]; the others are nobody's neighbours.
        neighbours: how many agents i looks at, itself included; 0 for all.
    """
    apart = position[:, None] - position[:, :, None]
    relative = velocity[:, None] - velocity[:, :, None]
    theirs = velocity[:, None].expand_as(apart)
    distance = torch.sqrt(apart.square().sum(dim=-1, keepdim=True) + 1e-12)
    closing = -(apart * relative).sum(dim=-1, keepdim=True) / (distance + 1e-3)
    if frame is not None:
        apart, relative, theirs = apart @ frame.mT, relative @ frame.mT, theirs @ frame.mT
    visible = torch.ones_like(distance)
    if neighbours:
        far = distance[..., 0] if present is None else distance[..., 0].masked_fill(~present[:, None], torch.inf)
        # Of several at the same distance all are seen. Nobody is nearer than oneself.
        rank = (far[..., None] > far[..., None, :]).sum(dim=-1)
        visible = (rank < neighbours).to(distance.dtype)[..., None]
    return torch.cat([apart, distance, relative, closing, theirs, visible], dim=-1)


def being_exported() -> bool:
    """Whether a graph is being recorded, which must not depend on the values or the size of the example."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def xavier_(module: nn.Module) -> None:
    """Xavier-uniform matrices and zero biases in every linear layer below ``module``."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class LinearEmbedding(nn.Module):
    """Linear map to the model width, times the square root of it, with positions added.

    Args:
        inputs: width of the input.
        width: d.
        length: longest sequence, T.
        dropout: after the positions.
        scaled: multiply by the square root of the width.
    """

    positions: Tensor

    def __init__(self, inputs: int, width: int, length: int, dropout: float = 0.0, *, scaled: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)
        self.scale = math.sqrt(width) if scaled else 1.0
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("positions", sinusoidal_positions(length, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., T, inputs] -> [..., T, d]."""
        embedded: Tensor = self.dropout(self.linear(x) * self.scale + self.positions[: x.shape[-2]])
        return embedded


class CrossMemory(NamedTuple):
    """What queries need of the keys, computed once per agent however many samples will ask.

    Attributes:
        keys: [B, M, d]; or, absorbed, the map from queries to all scores, [B, h * M, d].
        values: [B, M, d]; or, absorbed, the map from attention weights to outputs, [B, h * M, d].
        bias: added to the scores, [B, h * M, 1]; None if not absorbed.
        mask: bool [B, M], or None when every key may be seen.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None
    mask: Tensor | None


class PairGeometry(NamedTuple):
    """How relative geometry enters attention among agents: as a bias on the scores, and beside the values.

    Attributes:
        bias: [S, h, A, A].
        values: [S, h, A, A, c].
    """

    bias: Tensor
    values: Tensor


class Attention(nn.Module):
    """Multi-head attention with separate maps for queries, keys, values and output, scaled by 1/sqrt(c).

    Args:
        width: d.
        heads: h, must divide d.

    Raises:
        ValueError: ``heads`` does not divide ``width``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide the width, got {heads} and {width}")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """Queries [B, L, d] look at keys [B, M, d] where ``mask`` [B, M] allows it.

        Args:
            causal: query l sees the keys up to l only; excludes ``mask``.
        """
        query, key, value = self._split(self.query(x)), self._split(self.key(memory)), self._split(self.value(memory))
        allowed = None if mask is None else mask[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, is_causal=causal)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def prepare(self, memory: Tensor, mask: Tensor | None, *, absorb: bool) -> CrossMemory:
        """Project keys [B, M, d] once for many queries.

        Args:
            mask: bool [B, M] or None.
            absorb: also multiply the maps of queries and output into them. The same numbers, but each query then
                costs two products with M * h columns instead of two with d and the attention between them: worth it
                when queries outnumber keys many times, as samples of one agent do.
        """
        key, value = self.key(memory), self.value(memory)
        if not absorb:
            return CrossMemory(key, value, None, mask)
        batch, num_keys, width = memory.shape
        heads, size = self.heads, width // self.heads
        key, value = key.view(batch, num_keys, heads, size), value.view(batch, num_keys, heads, size)
        scale = size**-0.5
        keys = torch.einsum("hcd,bmhc->bhmd", self.query.weight.view(heads, size, width) * scale, key)
        bias = torch.einsum("hc,bmhc->bhm", self.query.bias.view(heads, size) * scale, key)
        values = torch.einsum("dhc,bmhc->bhmd", self.out.weight.view(width, heads, size), value)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None], torch.finfo(bias.dtype).min)
            # Where nothing may be seen the weights are uniform, over zeros.
            values = values.masked_fill(~mask[:, None, :, None], 0)
        return CrossMemory(keys.flatten(1, 2), values.flatten(1, 2), bias.flatten(1)[..., None], mask)

    def attend(self, x: Tensor, memory: CrossMemory) -> Tensor:
        """Queries [B, L, d] look at prepared keys."""
        if memory.bias is None:
            query, key, value = self._split(self.query(x)), self._split(memory.keys), self._split(memory.values)
            allowed = None if memory.mask is None else memory.mask[:, None, None]
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
            out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
            return out
        # Scores as [B, h * M, L]: a softmax over few keys is several times faster along a long inner axis.
        scores = torch.baddbmm(memory.bias, memory.keys, x.mT)
        weights = scores.unflatten(1, (self.heads, -1)).softmax(dim=2).flatten(1, 2)
        return torch.baddbmm(self.out.bias, weights.mT, memory.values)

    def among_agents(self, x: Tensor, mask: Tensor | None, geometry: PairGeometry | None) -> Tensor:
        """Agents [S, A, R, d] look at each other, apart for each of the R rows (samples and time steps).

        Args:
            mask: agents that may be seen, bool [S, A, R or 1], or None.
            geometry: of the pairs, or None.
        """
        scenes, agents, rows, width = x.shape
        size = width // self.heads
        # The maps run on the memory as it lies; only the heads are reordered, to [S, R, h, A, c].
        query, key, value = (
            part(x).view(scenes, agents, rows, self.heads, size).permute(0, 2, 3, 1, 4)
            for part in (self.query, self.key, self.value)
        )
        # Scores as [h, A, A, S, R]: a softmax over few agents is several times faster along a long inner axis.
        scores = ((query * size**-0.5) @ key.mT).permute(2, 3, 4, 0, 1)
        if geometry is not None:
            scores = scores + geometry.bias.permute(1, 2, 3, 0)[..., None]
        scores = scores.contiguous()
        if mask is None:
            weights = scores.softmax(dim=2)
        else:
            allowed = mask.transpose(0, 1)
            weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=2) * allowed
        mixed = (weights.permute(3, 4, 0, 1, 2) @ value).permute(0, 3, 1, 2, 4)
        if geometry is not None:
            mixed = mixed + (weights.permute(3, 0, 1, 4, 2) @ geometry.values).permute(0, 2, 3, 1, 4)
        out: Tensor = self.out(mixed.flatten(3))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, h, L, c]."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class GeometryEncoder(nn.Module):
    """Small network from the relations of a pair of agents to a bias and a value per head.

    Args:
        width: d.
        heads: h.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.hidden = nn.Linear(NUM_RELATIONS, RELATION_HIDDEN)
        self.bias = nn.Linear(RELATION_HIDDEN, heads)
        self.value = nn.Linear(RELATION_HIDDEN, width)

    def forward(self, related: Tensor) -> PairGeometry:
        """:func:`relations` [S, A, A, F + 1] -> bias and values."""
        hidden = F.silu(self.hidden(related[..., :-1]))
        values = self.value(hidden).unflatten(-1, (self.heads, -1))
        bias = self.bias(hidden)
        bias = bias.masked_fill(related[..., -1:] == 0, torch.finfo(bias.dtype).min / 4)
        return PairGeometry(bias.permute(0, 3, 1, 2), values.permute(0, 3, 1, 2, 4))


class AdaptiveNorm(nn.Module):
    """Layer normalisation whose scale and shift come from a condition, such as the diffusion time.

    Reference: Perez et al., "FiLM", AAAI 2018; Gu et al., "Vector quantized diffusion model", CVPR 2022.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``x`` [..., d] under a condition [d], or one that broadcasts against ``x``."""
        modulation: Tensor = self.modulation(F.silu(condition))
        scale, shift = modulation.chunk(2, dim=-1)
        if condition.ndim == 1:
            return F.layer_norm(x, (self.width,), (1 + scale).to(x.dtype), shift.to(x.dtype))
        return (1 + scale) * F.layer_norm(x, (self.width,)) + shift


class LayerMemory(NamedTuple):
    """What a layer can compute before it sees a sample: the agent's past and the geometry of the pairs."""

    cross: CrossMemory | None
    geometry: PairGeometry | None


class SceneLayer(nn.Module):
    """One post-norm transformer layer: time, the agent's memory, the other agents, feed-forward.

    Args:
        width: d.
        heads: h.
        hidden: width inside the feed-forward part.
        dropout: after every part.
        cross: attend to a memory of the same agent.
        agents: attend to the other agents at the same time step.
        geometry: let relative geometry into the attention among agents.
        adaptive: normalise under a condition.
        causal: a time step sees only itself and earlier ones.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        dropout: float,
        *,
        cross: bool = False,
        agents: bool = True,
        geometry: bool = False,
        adaptive: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.adaptive = adaptive
        self.time = Attention(width, heads)
        self.cross = Attention(width, heads) if cross else None
        self.agents = Attention(width, heads) if agents else None
        self.geometry = GeometryEncoder(width, heads) if agents and geometry else None
        self.rise, self.fall = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        parts = 2 + cross + agents
        self.norms = nn.ModuleList(AdaptiveNorm(width) if adaptive else nn.LayerNorm(width) for _ in range(parts))

    def prepare(
        self, tokens: Tensor, seen: Tensor | None, related: Tensor | None, *, absorb: bool = False
    ) -> LayerMemory:
        """Everything that is the same for all samples.

        Args:
            tokens: what the agent itself is asked about, [S, A, M, d].
            seen: which of these may be seen, bool [S, A, M], or None for all.
            related: :func:`relations` of the pairs, or None.
            absorb: see :meth:`Attention.prepare`.
        """
        cross = geometry = None
        if self.cross is not None:
            allowed = None if seen is None else seen.flatten(0, 1)
            cross = self.cross.prepare(tokens.flatten(0, 1), allowed, absorb=absorb)
        if self.geometry is not None and related is not None:
            geometry = self.geometry(related)
        return LayerMemory(cross, geometry)

    def forward(
        self,
        x: Tensor,
        *,
        time_mask: Tensor | None = None,
        agent_mask: Tensor | None = None,
        memory: LayerMemory = LayerMemory(None, None),
        condition: Tensor | None = None,
    ) -> Tensor:
        """One layer over samples of scenes.

        Args:
            x: [S, A, N, T, d].
            time_mask: steps of an agent that may be seen, bool [S, A, T].
            agent_mask: agents that may be seen, bool [S, A, 1], or [S, A, T] per step; None for all.
            memory: from :meth:`prepare`.
            condition: [d], or [S, A or 1, 1, 1, d], for adaptive layers.
        Returns: [S, A, N, T, d].
        """
        scenes, agents, samples, steps, _ = x.shape
        norms = iter(self.norms)

        def added(update: Tensor) -> Tensor:
            norm = next(norms)
            total = x + self.dropout(update)
            normed: Tensor = norm(total, condition) if self.adaptive else norm(total)
            return normed

        rows = x.flatten(0, 2)
        if time_mask is not None:
            time_mask = time_mask[:, :, None].expand(-1, -1, samples, -1).flatten(0, 2)
        x = added(self.time(rows, rows, time_mask, causal=self.causal).view_as(x))
        if self.cross is not None:
            if memory.cross is None:
                raise ValueError("this layer attends to a memory, but there is none")
            x = added(self.cross.attend(x.reshape(scenes * agents, samples * steps, -1), memory.cross).view_as(x))
        if self.agents is not None:
            if agent_mask is not None and agent_mask.shape[2] > 1:
                agent_mask = agent_mask[:, :, None].expand(-1, -1, samples, -1).flatten(2)
            x = added(self.agents.among_agents(x.flatten(2, 3), agent_mask, memory.geometry).view_as(x))
        return added(self.fall(F.relu(self.rise(x))))


class SceneStack(nn.Module):
    """Several :class:`SceneLayer` one after the other; takes their arguments."""

    def __init__(self, num_layers: int, width: int, heads: int, hidden: int, dropout: float, **options: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SceneLayer(width, heads, hidden, dropout, **options) for _ in range(num_layers))

    def prepare(
        self, tokens: Tensor, seen: Tensor | None, related: Tensor | None, *, absorb: bool = False
    ) -> list[LayerMemory]:
        """:meth:`SceneLayer.prepare` of every layer."""
        prepared = []
        for layer in self.layers:
            assert isinstance(layer, SceneLayer)
            prepared.append(layer.prepare(tokens, seen, related, absorb=absorb))
        return prepared

    def forward(
        self,
        x: Tensor,
        memory: list[LayerMemory],
        *,
        time_mask: Tensor | None = None,
        agent_mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """:meth:`SceneLayer.forward` of every layer over [S, A, N, T, d]."""
        parts = []
        for part in [x] if being_exported() else x.split(_samples_at_once(x), dim=2):
            for layer, known in zip(self.layers, memory, strict=True):
                part = layer(part, time_mask=time_mask, agent_mask=agent_mask, memory=known, condition=condition)
            parts.append(part)
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _samples_at_once(x: Tensor) -> int:
    """How many samples of [S, A, N, T, d] to work on together.

    What a processor works on should stay in its caches, and the memory of a GPU has an end.
    """
    scenes, agents, samples, steps, _ = x.shape
    tokens = TOKENS_ON_CPU if x.device.type == "cpu" else TOKENS_ON_GPU
    return min(samples, max(1, tokens // (scenes * agents * steps)))
