"""How a trajectory forecaster is trained: data, model, budgets, presets; one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from neurocl.config import Config, merged, validate
from neurocl.errors import UserError
from neurocl.registry import did_you_mean

Preset = Literal["tiny", "small", "paper"]
Prior = Literal["diffusion", "autoregressive", "flow"]


class StageConfig(Config):
    """Budget and optimiser of one stage.

    Attributes:
        steps: updates.
        batch_size: scenes in a step.
        lr: highest learning rate; it falls to a hundredth of it along a cosine.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        ema: decay of the averaged weights that are kept.
        validate_every: steps between looks at the validation scenes; the best averaged weights win.
    """

    steps: Annotated[int, Field(ge=1)] = 6000
    batch_size: Annotated[int, Field(ge=1)] = 64
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    validate_every: Annotated[int, Field(ge=1)] = 500


class AugmentConfig(Config):
    """Random changes of training scenes, see :func:`neurocl.trajectory.augment.augmented`."""

    rotation: Annotated[float, Field(ge=0)] = 0.0
    reflection: bool = False
    drop: Annotated[float, Field(ge=0, le=1)] = 0.0
    shorten: Annotated[float, Field(ge=0, le=1)] = 0.0
    jitter: Annotated[float, Field(ge=0)] = 0.0


class TrajectoryConfig(Config):
    """A training run.

    Attributes:
        dataset: a name of :data:`neurocl.trajectory.datasets.DATASETS`.
        files: own recordings instead.
        data_dir: where data are looked for first.
        num_observed, num_predicted, stride: windows; None takes the protocol's.
        faithful: the paper's model: 16 codes, no geometry, agents forecast apart.
        model: overrides of :class:`neurocl.trajectory.vqvae.VqVaeConfig`.
        trunk: overrides of :class:`neurocl.trajectory.denoiser.TrunkConfig`.
        prior: how codes are forecast.
        diffusion_steps: T.
        loss: of the diffusion.
        stage1, stage2: budgets.
        augment: None takes what suits the data set.
        strength_from, strength_to: share of stage 1 at which the instance part of the codebook begins and is complete.
        max_validation_scenes: scenes used for model selection.
        seed, device, precision, threads: of the run.
    """

    dataset: str = "crowd"
    files: tuple[Path, ...] = ()
    data_dir: Path | None = None
    num_observed: Annotated[int, Field(ge=2)] | None = None
    num_predicted: Annotated[int, Field(ge=1)] | None = None
    stride: Annotated[int, Field(ge=1)] | None = None
    faithful: bool = False
    model: dict[str, Any] = Field(default_factory=dict)
    trunk: dict[str, Any] = Field(default_factory=dict)
    prior: Prior = "diffusion"
    diffusion_steps: Annotated[int, Field(ge=2)] = 100
    loss: Literal["weighted_ce", "kl"] = "weighted_ce"
    stage1: StageConfig = StageConfig()
    stage2: StageConfig = StageConfig()
    augment: AugmentConfig | None = None
    strength_from: Annotated[float, Field(ge=0, le=1)] = 0.15
    strength_to: Annotated[float, Field(ge=0, le=1)] = 0.5
    max_validation_scenes: Annotated[int, Field(ge=1)] = 500
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> TrajectoryConfig:
        if self.strength_from > self.strength_to:
            raise ValueError("strength_from must not exceed strength_to")
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": {"width": 32, "heads": 4, "hidden": 64, "num_codes": 32},
        "trunk": {"width": 32, "hidden": 64},
        "stage1": {"steps": 60, "batch_size": 32, "validate_every": 30},
        "stage2": {"steps": 60, "batch_size": 32, "validate_every": 30},
        "max_validation_scenes": 60,
    },
    "small": {},
    "paper": {
        "faithful": True,
        "stage1": {"steps": 150_000, "batch_size": 256, "lr": 5e-4, "validate_every": 5000},
        "stage2": {"steps": 60_000, "batch_size": 256, "lr": 1e-3, "validate_every": 5000},
    },
}

# Units of the data that make one unit of the network, and how training scenes may be changed.
SCALES = {"sdd": 50.0, "nba": 5.0, "nba:rebound": 15.0, "nfl": 25.0}
AUGMENTS: dict[str, dict[str, Any]] = {
    "nba": {"reflection": True},
    "nba:rebound": {"reflection": True},
    "nfl": {"reflection": True},
}
PEDESTRIANS = {"rotation": 360.0, "reflection": True}


def resolve(preset: str = "small", *layers: dict[str, Any]) -> TrajectoryConfig:
    """A preset with overrides on top, later ones winning key by key.

    Raises:
        UserError: unknown preset, key or value.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}{did_you_mean(preset, PRESETS)} (choose from {', '.join(PRESETS)})")
    return validate(TrajectoryConfig, merged(PRESETS[preset], *layers), source="trajectory")


def scale_of(config: TrajectoryConfig) -> float:
    """Units of the data per network unit; metres stay metres."""
    return SCALES.get(config.dataset, 1.0) if not config.files else 1.0


def augment_of(config: TrajectoryConfig) -> AugmentConfig:
    """The configured changes, or those that suit the data set."""
    if config.augment is not None:
        return config.augment
    return AugmentConfig(**AUGMENTS.get(config.dataset, PEDESTRIANS))
