"""The instance codebook: learned codes plus a low-rank change that depends on an agent's past, and the quantiser.

``S`` scenes, ``A`` agents, ``B`` = S * A, ``T`` time steps, ``d`` width, ``d_z`` width of a latent, ``K`` codes,
``r`` rank.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from neurocl.trajectory.blocks import Attention, sinusoidal_positions

Estimator = Literal["ste", "rotation", "gumbel"]
# The library compares every latent with a codebook of its own; slices keep that table small.
AGENTS_PER_SLICE = 64
GUMBEL_TEMPERATURE = 0.1  # squared distance in latents by which the likelihood of a code falls to 1 / e
DEAD = 0.1  # share of its due below which a code counts as dead
NUDGE = 0.05  # of a revived code, against the length of the one it starts from


class InstanceCodebook(nn.Module):
    """One codebook for every agent: static codes plus ``strength`` times a matrix of rank at most r.

    Rows of B, told apart by positions, ask the agent's encoded past and then each other; A, shared by all agents,
    spreads them over the codes. Both parts are normalised row by row, so that ``strength`` weighs one against the
    other.

    Args:
        width: d.
        code_dim: d_z.
        num_codes: K.
        rank: r; 0 for an ordinary codebook, K for a change that is not restricted.
        heads: of both attentions.

    Raises:
        ValueError: a rank below 0 or above ``num_codes``.

    Reference: Benaglia et al., "Trajectory forecasting through low-rank adaptation of discrete latent codes",
    ICPR 2024, arXiv 2405.20743.
    """

    positions: Tensor

    def __init__(self, width: int, code_dim: int, num_codes: int, rank: int, heads: int) -> None:
        super().__init__()
        if not 0 <= rank <= num_codes:
            raise ValueError(f"rank must be between 0 and the number of codes {num_codes}, got {rank}")
        self.num_codes = num_codes
        self.rank = rank
        self.static = nn.Parameter(torch.empty(num_codes, width).uniform_(-1, 1))
        self.project = nn.Linear(width, code_dim)
        self.project_code = nn.Linear(code_dim, code_dim)
        if rank:
            self.A = nn.Parameter(torch.empty(rank, num_codes).uniform_(-1, 1))
            self.B = nn.Parameter(torch.zeros(rank, width))
            self.ask_past = Attention(width, heads)
            self.norm_past = nn.LayerNorm(width)
            self.ask_rows = Attention(width, heads)
            self.norm_rows = nn.LayerNorm(width)
            self.register_buffer("positions", sinusoidal_positions(rank, width), persistent=False)

    def change(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """The instance part before normalisation, [B, K, d], of rank at most r.

        Args:
            tokens: encoded past, [B, T_o, d].
            mask: steps that were observed, bool [B, T_o], or None for all.
        """
        rows = (self.B + self.positions).expand(tokens.shape[0], -1, -1)
        rows = self.norm_past(rows + self.ask_past(rows, tokens, mask))
        rows = self.norm_rows(rows + self.ask_rows(rows, rows))
        spread: Tensor = self.A.T @ rows
        return spread

    def forward(self, tokens: Tensor, mask: Tensor | None, strength: float) -> Tensor:
        """Codebooks [S, A, K, d_z] for encoded pasts [S, A, T_o, d] with a mask [S, A, T_o] or None.

        ``strength`` 0 gives every agent the static codes, 1 weighs both parts alike.
        """
        codes = _unit_rows(self.static)
        if self.rank and strength:
            seen = None if mask is None else mask.flatten(0, 1)
            codes = codes + strength * _unit_rows(self.change(tokens.flatten(0, 1), seen))
        projected: Tensor = self.project_code(self.project(codes))
        shape = (*tokens.shape[:2], *projected.shape[-2:])
        books: Tensor = projected.expand(shape) if projected.ndim == 2 else projected.view(shape)
        return books

    @torch.no_grad()
    def revive(self, counts: Tensor, generator: torch.Generator) -> int:
        """Let codes that are hardly used begin again beside busy ones, which so share their work; how many there were.

        A code is dead if it is used less than a tenth as often as it would be if all were used alike. It takes the
        static row of a busy code, slightly changed, and its column of A, so that it follows it for every agent. Latents
        themselves, which is where libraries let codes begin again, are of another space here.

        Args:
            counts: how often each code is used, [K].
            generator: of the choice and the change, on the CPU.
        """
        counts = counts.cpu().double()
        unused = counts * self.num_codes < DEAD * counts.sum()
        dead = unused.nonzero()[:, 0]
        if not len(dead):
            return 0
        busy = torch.multinomial(counts.masked_fill(unused, 0), len(dead), replacement=True, generator=generator)
        rows = _unit_rows(self.static[busy])
        noise = torch.randn(rows.shape, generator=generator).to(rows)
        self.static[dead] = rows + NUDGE * _unit_rows(noise)
        if self.rank:
            self.A[:, dead] = self.A[:, busy]
        return len(dead)


def _unit_rows(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp(min=1e-6)


class Quantised(NamedTuple):
    """What the quantiser makes of latents.

    Attributes:
        latents: what the decoder gets: the codes in value, with a gradient to the latents; [S, A, T, d_z].
        codes: the codes themselves, with a gradient to the codebook; [S, A, T, d_z].
        indices: int64 [S, A, T].
    """

    latents: Tensor
    codes: Tensor
    indices: Tensor


class InstanceQuantiser(nn.Module):
    """Nearest code of each agent's own codebook, found by ``vector_quantize_pytorch``.

    Its exponential averages would cut the codebook off from every gradient, and its commitment loss pulls both sides
    alike, so both are off: the two terms are in :func:`codebook_terms`.

    Args:
        code_dim: d_z.
        num_codes: K.
        estimator: gradient to the latents: copied straight through (``ste``), rotated with the code (``rotation``), or
            of codes that are drawn while training, the nearer the likelier (``gumbel``), where the decoder's error
            reaches the codebook too.

    Reference: van den Oord et al., "Neural discrete representation learning", NeurIPS 2017, arXiv 1711.00937; Fifty et
    al., "Restructuring vector quantization with the rotation trick", ICLR 2025, arXiv 2410.06424; Jang et al.,
    "Categorical reparameterization with Gumbel-softmax", ICLR 2017, arXiv 1611.01144.
    """

    def __init__(self, code_dim: int, num_codes: int, estimator: Estimator = "ste") -> None:
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize  # type: ignore[import-untyped]

        self.estimator = estimator
        self.search: Any = VectorQuantize(
            dim=code_dim,
            codebook_size=num_codes,
            learnable_codebook=True,
            ema_update=False,
            commitment_weight=0.0,
            rotation_trick=False,
            route_gradients_to_input=False,
        )
        # Its own codebook only stands in for ours.
        self.search.requires_grad_(False)

    def forward(self, latents: Tensor, codebook: Tensor) -> Quantised:
        """Latents [S, A, T, d_z] and codebooks [S, A, K, d_z]; ``gumbel`` draws from torch's own generator."""
        if self.estimator == "gumbel" and self.training:
            return self._drawn(latents, codebook)
        indices = self.indices(latents, codebook)
        codes = gather_codes(codebook, indices[None])[0]
        return Quantised(self._estimate(latents, codes), codes, indices)

    @torch.no_grad()
    def indices(self, latents: Tensor, codebook: Tensor) -> Tensor:
        """Index of the nearest code, int64 [S, A, T]."""
        rows, books = latents.flatten(0, 1), codebook.flatten(0, 1)
        found = []
        for part, book in zip(rows.split(AGENTS_PER_SLICE), books.split(AGENTS_PER_SLICE), strict=True):
            per_token = book[None, :, None].expand(-1, -1, part.shape[1], -1, -1)
            _, index, _ = self.search(
                part, codebook_transform_fn=lambda _, per_token=per_token: per_token, freeze_codebook=True
            )
            found.append(index)
        return torch.cat(found).view(latents.shape[:-1])

    def _drawn(self, latents: Tensor, codebook: Tensor) -> Quantised:
        near = -(latents[..., None, :] - codebook[:, :, None]).square().sum(dim=-1) / GUMBEL_TEMPERATURE
        chosen = nn.functional.gumbel_softmax(near, hard=True)
        indices = chosen.argmax(dim=-1)
        return Quantised(chosen @ codebook, gather_codes(codebook, indices[None])[0], indices)

    def _estimate(self, latents: Tensor, codes: Tensor) -> Tensor:
        if self.estimator == "rotation":
            from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to  # type: ignore[import-untyped]

            rotated: Tensor = rotate_to(latents, codes.detach())
            return rotated
        return latents + (codes - latents).detach()


def gather_codes(codebook: Tensor, indices: Tensor) -> Tensor:
    """Codes [N, S, A, T, d_z] of indices [N, S, A, T] in the codebooks [S, A, K, d_z] of the agents."""
    samples, scenes, agents, steps = indices.shape
    rows = indices.permute(1, 2, 0, 3).reshape(scenes, agents, samples * steps, 1)
    codes = codebook.gather(2, rows.expand(-1, -1, -1, codebook.shape[-1]))
    return codes.view(scenes, agents, samples, steps, -1).permute(2, 0, 1, 3, 4)


def codebook_terms(latents: Tensor, codes: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The commitment term, which moves the latents, and the codebook term, which moves the codes.

    Both are mean squared differences over the elements of the tokens in ``mask`` (bool [S, A, T], None for all).
    """
    commitment = (latents - codes.detach()).square()
    codebook = (codes - latents.detach()).square()
    return masked_mean(commitment.mean(dim=-1), mask), masked_mean(codebook.mean(dim=-1), mask)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of the values where the mask is true; 0 where it never is."""
    if mask is None:
        return values.mean()
    weight = mask.to(values.dtype)
    return (values * weight).sum() / weight.sum().clamp(min=1)


def code_counts(indices: Tensor, num_codes: int, mask: Tensor | None = None) -> Tensor:
    """How often each code is used, float64 [K]; counts of several batches may be added."""
    used = indices.flatten() if mask is None else indices[mask]
    return torch.bincount(used, minlength=num_codes).double()


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of code use: 1 when one code does everything, K when all are used alike."""
    share = counts / counts.sum().clamp(min=1)
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def change_rate(indices: Tensor, mask: Tensor | None = None) -> float:
    """Share of time steps whose code differs from the one before, from indices [S, A, T]."""
    differs = (indices[..., 1:] != indices[..., :-1]).double()
    both = None if mask is None else mask[..., 1:] & mask[..., :-1]
    return float(masked_mean(differs, both))
