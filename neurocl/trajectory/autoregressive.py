"""A prior that writes the codes of a future one after the other: what the diffusion prior is compared with.

``N`` samples, ``S`` scenes, ``A`` agents, ``T_p`` predicted steps, ``K`` codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurocl.trajectory.blocks import xavier_
from neurocl.trajectory.codebook import masked_mean
from neurocl.trajectory.denoiser import CodeEmbedding, FutureTrunk, Memory, TrunkConfig
from neurocl.trajectory.diffusion import draw, sharpened
from neurocl.trajectory.vqvae import Context


class AutoregressivePrior(nn.Module):
    """p(code | earlier codes, past), with the trunk of the denoiser under a causal mask.

    Args:
        config: of the trunk.
        num_codes: K; number K starts every sequence.
    """

    def __init__(self, config: TrunkConfig, num_codes: int) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.codes = CodeEmbedding(num_codes + 1, config.width)
        self.trunk = FutureTrunk(config, causal=True)
        self.logits = nn.Linear(config.width, num_codes)
        xavier_(self)

    def prepare(self, context: Context) -> Memory:
        """See :meth:`FutureTrunk.prepare`."""
        return self.trunk.prepare(context)

    def forward(self, codes: Tensor, memory: Memory) -> Tensor:
        """Logits [N, S, A, L + 1, K] of each next code after codes [N, S, A, L], the first one included."""
        first = codes.new_full((*codes.shape[:3], 1), self.num_codes)
        tokens = torch.cat([first, codes], dim=-1)
        out: Tensor = self.logits(self.trunk(self.codes(tokens.permute(1, 2, 0, 3)), memory))
        return out.permute(2, 0, 1, 3, 4)

    def loss(self, codes: Tensor, memory: Memory, mask: Tensor | None = None) -> Tensor:
        """Mean negative log-likelihood in nats per token of codes [S, A, T_p] of the agents in ``mask`` [S, A]."""
        logits = self(codes[None, ..., :-1], memory)[0]
        nats = nn.functional.cross_entropy(logits.flatten(0, -2), codes.flatten(), reduction="none").view(codes.shape)
        return masked_mean(nats.mean(dim=-1), mask)

    @torch.no_grad()
    def sample(
        self,
        memory: Memory,
        shape: tuple[int, int, int, int],
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw code sequences int64 [N, S, A, T_p], ``shape``, one time step of all samples after the other."""
        device = self.logits.weight.device
        codes = torch.empty(*shape[:3], 0, dtype=torch.int64, device=device)
        for _ in range(shape[3]):
            p = sharpened(self(codes, memory)[..., -1, :], temperature, top_p)
            codes = torch.cat([codes, draw(p, generator)[..., None]], dim=-1)
        return codes
