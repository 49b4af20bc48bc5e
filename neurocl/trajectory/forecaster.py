"""The trained system: past in, K possible futures with probabilities out.

``S`` scenes, ``A`` agents, ``N`` samples, ``K`` forecasts, ``T_o`` and ``T_p`` observed and predicted steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from neurocl.config import Config, validate
from neurocl.errors import UserError
from neurocl.runs import RunFolder, read_json
from neurocl.trajectory.autoregressive import AutoregressivePrior
from neurocl.trajectory.calibration import Calibration, tempered
from neurocl.trajectory.config import Prior, TrajectoryConfig, completed
from neurocl.trajectory.continuous import ContinuousPrior
from neurocl.trajectory.denoiser import CodeDenoiser, TrunkConfig
from neurocl.trajectory.diffusion import Denoise, MaskReplaceDiffusion, guided
from neurocl.trajectory.scenes import Forecast, Scenes, TrackSet
from neurocl.trajectory.selection import Selected, Selection, select
from neurocl.trajectory.vqvae import Context, TrajectoryVqVae, VqVaeConfig
from neurocl.trajectory.windows import last_window

MODEL_SCHEMA = 1


class SamplingConfig(Config):
    """How forecasts are drawn.

    Attributes:
        num_samples: N drawn; None takes 10 per forecast when they are clustered, K when they are not.
        steps: of the sampler.
        sampler: of the diffusion prior: ``unmask``, which fills in the codes it is surest of first, or the
            ``posterior`` of the diffusion in strides.
        select: ``centroids`` of clusters of samples, their ``medoids``, or plain ``samples``.
        smoothing: of the samples before centroids are sought, as if more had been drawn; see
            :func:`neurocl.trajectory.selection.smoothed`. 0 for none.
        joint: forecasts of whole scenes.
        temperature, top_p: of the draws.
        guidance: how far codes are pushed away from those without the past, for models trained with ``drop_past``;
            0 for not at all.
        seed: of the draws.
    """

    num_samples: int | None = None
    steps: int = 5
    sampler: Literal["unmask", "posterior"] = "unmask"
    select: Selection = "centroids"
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.5
    joint: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    guidance: Annotated[float, Field(ge=0)] = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Shape:
    """What a model was built for: everything needed to build it again."""

    vqvae: VqVaeConfig
    trunk: TrunkConfig
    prior: Prior
    diffusion_steps: int
    unit: str
    hz: float
    schedule: Literal["linear", "cosine"] = "linear"
    drop_past: float = 0.0

    def document(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "schema": MODEL_SCHEMA,
            "vqvae": self.vqvae.model_dump(mode="json"),
            "trunk": self.trunk.model_dump(mode="json"),
            "prior": self.prior,
            "diffusion_steps": self.diffusion_steps,
            "unit": self.unit,
            "hz": self.hz,
            "schedule": self.schedule,
            "drop_past": self.drop_past,
        }

    @classmethod
    def read(cls, document: Mapping[str, Any], source: str) -> Shape:
        """Back from :meth:`document`.

        Raises:
            UserError: not written by this version.
        """
        if document.get("schema") != MODEL_SCHEMA:
            raise UserError(f"{source}: not a forecaster that this version reads")
        return cls(
            validate(VqVaeConfig, document["vqvae"], source=source),
            validate(TrunkConfig, document["trunk"], source=source),
            document["prior"],
            int(document["diffusion_steps"]),
            str(document["unit"]),
            float(document["hz"]),
            document.get("schedule", "linear"),
            float(document.get("drop_past", 0.0)),
        )


def shape_for(config: TrajectoryConfig, scenes: Scenes) -> Shape:
    """The model of a configuration for scenes of this length, unit and rate."""
    config = completed(config)
    sizes = {"num_observed": scenes.num_observed, "num_predicted": scenes.num_predicted, "scale": config.scale}
    own = {**sizes, **config.model}
    if config.faithful:
        vqvae = VqVaeConfig.faithful(**own)
        trunk = {"context_width": vqvae.width, "num_predicted": scenes.num_predicted, **config.trunk}
        trunk_config = TrunkConfig.faithful(**trunk)
    else:
        vqvae = validate(VqVaeConfig, own, source="model")
        trunk = {"context_width": vqvae.width, "num_predicted": scenes.num_predicted, "geometry": vqvae.geometry}
        trunk_config = validate(TrunkConfig, {**trunk, **config.trunk}, source="trunk")
    return Shape(
        vqvae,
        trunk_config,
        config.prior,
        config.diffusion_steps,
        scenes.unit,
        scenes.hz,
        config.schedule,
        config.drop_past,
    )


class Networks(nn.Module):
    """Both stages of one model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.drop_past = shape.drop_past
        self.vqvae = TrajectoryVqVae(shape.vqvae)
        self.diffusion: MaskReplaceDiffusion | None = None
        self.prior: CodeDenoiser | AutoregressivePrior | ContinuousPrior
        if shape.prior == "diffusion":
            self.diffusion = MaskReplaceDiffusion(shape.vqvae.num_codes, shape.diffusion_steps, shape.schedule)
            self.prior = CodeDenoiser(shape.trunk, shape.vqvae.num_codes, shape.diffusion_steps)
        elif shape.prior == "autoregressive":
            self.prior = AutoregressivePrior(shape.trunk, shape.vqvae.num_codes)
        else:
            self.prior = ContinuousPrior(shape.trunk, shape.vqvae.code_dim, shape.prior)

    def prior_loss(
        self,
        indices: torch.Tensor,
        context: Context,
        *,
        kind: Literal["weighted_ce", "kl"],
        generator: torch.Generator,
    ) -> torch.Tensor:
        """One training step's loss of stage 2.

        Args:
            indices: codes of the true futures, [S, A, T_p].
            context: of stage 1, without gradients.
            kind: of the diffusion's loss.
            generator: of times and noise.
        """
        mask = context.present
        if isinstance(self.prior, AutoregressivePrior):
            return self.prior.loss(indices, self.prior.prepare(context), mask)
        per_scene = self.prior.trunk.config.agent_attention
        if isinstance(self.prior, ContinuousPrior):
            from neurocl.trajectory.codebook import gather_codes

            target = gather_codes(context.codebook, indices[None])[0]
            memory = self.prior.prepare(context)
            return self.prior.loss(target, memory, mask=mask, per_scene=per_scene, generator=generator)
        assert self.diffusion is not None
        hidden = None
        if self.drop_past:
            hidden = torch.rand(len(mask), generator=generator).to(mask.device) < self.drop_past
        denoiser, memory = self.prior, self.prior.prepare(context, hidden)
        return self.diffusion.training_loss(
            lambda x, t: denoiser(x, t, memory), indices, mask=mask, per_scene=per_scene, kind=kind, generator=generator
        )

    @torch.no_grad()
    def sample(
        self, context: Context, num_samples: int, sampling: SamplingConfig, generator: torch.Generator
    ) -> torch.Tensor:
        """Positions [N, S, A, T_p, 2] in the units of the data."""
        scenes, agents = context.anchor.shape[:2]
        num_predicted = self.vqvae.config.num_predicted
        size = (num_samples, scenes, agents, num_predicted)
        device = context.anchor.device
        if isinstance(self.prior, ContinuousPrior):
            memory = self.prior.prepare(context)
            latents = self.prior.sample(memory, size[:3], steps=sampling.steps, generator=generator)
            moves = self.vqvae.decode(latents, context)
        else:
            if isinstance(self.prior, AutoregressivePrior):
                codes = self.prior.sample(
                    self.prior.prepare(context),
                    size,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    generator=generator,
                )
            else:
                assert self.diffusion is not None
                denoise = self._denoise(self.prior, context, sampling.guidance)
                unmask = sampling.sampler == "unmask"
                codes = (self.diffusion.unmask if unmask else self.diffusion.sample)(
                    denoise,
                    size,
                    steps=min(sampling.steps, self.diffusion.num_steps),
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    generator=generator,
                    device=device,
                )
            moves = self.vqvae.decode_indices(codes, context)
        return moves + context.anchor[:, :, None]

    def _denoise(self, denoiser: CodeDenoiser, context: Context, guidance: float) -> Denoise:
        kept = denoiser.prepare(context)
        if not guidance:
            return lambda x, t: denoiser(x, t, kept)
        everybody = torch.ones(len(context.anchor), dtype=torch.bool, device=context.anchor.device)
        without = denoiser.prepare(context, everybody)
        return guided(lambda x, t: denoiser(x, t, kept), lambda x, t: denoiser(x, t, without), guidance)


class Forecaster:
    """A trained model with the shape it was built for.

    Args:
        shape: of the networks.
        networks: with their weights; put into eval mode.
        device: where to compute.
        calibration: fitted on validation scenes; without one, probabilities are the plain masses of the clusters.
    """

    def __init__(
        self,
        shape: Shape,
        networks: Networks,
        device: torch.device | str = "cpu",
        *,
        calibration: Calibration | None = None,
    ) -> None:
        self.shape = shape
        self.networks = networks.eval().to(device)
        self.device = torch.device(device)
        self.calibration = calibration

    @classmethod
    def load(cls, run: Path | str, *, device: str = "cpu") -> Forecaster:
        """Read a finished training run.

        Raises:
            UserError: not a trajectory run, not finished, or a damaged checkpoint or calibration.
        """
        folder = RunFolder.open(Path(run))
        path = folder.path / "model.json"
        if not path.is_file():
            raise UserError(f"{run} is not a finished trajectory run (it has no model.json)")
        shape = Shape.read(read_json(path), str(path))
        networks = Networks(shape)
        tensors = folder.load_checkpoint().tensors
        found = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
        networks.load_state_dict(found)
        calibration = Calibration.read(folder.path, num_predicted=shape.vqvae.num_predicted, unit=shape.unit)
        return cls(shape, networks, device, calibration=calibration)

    @property
    def num_observed(self) -> int:
        """T_o."""
        return self.shape.vqvae.num_observed

    @property
    def num_predicted(self) -> int:
        """T_p."""
        return self.shape.vqvae.num_predicted

    def forecast_scenes(
        self,
        scenes: Scenes,
        num_forecasts: int = 20,
        sampling: SamplingConfig | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Selected:
        """K forecasts of every agent of every scene.

        Args:
            scenes: only their past is read.
            num_forecasts: K.
            sampling: see :class:`SamplingConfig`.
            generator: of the draws; by default one seeded with ``sampling.seed``.

        Returns: trajectories [K, S, A, T_p, 2] in the units of the scenes, and probabilities [K, S, A], see
            :meth:`calibrated`; agents that are not targets mean nothing, and are NaN where they were left out.
        Raises:
            UserError: scenes of another length than the model was trained for.
        """
        sampling = sampling or SamplingConfig()
        generator = generator or torch.Generator(self.device).manual_seed(sampling.seed)
        samples, present = self.draw(scenes, num_drawn(num_forecasts, sampling), sampling, generator)
        chosen = select(
            samples,
            num_forecasts,
            how=sampling.select,
            joint=sampling.joint,
            agent_mask=present,
            smoothing=sampling.smoothing,
            generator=generator,
        )
        missing = scenes.num_agents - present.shape[1]
        trajectories = nn.functional.pad(chosen.trajectories, (0, 0, 0, 0, 0, missing), value=torch.nan)
        probabilities = nn.functional.pad(chosen.probabilities, (0, missing), value=torch.nan)
        return Selected(trajectories, self.calibrated(probabilities, sampling))

    def draw(
        self, scenes: Scenes, num_samples: int, sampling: SamplingConfig, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples of every agent, before any are chosen: [N, S, A, T_p, 2], and who is present, bool [S, A].

        Here A counts the agents up to the last target of any scene, see :class:`neurocl.trajectory.vqvae.Context`.

        Raises:
            UserError: scenes of another length than the model was trained for, or guidance that it was not trained for.
        """
        if sampling.guidance and not self.shape.drop_past:
            raise UserError("guidance needs a model that was trained with drop_past, such as `--set drop_past=0.1`")
        if (scenes.num_observed, scenes.num_predicted) != (self.num_observed, self.num_predicted):
            raise UserError(
                f"the model forecasts {self.num_predicted} steps from {self.num_observed}, the scenes have "
                f"{scenes.num_observed} + {scenes.num_predicted}"
            )
        with torch.inference_mode():
            context = self.networks.vqvae.encode_context(scenes.to(self.device))
            return self.networks.sample(context, num_samples, sampling, generator), context.present

    def calibrated(self, masses: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
        """Probabilities out of masses of clusters, [K, ...] both: tempered if the calibration is for such forecasts.

        Args:
            masses: as :func:`neurocl.trajectory.selection.select` gives them.
            sampling: that they come from.
        """
        if self.calibration is None or not self.calibrates(len(masses), sampling):
            return masses
        return tempered(masses, self.calibration.temperature, num_drawn(len(masses), sampling))

    def calibrates(self, num_forecasts: int, sampling: SamplingConfig) -> bool:
        """Whether there is a calibration and it says something about the probabilities of such forecasts.

        It says nothing about plain samples, whole scenes, changed draws (``temperature``, ``top_p``, ``guidance``,
        another ``sampler``), and a K below half or above twice that of the fit.
        """
        known = self.calibration
        return (
            known is not None
            and known.tempers(num_forecasts)
            and known.sampler == sampling.sampler
            and sampling.select != "samples"
            and not sampling.joint
            and sampling.temperature == sampling.top_p == 1.0
            and not sampling.guidance
        )

    def radii(self, num_forecasts: int, sampling: SamplingConfig) -> dict[str, list[float]]:
        """``radius_50`` and ``radius_90``, per step around the forecasts; empty unless all is as in the fit."""
        known = self.calibration
        if known is None or not self.calibrates(num_forecasts, sampling):
            return {}
        how = (num_forecasts, num_drawn(num_forecasts, sampling), sampling.steps, sampling.select, sampling.smoothing)
        fitted = (known.num_forecasts, known.num_samples, known.steps, known.select, known.smoothing)
        return known.radii() if how == fitted else {}

    def forecast(
        self,
        past: torch.Tensor,
        neighbours: torch.Tensor | None = None,
        num_samples: int = 20,
        *,
        sampling: SamplingConfig | None = None,
        agents: tuple[str, ...] = (),
    ) -> Forecast:
        """Forecast one scene from plain tensors.

        Args:
            past: positions of one agent [T_o, 2] or of several [A, T_o, 2], in the unit of the training data; NaN where
                an agent was not seen.
            neighbours: further agents [B, T_o, 2] that are seen but not forecast.
            num_samples: K forecasts.
            sampling: see :class:`SamplingConfig`.
            agents: names for the result.

        Raises:
            UserError: shapes that do not fit the model, or an agent that was never seen.
        """
        own = past[None] if past.ndim == 2 else past
        if own.ndim != 3 or own.shape[1:] != (self.num_observed, 2):
            raise UserError(
                f"past must be [{self.num_observed}, 2] or [agents, {self.num_observed}, 2], got {list(past.shape)}"
            )
        if neighbours is not None and neighbours.shape[1:] != own.shape[1:]:
            raise UserError(f"neighbours must be [agents, {self.num_observed}, 2], got {list(neighbours.shape)}")
        everyone = own if neighbours is None else torch.cat([own, neighbours])
        seen = torch.isfinite(everyone).all(dim=-1)
        if not bool(seen[: len(own)].any(dim=1).all()):
            raise UserError("an agent to forecast was not seen in any observed step")
        count = len(everyone)
        zeros = torch.zeros(1, count, dtype=torch.int64)
        scenes = Scenes(
            past=everyone.nan_to_num()[None].float(),
            future=torch.zeros(1, count, self.num_predicted, 2),
            agent_mask=torch.ones(1, count, dtype=torch.bool),
            past_mask=seen[None],
            future_mask=torch.zeros(1, count, self.num_predicted, dtype=torch.bool),
            target_mask=torch.arange(count)[None] < len(own),
            kind=zeros,
            agent_id=torch.arange(count)[None],
            start=torch.zeros(1, dtype=torch.int64),
            recording=("",),
            unit=self.shape.unit,
            hz=self.shape.hz,
        )
        started = time.perf_counter()
        chosen = self.forecast_scenes(scenes, num_samples, sampling)
        seconds = time.perf_counter() - started
        return Forecast(
            trajectories=chosen.trajectories[:, 0, : len(own)].cpu(),
            probabilities=chosen.probabilities[:, 0, : len(own)].cpu(),
            agents=agents or tuple(str(index) for index in range(len(own))),
            hz=self.shape.hz,
            unit=self.shape.unit,
            joint=bool(sampling and sampling.joint),
            extra={"seconds": seconds, **self.radii(num_samples, sampling or SamplingConfig())},
        )

    def forecast_tracks(
        self, tracks: TrackSet, num_samples: int = 20, *, sampling: SamplingConfig | None = None
    ) -> tuple[Forecast, Scenes]:
        """Forecast everybody who is there at the newest time of a recording.

        Args:
            tracks: in the unit of the training data; resampled to its rate.
            num_samples: K forecasts.
            sampling: see :class:`SamplingConfig`.

        Returns: the forecast of those who are there, and the scene it was made from (they come first in it).
        Raises:
            UserError: another unit, or nobody there.
        """
        if tracks.unit != self.shape.unit:
            raise UserError(f"{tracks.name} is in {tracks.unit}, the model was trained in {self.shape.unit}")
        scenes = last_window(tracks, self.num_observed, self.num_predicted, hz=self.shape.hz)
        here = int(scenes.target_mask[0].sum())
        if not here:
            raise UserError(f"{tracks.name}: nobody is there at the end of the recording")
        started = time.perf_counter()
        chosen = self.forecast_scenes(scenes, num_samples, sampling)
        seconds = time.perf_counter() - started
        return (
            Forecast(
                trajectories=chosen.trajectories[:, 0, :here].cpu(),
                probabilities=chosen.probabilities[:, 0, :here].cpu(),
                agents=tuple(tracks.agent_names[int(index)] for index in scenes.agent_id[0, :here]),
                hz=self.shape.hz,
                unit=self.shape.unit,
                joint=bool(sampling and sampling.joint),
                extra={"seconds": seconds, **self.radii(num_samples, sampling or SamplingConfig())},
            ),
            scenes,
        )


def num_drawn(num_forecasts: int, sampling: SamplingConfig) -> int:
    """N, the number of samples that K forecasts are made of.

    Raises:
        UserError: no forecast, or fewer samples than forecasts.
    """
    if num_forecasts < 1:
        raise UserError(f"the number of forecasts must be at least 1, got {num_forecasts}")
    count = sampling.num_samples or (num_forecasts if sampling.select == "samples" else 10 * num_forecasts)
    if count < num_forecasts:
        raise UserError(f"{num_forecasts} forecasts need at least as many samples, got {count}")
    return count


def write_shape(folder: RunFolder, shape: Shape) -> None:
    """Put ``model.json`` into a run folder."""
    from neurocl.runs import write_atomically

    write_atomically(folder.path / "model.json", json.dumps(shape.document(), indent=1))
