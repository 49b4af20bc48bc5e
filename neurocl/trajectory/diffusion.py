"""Categorical diffusion over codes that are masked and replaced: schedules, posteriors, losses and samplers.

``K`` codes, numbered 0 to K - 1, and the mask, number K. ``T`` diffusion steps, times t = 0 (least noise) to T - 1;
time -1 is clean. ``N`` samples, ``S`` scenes, ``A`` agents, ``L`` tokens of an agent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from neurocl.trajectory.codebook import masked_mean
from neurocl.trajectory.selection import uniform

Schedule = Literal["linear", "cosine"]
Loss = Literal["kl", "weighted_ce"]
# From tokens [N, S, A, L] and a time (a tensor without dimensions) to logits [N, S, A, L, K].
Denoise = Callable[[Tensor, Tensor], Tensor]

TINY = 1e-30
LINEAR_START, LINEAR_END = 0.00001, 0.000009
COSINE_PEAK = 0.99
AUXILIARY_WEIGHT = 1e-3
MIN_COUNT = 10
DECAY = 0.9


class MaskReplaceDiffusion(nn.Module):
    """Tokens are kept, replaced by any code, or masked for good, more and more with time.

    ``keep``, ``mask`` and ``replace`` are the cumulative probabilities of t = -1 ... T - 1, float64 [T + 1]: a token
    still is what it was with ``keep + replace``, any other code with ``replace``, the mask with ``mask``.

    Args:
        num_codes: K.
        num_steps: T.
        schedule: ``linear``, which nearly always masks and hardly ever replaces, or ``cosine``.

    Reference: Gu et al., "Vector quantized diffusion model for text-to-image synthesis", CVPR 2022, arXiv 2111.14822;
    Austin et al., "Structured denoising diffusion models in discrete state-spaces", NeurIPS 2021, arXiv 2107.03006.
    """

    keep: Tensor
    mask: Tensor
    replace: Tensor
    loss_mean: Tensor
    loss_count: Tensor

    def __init__(self, num_codes: int, num_steps: int = 100, schedule: Schedule = "linear") -> None:
        super().__init__()
        if num_codes < 2 or num_steps < 2:
            raise ValueError(f"expected at least two codes and two steps, got {num_codes} and {num_steps}")
        self.num_codes = num_codes
        self.num_steps = num_steps
        keep, mask = _cumulative(schedule, num_steps)
        self.register_buffer("keep", keep, persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("replace", (1 - keep - mask) / num_codes, persistent=False)
        # Running squared losses per time, which decide what times are drawn.
        self.register_buffer("loss_mean", torch.zeros(num_steps, dtype=torch.float64))
        self.register_buffer("loss_count", torch.zeros(num_steps, dtype=torch.int64))

    @property
    def mask_index(self) -> int:
        """The number of the mask, K."""
        return self.num_codes

    def one_step(self) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities of single steps t = 0 ... T - 1: keep, replace, mask, float64 [T] each."""
        return self._between(torch.arange(self.num_steps), torch.arange(-1, self.num_steps - 1))

    def _between(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities of going from time s to time t: keep, replace, mask."""
        keep = self.keep[t + 1] / self.keep[s + 1].clamp(min=TINY)
        mask = 1 - (1 - self.mask[t + 1]) / (1 - self.mask[s + 1]).clamp(min=TINY)
        return keep, ((1 - keep - mask) / self.num_codes).clamp(min=0), mask

    def marginal(self, x0: Tensor, t: Tensor) -> Tensor:
        """q(x_t | x_0), float64 [..., K + 1], of codes [...] and times that broadcast against them."""
        keep, replace, mask = (table[t + 1][..., None] for table in (self.keep, self.replace, self.mask))
        codes = keep * nn.functional.one_hot(x0, self.num_codes) + replace
        return torch.cat([codes, mask.expand(*codes.shape[:-1], 1)], dim=-1)

    def corrupt(self, x0: Tensor, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw x_t given x_0: int64 like ``x0`` [...], with times that broadcast against it."""
        noise = uniform((2, *x0.shape), self.keep, generator)
        keep, mask = self.keep[t + 1], self.mask[t + 1]
        any_code = (noise[1] * self.num_codes).long().clamp(max=self.num_codes - 1)
        noisy = torch.where(noise[0] < keep, x0, any_code)
        return torch.where(noise[0] >= 1 - mask, self.mask_index, noisy)

    def posterior(self, x_t: Tensor, p: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """p(x_s | x_t) under a belief about the clean codes, over any distance s < t.

        Args:
            x_t: tokens, [...].
            p: probabilities of the clean codes, [..., K]; the dtype of the result.
            t: times of ``x_t``, broadcastable against it.
            s: times to go to, before t; -1 for clean.
        Returns: probabilities [..., K + 1] that add up to 1.
        """
        keep_s, replace_s, mask_s = (
            table[s + 1][..., None].to(p.dtype) for table in (self.keep, self.replace, self.mask)
        )
        keep_t, replace_t, mask_t = (
            table[t + 1][..., None].to(p.dtype) for table in (self.keep, self.replace, self.mask)
        )
        keep, replace, mask = (value[..., None].to(p.dtype) for value in self._between(t, s))
        masked = (x_t == self.mask_index)[..., None]
        here = nn.functional.one_hot(x_t.clamp(max=self.num_codes - 1), self.num_codes).to(p.dtype)
        from_mask = mask / mask_t.clamp(min=TINY) * (keep_s * p + replace_s)
        weight = p / (keep_t * here + replace_t).clamp(min=TINY)
        total = weight.sum(dim=-1, keepdim=True)
        from_code = (keep_s * weight + replace_s * total) * (keep * here + replace)
        codes = torch.where(masked, from_mask, from_code)
        stays = torch.where(masked, mask_s / mask_t.clamp(min=TINY), 0)
        return torch.cat([codes, stays.expand(*codes.shape[:-1], 1)], dim=-1)

    def draw_earlier(
        self, x_t: Tensor, p: Tensor, t: Tensor, s: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw x_s from :meth:`posterior` without building it.

        The posterior is a mixture whose weights are a few numbers per token: stay; take a code from ``p``; take any
        code. So one draw from ``p`` per token is all that touches K numbers.

        Args:
            x_t: tokens, [N, ...].
            p: probabilities of the clean codes, [N, ..., K], or [1, ..., K] when they are the same for all samples.
            t: time of all tokens, without dimensions.
            s: time to go to.
        """
        dtype = p.dtype
        keep_s, replace_s, mask_s = (table[s + 1].to(dtype) for table in (self.keep, self.replace, self.mask))
        keep_t, replace_t, mask_t = (table[t + 1].to(dtype) for table in (self.keep, self.replace, self.mask))
        keep, replace, _ = (value.to(dtype) for value in self._between(t, s))
        masked = x_t == self.mask_index
        edges = p.cumsum(dim=-1).expand(*x_t.shape, -1)
        here = x_t.clamp(max=self.num_codes - 1)[..., None]
        mine = p.expand_as(edges).gather(-1, here)[..., 0].masked_fill(masked, 0)
        noise = uniform((3, *x_t.shape), p, generator)

        # Of a code: itself, another one of p, or any other one. Of the mask: itself, one of p, or any.
        weight = mine / (keep_t + replace_t) + (1 - mine) / replace_t.clamp(min=TINY)
        stay = (keep_s * mine / (keep_t + replace_t) + replace_s * weight) * (keep + replace)
        stay = torch.where(masked, mask_s / mask_t.clamp(min=TINY), stay)
        from_p = torch.where(masked, keep_s, keep_s * (1 - mine) / replace_t.clamp(min=TINY))
        from_any = replace_s * torch.where(masked, float(self.num_codes), (self.num_codes - 1) * weight)

        # A draw from p that leaves out the token's own code: jump over its share.
        aim = noise[1] * (edges[..., -1] - mine)
        before = edges.gather(-1, here)[..., 0] - mine
        aim = torch.where(masked | (aim < before), aim, aim + mine)
        of_p = _row_of(edges, aim)
        choices = torch.where(masked, self.num_codes, self.num_codes - 1)
        of_any = torch.minimum((noise[1] * choices).long(), choices - 1)
        of_any = torch.where(masked | (of_any < here[..., 0]), of_any, of_any + 1)
        moved = torch.where(noise[2] * (from_p + from_any) < from_p, of_p, of_any)
        return torch.where(noise[0] < stay, x_t, moved)

    # Training

    def draw_times(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Times and the probability each was drawn with: int64 and float64 of ``shape``.

        Uniform until every time was seen more than ten times, then in proportion to the root of its squared loss.
        """
        uniformly = torch.full_like(self.keep[1:], 1 / self.num_steps)
        rated = torch.sqrt(self.loss_mean + 1e-10) + 1e-4
        rated = torch.cat([rated[1:2], rated[1:]])
        ready = (self.loss_count > MIN_COUNT).all()
        share = torch.where(ready, rated / rated.sum(), uniformly)
        edges = share.cumsum(dim=0)
        aim = uniform(shape, self.keep, generator) * edges[-1]
        t = torch.searchsorted(edges, aim, right=True).clamp(max=self.num_steps - 1)
        return t, share[t]

    @torch.no_grad()
    def record(self, t: Tensor, loss: Tensor, valid: Tensor | None = None) -> None:
        """Update the running squared loss of the times ``t`` with losses of the same shape."""
        weight = torch.ones_like(loss) if valid is None else valid.to(loss.dtype)
        squared = torch.zeros_like(self.loss_mean).index_add_(
            0, t.flatten(), (loss.square() * weight).double().flatten()
        )
        count = torch.zeros_like(self.loss_mean).index_add_(0, t.flatten(), weight.double().flatten())
        seen = count > 0
        mean = squared / count.clamp(min=1)
        self.loss_mean.copy_(torch.where(seen, DECAY * self.loss_mean + (1 - DECAY) * mean, self.loss_mean))
        self.loss_count.add_(count.long())

    def terms(self, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Per token, the variational term L_t and the auxiliary cross entropy, without weights: [...] both.

        L_t is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and -log p(x_0 | x_1) at t = 0.

        Args:
            logits: [..., K].
            x0: clean codes, [...].
            x_t: tokens, [...].
            t: times, broadcastable against the tokens.
        """
        t = t.expand_as(x0)
        log_p = logits.log_softmax(dim=-1)
        ours = self.posterior(x_t, log_p.exp(), t, t - 1).clamp(min=TINY)
        clean = nn.functional.one_hot(x0, self.num_codes).to(logits.dtype)
        true = self.posterior(x_t, clean, t, t - 1)
        divergence = (torch.special.xlogy(true, true) - true * ours.log()).sum(dim=-1)
        likelihood = -ours.gather(-1, x0[..., None])[..., 0].log()
        cross_entropy = -log_p.gather(-1, x0[..., None])[..., 0]
        return torch.where(t == 0, likelihood, divergence), cross_entropy

    def loss(
        self,
        logits: Tensor,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        probability: Tensor,
        *,
        kind: Loss = "weighted_ce",
        mask: Tensor | None = None,
        record: bool = True,
    ) -> Tensor:
        """Mean over agents of an estimate of the variational bound, in nats per token, and the auxiliary term.

        Args:
            logits: [S, A, L, K].
            x0: clean codes, [S, A, L].
            x_t: tokens at time t.
            t: times drawn by :meth:`draw_times`, [S, A] or [S, 1].
            probability: that these times were drawn with.
            kind: ``kl``, the variational bound with its small auxiliary term; or ``weighted_ce``, the cross entropy of
                the masked tokens with the weights that make it the same bound when nothing is ever replaced, which
                varies less, and of the others with the auxiliary weight.
            mask: agents that count, bool [S, A].
            record: let the losses decide what times are drawn next.
        """
        agents = x0.shape[:2]
        t, probability = t.expand(agents), probability.to(logits.dtype).expand(agents)
        tokens = x0.shape[-1]
        time = t.to(logits.dtype) / self.num_steps
        auxiliary = AUXILIARY_WEIGHT * (2 - time)
        if kind == "kl":
            variational, cross_entropy = self.terms(logits, x0, x_t, t[..., None])
            per_agent = variational.sum(dim=-1)
            side = torch.where((t == 0)[..., None], variational, cross_entropy).sum(dim=-1)
            total = per_agent + auxiliary * side
        else:
            cross_entropy = nn.functional.cross_entropy(logits.flatten(0, -2), x0.flatten(), reduction="none")
            cross_entropy = cross_entropy.view(x0.shape)
            drop = (self.keep[t] - self.keep[t + 1]) / (1 - self.keep[t + 1]).clamp(min=TINY)
            weight = torch.where(x_t == self.mask_index, drop.to(logits.dtype)[..., None], 0)
            per_agent = (weight * cross_entropy).sum(dim=-1)
            total = per_agent + auxiliary * cross_entropy.sum(dim=-1)
        if record:
            self.record(t, per_agent, mask)
        return masked_mean(total / probability, mask) / tokens

    def training_loss(
        self,
        denoise: Callable[[Tensor, Tensor], Tensor],
        x0: Tensor,
        *,
        mask: Tensor | None = None,
        per_scene: bool = False,
        kind: Loss = "weighted_ce",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw times, corrupt, denoise and rate: one training step's loss.

        Args:
            denoise: from tokens [S, A, L] and times [S, A] or [S, 1] to logits [S, A, L, K].
            x0: clean codes, [S, A, L].
            mask: agents that count, bool [S, A].
            per_scene: one time for all agents of a scene, as joint forecasts need.
            kind: see :meth:`loss`.
            generator: of times and noise.
        """
        shape = (x0.shape[0], 1) if per_scene else (x0.shape[0], x0.shape[1])
        t, probability = self.draw_times(shape, generator)
        x_t = self.corrupt(x0, t[..., None], generator)
        return self.loss(denoise(x_t, t), x0, x_t, t, probability, kind=kind, mask=mask)

    # Sampling

    @torch.no_grad()
    def sample(
        self,
        denoise: Denoise,
        shape: tuple[int, int, int, int],
        *,
        steps: int = 10,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        prefix: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw code sequences from the posterior, all at once, in ``steps`` jumps.

        At first all samples are alike, and the network sees one of them.

        Args:
            denoise: the network, its memory already in it.
            shape: (N, S, A, L).
            steps: of the T there are; evenly spaced.
            temperature: divides the logits; 0 takes the most likely code.
            top_p: draw among the likeliest codes that make up this share.
            generator: of all draws.
            prefix: codes that are given, int64 [S, A, P] with P <= L or [N, S, A, P]; -1 where free.
            device: where to work.
        Returns: int64 [N, S, A, L].

        Raises:
            ValueError: steps outside 1 to T, or a prefix that does not fit.
        """
        given = _given(prefix, shape)
        x = torch.full(shape, self.mask_index, dtype=torch.int64, device=device)
        times = self.times(steps)
        alike = given is None or given.shape[0] == 1
        for index, (now, then) in enumerate(zip(times, [*times[1:], -1], strict=True)):
            t, s = torch.tensor(now, device=device), torch.tensor(then, device=device)
            logits = denoise(x[:1] if index == 0 and alike else x, t)
            p = sharpened(logits, temperature, top_p)
            if given is not None:
                clean = nn.functional.one_hot(given.clamp(min=0), self.num_codes).to(p.dtype)
                p = torch.where((given >= 0)[..., None], clean, p)
            x = self.draw_earlier(x, p, t, s, generator)
        return x if given is None else torch.where(given >= 0, given, x)

    def times(self, steps: int) -> list[int]:
        """The times a sampler of that many steps visits, from T - 1 down to 0."""
        if not 1 <= steps <= self.num_steps:
            raise ValueError(f"steps must be between 1 and {self.num_steps}, got {steps}")
        if steps == 1:
            return [self.num_steps - 1]
        last = self.num_steps - 1
        return [round(last * (1 - index / (steps - 1))) for index in range(steps)]

    @torch.no_grad()
    def unmask(
        self,
        denoise: Denoise,
        shape: tuple[int, int, int, int],
        *,
        steps: int = 6,
        temperature: float = 1.0,
        top_p: float = 1.0,
        choice_temperature: float = 4.5,
        generator: torch.Generator | None = None,
        prefix: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Fill in the masked tokens the network is surest of, fewer at first, and never look back.

        Args:
            choice_temperature: noise on how sure the network is, which fades over the steps; 0 for none.
        The other arguments and the result are those of :meth:`sample`.

        Reference: Chang et al., "MaskGIT: masked generative image transformer", CVPR 2022, arXiv 2202.04200.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        given = _given(prefix, shape)
        x = torch.full(shape, self.mask_index, dtype=torch.int64, device=device)
        if given is not None:
            x = torch.where(given >= 0, given, x)
        start = (x == self.mask_index).sum(dim=-1, keepdim=True)
        for index in range(steps):
            masked = x == self.mask_index
            share = masked.float().mean()
            # The time at which this many tokens are masked.
            t = (self.mask[1:] - share).abs().argmin()
            alike = index == 0 and (given is None or given.shape[0] == 1)
            p = sharpened(denoise(x[:1] if alike else x, t), temperature, top_p).expand(*shape, -1)
            drawn = draw(p, generator)
            sure = p.gather(-1, drawn[..., None])[..., 0].clamp(min=TINY).log()
            noise = uniform(tuple(sure.shape), sure, generator).clamp(min=TINY, max=1 - 1e-7)
            sure = sure - choice_temperature * (1 - (index + 1) / steps) * torch.log(-torch.log(noise))
            left = torch.floor(start * math.cos(math.pi / 2 * (index + 1) / steps)).long()
            if index == steps - 1:
                left = torch.zeros_like(left)
            order = sure.masked_fill(~masked, torch.inf).argsort(dim=-1)
            rank = order.argsort(dim=-1)
            x = torch.where(masked & (rank >= left), drawn, x)
        return x


def guided(denoise: Denoise, unconditional: Denoise, scale: float) -> Denoise:
    """Push the logits away from what the network says without the past, ``scale`` times.

    Reference: Ho & Salimans, "Classifier-free diffusion guidance", 2022, arXiv 2207.12598.
    """

    def push(x: Tensor, t: Tensor) -> Tensor:
        logits = denoise(x, t)
        return logits + scale * (logits - unconditional(x, t))

    return push


def _cumulative(schedule: Schedule, num_steps: int) -> tuple[Tensor, Tensor]:
    """Cumulative probabilities to keep and to mask of t = -1 ... T - 1, float64 [T + 1]."""
    if schedule == "linear":
        keep = torch.linspace(1 - LINEAR_START, LINEAR_END, num_steps, dtype=torch.float64)
        mask = torch.linspace(LINEAR_END, 1 - LINEAR_START, num_steps, dtype=torch.float64)
    else:
        angle = torch.linspace(0, math.pi / 2, num_steps, dtype=torch.float64)
        keep, mask = COSINE_PEAK * angle.cos().square(), COSINE_PEAK * angle.sin().square()
    one, zero = keep.new_ones(1), keep.new_zeros(1)
    return torch.cat([one, keep]), torch.cat([zero, mask])


def _given(prefix: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    """A prefix as [N or 1, S, A, L], -1 where free."""
    if prefix is None:
        return None
    given = prefix if prefix.ndim == 4 else prefix[None]
    if given.shape[0] not in (1, shape[0]) or given.shape[1:3] != shape[1:3] or given.shape[3] > shape[3]:
        raise ValueError(f"a prefix of shape {tuple(prefix.shape)} does not fit samples of shape {shape}")
    return nn.functional.pad(given, (0, shape[3] - given.shape[3]), value=-1)


def sharpened(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities of codes, sharpened and cut to the likeliest."""
    if temperature == 0:
        return nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    p = (logits if temperature == 1 else logits / temperature).softmax(dim=-1)
    if top_p >= 1:
        return p
    ranked, order = p.sort(dim=-1, descending=True)
    # A code stays if those before it do not yet make up the share.
    kept = ranked * (ranked.cumsum(dim=-1) - ranked < top_p)
    p = torch.zeros_like(p).scatter_(-1, order, kept)
    return p / p.sum(dim=-1, keepdim=True)


def draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """One index per row of [..., K], in proportion to it."""
    edges = p.cumsum(dim=-1)
    return _row_of(edges, uniform(tuple(p.shape[:-1]), p, generator) * edges[..., -1])


def _row_of(edges: Tensor, aim: Tensor) -> Tensor:
    """The first entry of cumulative sums [..., K] that is above each aim [...], never one of zero probability."""
    top = edges[..., -1]
    below = torch.minimum(aim, torch.nextafter(top, torch.zeros_like(top)))
    return torch.searchsorted(edges.contiguous(), below[..., None].contiguous(), right=True)[..., 0]
