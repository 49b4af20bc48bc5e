"""Priors without codes: flow matching or diffusion of latents or displacements, on a scheduler of ``diffusers``.

``N`` samples, ``S`` scenes, ``A`` agents, ``T_p`` predicted steps, ``D`` values per step, ``d`` width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from neurocl.trajectory.blocks import xavier_
from neurocl.trajectory.codebook import masked_mean
from neurocl.trajectory.denoiser import FutureTrunk, Memory, TrunkConfig
from neurocl.trajectory.vqvae import Context

Process = Literal["flow", "ddim"]
NUM_TIMES = 1000


class ContinuousPrior(nn.Module):
    """p(values of the future | past), by a network that predicts a velocity.

    Targets are brought to zero mean and unit variance for every time step; that matters more than the solver.

    Args:
        config: of the trunk.
        size: D: the width of a latent, or 2 for displacements.
        process: ``flow``, straight lines between noise and data; or ``ddim``, a noise schedule that ends in pure
            noise, with v-prediction.

    Reference: Lipman et al., "Flow matching for generative modeling", ICLR 2023, arXiv 2210.02747; Song et al.,
    "Denoising diffusion implicit models", ICLR 2021, arXiv 2010.02502; Lin et al., "Common diffusion noise schedules
    and sample steps are flawed", WACV 2024, arXiv 2305.08891.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: TrunkConfig, size: int, process: Process = "flow") -> None:
        super().__init__()
        self.process = process
        self.size = size
        self.num_predicted = config.num_predicted
        self.embed = nn.Linear(size, config.width)
        self.trunk = FutureTrunk(config, num_times=NUM_TIMES)
        self.velocity = nn.Linear(config.width, size)
        self.register_buffer("mean", torch.zeros(config.num_predicted, size))
        self.register_buffer("deviation", torch.ones(config.num_predicted, size))
        xavier_(self)
        self._scheduler = _scheduler(process)

    def prepare(self, context: Context, hidden: Tensor | None = None) -> Memory:
        """See :meth:`FutureTrunk.prepare`."""
        return self.trunk.prepare(context, hidden)

    @torch.no_grad()
    def fit_statistics(self, target: Tensor, mask: Tensor) -> None:
        """Take mean and deviation per step from targets [S, A, T_p, D] of the agents in ``mask`` [S, A].

        Raises:
            ValueError: no agent counts.
        """
        chosen = target[mask]
        if not len(chosen):
            raise ValueError("no targets to take statistics from")
        self.mean.copy_(chosen.mean(dim=0))
        # Displacements share one unit: the larger of both spreads, so that a straight walk does not blow up its side.
        spread = (chosen - self.mean).square().mean(dim=0).sqrt()
        if self.size == 2:
            spread = spread.max(dim=-1, keepdim=True).values.expand_as(spread)
        self.deviation.copy_(spread.clamp(min=1e-4))

    def forward(self, x: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """Velocities of noisy values.

        Args:
            x: [N, S, A, T_p, D], or [S, A, T_p, D] for one sample of each scene.
            t: times from 0 (clean) to 1000, without dimensions, or [S, A] or [S, 1].
            memory: from :meth:`prepare`.
        """
        sampled = x.ndim == 5
        rows = x.permute(1, 2, 0, 3, 4) if sampled else x[:, :, None]
        out: Tensor = self.velocity(self.trunk(self.embed(rows), memory, t))
        return out.permute(2, 0, 1, 3, 4) if sampled else out[:, :, 0]

    def loss(
        self,
        target: Tensor,
        memory: Memory,
        *,
        mask: Tensor | None = None,
        per_scene: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean squared error of the velocity at random times.

        Args:
            target: clean values, [S, A, T_p, D].
            memory: from :meth:`prepare`.
            mask: agents that count, bool [S, A].
            per_scene: one time for all agents of a scene.
            generator: of times and noise.
        """
        source = target.device if generator is None else generator.device
        clean = (target - self.mean) / self.deviation
        noise = torch.randn(clean.shape, generator=generator, device=source, dtype=clean.dtype).to(clean.device)
        shape = (len(target), 1 if per_scene else target.shape[1])
        draw = torch.rand(shape, generator=generator, device=source, dtype=clean.dtype).to(clean.device)
        if self.process == "flow":
            level = draw[..., None, None]
            noisy, velocity, t = (1 - level) * clean + level * noise, noise - clean, draw * NUM_TIMES
        else:
            t = (draw * NUM_TIMES).long().clamp(max=NUM_TIMES - 1)
            level = self._scheduler.alphas_cumprod.to(clean)[t][..., None, None]
            signal, spread = level.sqrt(), (1 - level).sqrt()
            noisy, velocity = signal * clean + spread * noise, signal * noise - spread * clean
        error = (self(noisy, t, memory) - velocity).square().mean(dim=(2, 3))
        return masked_mean(error, mask)

    @torch.no_grad()
    def sample(
        self,
        memory: Memory,
        shape: tuple[int, int, int],
        *,
        steps: int = 10,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Values [N, S, A, T_p, D] from noise, in ``steps`` evaluations; ``shape`` is (N, S, A).

        Raises:
            ValueError: steps outside 1 to 1000.
        """
        if not 1 <= steps <= NUM_TIMES:
            raise ValueError(f"steps must be between 1 and {NUM_TIMES}, got {steps}")
        device = self.mean.device
        source = device if generator is None else generator.device
        x = torch.randn((*shape, self.num_predicted, self.size), generator=generator, device=source).to(device)
        scheduler = _scheduler(self.process)
        if self.process == "flow":
            # The grid of the scheduler itself wastes its last step next to the data.
            scheduler.set_timesteps(sigmas=[1 - index / steps for index in range(steps)], device=device)
        else:
            scheduler.set_timesteps(steps, device=device)
        for t in scheduler.timesteps:
            x = scheduler.step(self(x, t, memory), t, x, return_dict=False)[0]
        return x * self.deviation + self.mean


def _scheduler(process: Process) -> Any:
    """The scheduler, set up for trajectories: nothing clipped, pure noise at the start."""
    import diffusers

    schedulers: Any = diffusers
    if process == "flow":
        return schedulers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TIMES, shift=1.0)
    return schedulers.DDIMScheduler(
        num_train_timesteps=NUM_TIMES,
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
