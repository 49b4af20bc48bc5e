"""Stage 1: an autoencoder that turns each agent's future into a few codes of its own codebook, and back.

``S`` scenes, ``A`` agents, ``N`` samples, ``T_o`` observed and ``T_p`` predicted steps, ``d`` width, ``d_z`` width of a
latent, ``K`` codes. Inside, positions are displacements from where each agent was last seen, in network units.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from neurocl.config import Config
from neurocl.trajectory.blocks import LinearEmbedding, SceneStack, being_exported, relations, xavier_
from neurocl.trajectory.codebook import (
    Estimator,
    InstanceCodebook,
    InstanceQuantiser,
    Quantised,
    change_rate,
    code_counts,
    codebook_terms,
    gather_codes,
    masked_mean,
    perplexity,
)
from neurocl.trajectory.scenes import KINDS, Scenes

STANDING = 1e-6  # network units of movement below which an agent has no heading


class VqVaeConfig(Config):
    """Shape of stage 1.

    Attributes:
        num_observed: T_o.
        num_predicted: T_p.
        scale: units of the data that make one network unit, such as 50 pixels or 5 metres.
        width: d.
        code_dim: d_z.
        num_codes: K.
        rank: of the instance part of the codebook; 0 turns it off.
        heads: of every attention.
        hidden: width inside feed-forward parts.
        layers: of each of the three networks.
        dropout: in all of them.
        decoder_cross_attention: the decoder sees the encoded past itself, not only through the codebook.
        geometry: relative positions and velocities enter attention among agents; velocities and kinds are inputs.
        neighbours: with geometry, how many agents one looks at: itself and those nearest to it; 0 for all.
        heading: every agent sees the world turned so that it walks along x, and its future is described that way.
        absolute: positions on the field are inputs too, for sports.
        estimator: gradient through the quantiser.
        commitment: weight of the commitment term against the codebook term.
    """

    num_observed: Annotated[int, Field(ge=2)] = 8
    num_predicted: Annotated[int, Field(ge=1)] = 12
    scale: Annotated[float, Field(gt=0)] = 1.0
    width: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    code_dim: Annotated[int, Field(ge=1)] = 8
    num_codes: Annotated[int, Field(ge=2)] = 64
    rank: Annotated[int, Field(ge=0)] = 8
    heads: Annotated[int, Field(ge=1)] = 8
    hidden: Annotated[int, Field(ge=1)] = 128
    layers: Annotated[int, Field(ge=1)] = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.01
    decoder_cross_attention: bool = True
    geometry: bool = True
    neighbours: Annotated[int, Field(ge=0)] = 8
    heading: bool = True
    absolute: bool = False
    estimator: Estimator = "ste"
    commitment: Annotated[float, Field(ge=0)] = 0.25

    @model_validator(mode="after")
    def _fits(self) -> VqVaeConfig:
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, got {self.heads} and {self.width}")
        if self.rank > self.num_codes:
            raise ValueError(f"rank must be at most num_codes, got {self.rank} and {self.num_codes}")
        return self

    @classmethod
    def faithful(cls, **options: Any) -> VqVaeConfig:
        """The model of the paper: 16 codes, no geometry, a decoder that sees the past only through the codebook."""
        return cls(**{"num_codes": 16, "decoder_cross_attention": False, "geometry": False, "heading": False} | options)


@dataclass(frozen=True)
class Everyone:
    """Pasts of all agents of the scenes, forecast or not: what stage 2 starts from.

    Attributes:
        embedded: past before the encoder, with positions; [S, A, T_o, d].
        seen: steps that were observed, bool [S, A, T_o].
        related: relations of every pair in network units, [S, A, A, F + 1], or None without geometry.
    """

    embedded: Tensor
    seen: Tensor
    related: Tensor | None

    def detach(self) -> Everyone:
        """The same without gradients."""
        related = None if self.related is None else self.related.detach()
        return Everyone(self.embedded.detach(), self.seen, related)


@dataclass(frozen=True)
class Context:
    """What is known of the agents before their future, computed once per scene.

    Only the futures of targets are modelled; the other agents are seen in ``everyone``. Here ``A`` counts the agents up
    to the last target of any scene, which come first.

    Attributes:
        tokens: encoded past, [S, A, T_o, d].
        seen: steps that were observed, bool [S, A, T_o].
        present: targets that were seen at all, bool [S, A].
        anchor: where each was last seen, in the units of the data, [S, A, 2].
        frame: rotations from the axes of the data to the agent's own, [S, A, 2, 2], or None where they are the same.
        codebook: each agent's codes, [S, A, K, d_z].
        related: relations of every pair in network units, [S, A, A, F + 1], or None without geometry.
        everyone: the pasts of all agents, before the encoder.
    """

    tokens: Tensor
    seen: Tensor
    present: Tensor
    anchor: Tensor
    frame: Tensor | None
    codebook: Tensor
    related: Tensor | None
    everyone: Everyone

    def detach(self) -> Context:
        """The same without gradients, for stage 2."""
        return replace(
            self,
            **{item.name: value.detach() for item in fields(self) if (value := getattr(self, item.name)) is not None},
        )

    def own(self, moves: Tensor) -> Tensor:
        """Displacements [S, A, T, 2] along the axes of the data, along the agents' own."""
        return moves if self.frame is None else moves @ self.frame.mT

    def common(self, moves: Tensor) -> Tensor:
        """Displacements [S, A, ..., T, 2] along the agents' own axes, along those of the data."""
        if self.frame is None:
            return moves
        between = moves.ndim - 4
        return moves @ self.frame.view(*self.frame.shape[:2], *[1] * between, 2, 2)


class VqVaeOutput(NamedTuple):
    """A training step's numbers.

    Attributes:
        losses: named terms, already weighted; their sum is the loss.
        reconstruction: displacements from the anchor in the units of the data, [S, A, T_p, 2].
        indices: codes that were used, int64 [S, A, T_p].
        counts: how often each code was used, float64 [K].
        ade: mean distance between reconstruction and truth in the units of the data.
    """

    losses: dict[str, Tensor]
    reconstruction: Tensor
    indices: Tensor
    counts: Tensor
    ade: Tensor


class TrajectoryVqVae(nn.Module):
    """Encoder, instance codebook and decoder of futures given the past.

    Reference: Benaglia et al., "Trajectory forecasting through low-rank adaptation of discrete latent codes",
    ICPR 2024, arXiv 2405.20743.
    """

    def __init__(self, config: VqVaeConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        inputs = 2 + 2 * config.geometry + 2 * config.absolute * (1 + config.heading)
        self.embed_past = LinearEmbedding(inputs, width, config.num_observed, config.dropout)
        self.embed_future = LinearEmbedding(2, width, config.num_predicted, config.dropout)
        self.embed_codes = LinearEmbedding(config.code_dim, width, config.num_predicted, config.dropout, scaled=False)
        self.kinds = nn.Embedding(len(KINDS), width) if config.geometry else None
        self.past_layers = self._layers(cross=False)
        self.future_layers = self._layers(cross=True)
        self.decoder_layers = self._layers(cross=config.decoder_cross_attention)
        self.to_latent = nn.Linear(width, config.code_dim)
        self.to_displacement = nn.Linear(width, 2)
        self.codebook = InstanceCodebook(width, config.code_dim, config.num_codes, config.rank, config.heads)
        self.quantiser = InstanceQuantiser(config.code_dim, config.num_codes, config.estimator)
        xavier_(self)
        if self.kinds is not None:
            nn.init.normal_(self.kinds.weight, std=0.1)

    def _layers(self, *, cross: bool) -> SceneStack:
        config = self.config
        return SceneStack(
            config.layers,
            config.width,
            config.heads,
            config.hidden,
            config.dropout,
            cross=cross,
            geometry=config.geometry,
        )

    def encode_context(self, scenes: Scenes, strength: float = 1.0) -> Context:
        """Past, neighbours and the codebooks that follow from them.

        Args:
            scenes: in the units of the data; only the past is read.
            strength: of the instance part of the codebook.
        """
        seen = scenes.past_mask & scenes.agent_mask[..., None]
        anchor = last_seen(scenes.past, seen)
        position = ((scenes.past - anchor[:, :, None]) / self.config.scale).masked_fill(~seen[..., None], 0)
        velocity = steps_between(position, seen)
        frame = None
        if self.config.heading:
            frame = heading_frame(velocity)
            position, velocity = position @ frame.mT, velocity @ frame.mT
        features = [position]
        if self.config.geometry:
            features.append(velocity)
        if self.config.absolute:
            features.append((scenes.past / self.config.scale).masked_fill(~seen[..., None], 0))
            if frame is not None:
                features.append(frame[:, :, None, 0].expand_as(position))
        embedded = self.embed_past(torch.cat(features, dim=-1))
        if self.kinds is not None:
            embedded = embedded + self.kinds(scenes.kind.clamp(min=0))[:, :, None]
        related = None
        if self.config.geometry:
            speed = last_seen(velocity, seen)
            if frame is not None:
                speed = (speed[:, :, None] @ frame)[:, :, 0]
            present = seen.any(dim=-1)
            related = relations(
                anchor / self.config.scale, speed, frame, present=present, neighbours=self.config.neighbours
            )
        memory = self.past_layers.prepare(embedded, seen, related)
        tokens = self.past_layers(embedded[:, :, None], memory, time_mask=seen, agent_mask=seen)[:, :, 0]
        count = num_forecast(scenes.target_mask)
        own = seen[:, :count]
        return Context(
            tokens=tokens[:, :count],
            seen=own,
            present=own.any(dim=-1) & scenes.target_mask[:, :count],
            anchor=anchor[:, :count],
            frame=None if frame is None else frame[:, :count],
            codebook=self.codebook(tokens[:, :count], own, strength),
            related=None if related is None else related[:, :count, :count],
            everyone=Everyone(embedded, seen, related),
        )

    def encode_future(self, scenes: Scenes, context: Context) -> Tensor:
        """Latents of the true futures, [S, A, T_p, d_z]; at steps that are not known they mean nothing."""
        count = context.present.shape[1]
        known = scenes.future_mask[:, :count] & context.present[..., None]
        future = context.own((scenes.future[:, :count] - context.anchor[:, :, None]) / self.config.scale)
        x = self.embed_future(future.masked_fill(~known[..., None], 0))[:, :, None]
        x = self._through(self.future_layers, x, context, known)
        latents: Tensor = self.to_latent(x[:, :, 0])
        return latents

    def quantise(self, latents: Tensor, context: Context) -> Quantised:
        """Nearest codes of latents [S, A, T_p, d_z]."""
        quantised: Quantised = self.quantiser(latents, context.codebook)
        return quantised

    def decode(self, latents: Tensor, context: Context, known: Tensor | None = None) -> Tensor:
        """Displacements from the anchors, in the units of the data.

        Args:
            latents: [S, A, T_p, d_z], or with samples in front, [N, S, A, T_p, d_z]; what does not depend on the
                sample is computed once.
            context: of the scenes.
            known: steps that take part, bool [S, A, T_p]; None for all steps of agents that are present.
        Returns: [S, A, T_p, 2], with N in front if it was given.
        """
        sampled = latents.ndim == 5
        x = latents.permute(1, 2, 0, 3, 4) if sampled else latents[:, :, None]
        x = self._through(self.decoder_layers, self.embed_codes(x), context, known)
        out: Tensor = context.common(self.to_displacement(x) * self.config.scale)
        return out.permute(2, 0, 1, 3, 4) if sampled else out[:, :, 0]

    def decode_indices(self, indices: Tensor, context: Context) -> Tensor:
        """Displacements [N, S, A, T_p, 2] in the units of the data of sampled codes [N, S, A, T_p]."""
        return self.decode(gather_codes(context.codebook, indices), context)

    def _through(self, layers: SceneStack, x: Tensor, context: Context, known: Tensor | None) -> Tensor:
        """Layers over futures [S, A, N, T_p, d]; steps that are not ``known`` are not looked at."""
        # Many samples ask the same past: then its keys are worth multiplying out.
        memory = layers.prepare(context.tokens, context.seen, context.related, absorb=x.shape[2] > 1)
        agent_mask = context.present[..., None] if known is None else known
        out: Tensor = layers(x, memory, time_mask=known, agent_mask=agent_mask)
        return out

    def forward(self, scenes: Scenes, strength: float = 1.0, weight: float = 1.0) -> VqVaeOutput:
        """Encode, quantise and decode the true futures.

        Args:
            scenes: in the units of the data.
            strength: of the instance part of the codebook.
            weight: of the commitment and codebook terms.
        """
        context = self.encode_context(scenes, strength)
        count = context.present.shape[1]
        known = scenes.future_mask[:, :count] & context.present[..., None]
        latents = self.encode_future(scenes, context)
        quantised = self.quantise(latents, context)
        reconstruction = self.decode(quantised.latents, context, known)
        truth = scenes.future[:, :count] - context.anchor[:, :, None]
        distance = (reconstruction - truth).masked_fill(~known[..., None], 0).norm(dim=-1)
        ade = masked_mean(distance, known)
        commitment, codebook = codebook_terms(latents, quantised.codes, known)
        losses = {
            "reconstruction": ade / self.config.scale,
            "commitment": weight * self.config.commitment * commitment,
            "codebook": weight * codebook,
        }
        counts = code_counts(quantised.indices, self.config.num_codes, known)
        return VqVaeOutput(losses, reconstruction, quantised.indices, counts, ade.detach())

    @torch.no_grad()
    def indices(self, scenes: Scenes, strength: float = 1.0) -> tuple[Tensor, Context]:
        """Codes of the true futures, int64 [S, A, T_p], and the context they were found in: the data of stage 2."""
        context = self.encode_context(scenes, strength)
        latents = self.encode_future(scenes, context)
        return self.quantiser.indices(latents, context.codebook), context


class Reconstruction(NamedTuple):
    """What the codes keep of true futures.

    Attributes:
        ade, fde: mean distance over all steps and at the last one, in the units of the data.
        perplexity: of the codes that were used.
        changes: share of steps whose code differs from the one before.
        counts: how often each code was used, float64 [K].
    """

    ade: float
    fde: float
    perplexity: float
    changes: float
    counts: Tensor


@torch.no_grad()
def reconstruction(
    network: TrajectoryVqVae, scenes: Scenes, strength: float = 1.0, *, batch_size: int = 128
) -> Reconstruction:
    """Encode and decode the true futures of all targets; whoever has no full future counts in ``ade`` alone.

    Args:
        network: in eval mode.
        scenes: on any device; they are brought to the network's.
        strength: of the instance part of the codebook.
        batch_size: scenes at a time.
    """
    device = next(network.parameters()).device
    ade = fde = steps = ends = changes = moves = 0.0
    uses = torch.zeros(network.config.num_codes, dtype=torch.float64)
    for batch in scenes.batches(batch_size):
        moved = batch.to(device)
        found = network(moved, strength)
        count = found.indices.shape[1]
        known = (moved.future_mask & moved.past_mask.any(dim=-1)[..., None] & moved.target_mask[..., None])[:, :count]
        last = known[..., -1]
        anchor = last_seen(moved.past, moved.past_mask & moved.agent_mask[..., None])[:, :count]
        missed = (found.reconstruction[:, :, -1] + anchor - moved.future[:, :count, -1])[last].norm(dim=-1)
        ade, steps = ade + float(found.ade) * int(known.sum()), steps + int(known.sum())
        fde, ends = fde + float(missed.sum()), ends + int(last.sum())
        uses += found.counts.cpu()
        pairs = int((known[..., 1:] & known[..., :-1]).sum())
        changes, moves = changes + change_rate(found.indices, known) * pairs, moves + pairs
    means = ade / max(1.0, steps), fde / max(1.0, ends)
    return Reconstruction(*means, perplexity(uses), changes / max(1.0, moves), uses)


def num_forecast(target_mask: Tensor) -> int:
    """How many of the agents [S, A] have to be looked at to forecast all targets; at least one."""
    if being_exported():
        return target_mask.shape[1]
    columns = target_mask.any(dim=0).nonzero()
    return int(columns.max()) + 1 if len(columns) else 1


def last_seen(values: Tensor, seen: Tensor) -> Tensor:
    """Values [S, A, 2] at the last step that was seen, out of [S, A, T, 2]; zeros if there is none."""
    steps = torch.arange(1, seen.shape[-1] + 1, device=seen.device)
    last = (seen * steps).max(dim=-1).values
    row = (last - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, values.shape[-1])
    return values.gather(2, row)[:, :, 0].masked_fill((last == 0)[..., None], 0)


def heading_frame(velocity: Tensor) -> Tensor:
    """Rotations [S, A, 2, 2] that turn each agent's way to the positive x axis; who does not move keeps the axes.

    The way is a mean of the observed moves [S, A, T, 2] in which each counts half of the one after it, so that one
    shaky last step does not turn a whole future.
    """
    age = torch.arange(velocity.shape[2] - 1, -1, -1, device=velocity.device)
    way = (velocity * (0.5**age)[:, None]).sum(dim=2)
    length = way.norm(dim=-1, keepdim=True)
    axis = torch.tensor([1.0, 0.0], device=way.device, dtype=way.dtype)
    unit = torch.where(length > STANDING, way / length.clamp_min(STANDING), axis)
    return torch.stack([unit, torch.stack([-unit[..., 1], unit[..., 0]], dim=-1)], dim=-2)


def steps_between(position: Tensor, seen: Tensor) -> Tensor:
    """Moves since the step before, [S, A, T, 2]; zero where one of the two was not seen."""
    both = seen[..., 1:] & seen[..., :-1]
    moves = (position[:, :, 1:] - position[:, :, :-1]).masked_fill(~both[..., None], 0)
    return torch.cat([torch.zeros_like(moves[:, :, :1]), moves], dim=2)
