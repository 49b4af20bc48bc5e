"""How a trajectory forecaster is trained: data, model, budgets, presets; one YAML file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from neurocl.config import Config, merged, validate
from neurocl.errors import UserError
from neurocl.registry import did_you_mean

Preset = Literal["tiny", "small", "paper"]
Prior = Literal["diffusion", "autoregressive", "flow", "ddim"]


class StageConfig(Config):
    """Budget and optimiser of one stage.

    Attributes:
        steps: updates; None takes what suits the data set.
        batch_size: scenes in a step; None takes what suits the data set.
        lr: highest learning rate; it falls to a hundredth of it along a cosine.
        weight_decay: of AdamW.
        betas: of AdamW.
        clip: largest norm of the gradient.
        ema: decay of the averaged weights that are kept.
        validate_every: steps between looks at the validation scenes, of which the best averaged weights win; None for
            five looks.
    """

    steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    clip: Annotated[float, Field(gt=0)] = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    validate_every: Annotated[int, Field(ge=1)] | None = None


class AugmentConfig(Config):
    """Random changes of training scenes, see :func:`neurocl.trajectory.augment.augmented`."""

    rotation: Annotated[float, Field(ge=0)] = 0.0
    reflection: bool = False
    field: tuple[float, float] | None = None
    drop: Annotated[float, Field(ge=0, le=1)] = 0.0
    shorten: Annotated[float, Field(ge=0, le=1)] = 0.0
    absent: Annotated[float, Field(ge=0, lt=1)] = 0.0
    jitter: Annotated[float, Field(ge=0)] = 0.0
    resize: Annotated[float, Field(ge=1)] = 1.0


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
        prior: how codes are forecast: ``diffusion`` of indices, one index after the other (``autoregressive``), or the
            codes as vectors, by flow matching (``flow``) or a continuous diffusion (``ddim``).
        diffusion_steps: T.
        schedule: of the diffusion; ``cosine`` replaces codes now and then, ``linear`` hardly ever.
        loss: of the diffusion.
        drop_past: share of the scenes whose past stage 2 is not shown, for forecasts drawn with ``guidance``.
        stage1, stage2: budgets.
        augment: None, and what it leaves open, takes what suits the data set.
        max_agents: of fuller training scenes, a random agent and those nearest to it; None takes what suits the data.
        scale: units of the data that make one unit of the network; None takes what suits the data set.
        strength_from, strength_to: share of stage 1 at which the instance part of the codebook begins and is complete.
        revive_every: updates between revivals of dead codes in the first half of stage 1; 0 for none.
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
    schedule: Literal["linear", "cosine"] = "linear"
    loss: Literal["weighted_ce", "kl"] = "weighted_ce"
    drop_past: Annotated[float, Field(ge=0, lt=1)] = 0.0
    stage1: StageConfig = StageConfig()
    stage2: StageConfig = StageConfig()
    augment: AugmentConfig | None = None
    max_agents: Annotated[int, Field(ge=1)] | None = None
    scale: Annotated[float, Field(gt=0)] | None = None
    strength_from: Annotated[float, Field(ge=0, le=1)] = 0.15
    strength_to: Annotated[float, Field(ge=0, le=1)] = 0.5
    revive_every: Annotated[int, Field(ge=0)] = 0
    max_validation_scenes: Annotated[int, Field(ge=1)] = 500
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> TrajectoryConfig:
        if self.strength_from > self.strength_to:
            raise ValueError("strength_from must not exceed strength_to")
        if self.drop_past and self.prior != "diffusion":
            raise ValueError(f"drop_past is for the diffusion prior, not for {self.prior}")
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
        "stage1": {"steps": 150_000, "batch_size": 256, "lr": 5e-4, "betas": (0.5, 0.9), "validate_every": 5000},
        "stage2": {"steps": 60_000, "batch_size": 256, "lr": 1e-3, "betas": (0.9, 0.999), "validate_every": 5000},
        "strength_from": 1 / 3,
        "strength_to": 2 / 3,
    },
}


WALKED = AugmentConfig(rotation=360.0, reflection=True)


@dataclass(frozen=True)
class Suited:
    """What suits a data set, unless a configuration says otherwise.

    Attributes:
        scale: units of the data that make one unit of the network.
        augment: how training scenes may be changed.
        batch_size: scenes in a step.
        max_agents: of a training scene.
        steps: of both stages.
        model, trunk: of the default model, not of the faithful one.
    """

    scale: float = 1.0
    augment: AugmentConfig = WALKED
    batch_size: int = 32
    max_agents: int = 12
    steps: tuple[int, int] = (4000, 5000)
    model: dict[str, Any] = dataclass_field(default_factory=dict)
    trunk: dict[str, Any] = dataclass_field(default_factory=dict)


# A second layer of the prior is worth its time where there are few agents; matches have to be forecast within a second.
DEEPER = {"layers": 2, "context_layers": 2}
COURT, FIELD = (28.0, 28.0 * 50 / 94), (120 * 0.9144, 53.3 * 0.9144)  # metres, as the readers convert them
ON_FIELD = {"absolute": True, "heading": False, "neighbours": 0}


WALKS = Suited(trunk=DEEPER)


def _sport(scale: float, field: tuple[float, float], agents: int, batch_size: int) -> Suited:
    """Matches on a field of this length and width, which are mirrored onto themselves."""
    return Suited(scale, AugmentConfig(reflection=True, field=field), batch_size, agents, model=ON_FIELD)


SUITED = {
    "crowd": Suited(batch_size=16, steps=(1500, 3500), trunk=DEEPER),
    "sdd": Suited(scale=50.0, batch_size=128, max_agents=6, model={"neighbours": 6}, trunk=DEEPER),
    "nba": _sport(5.0, COURT, 11, 16),
    "nba:rebound": _sport(15.0, (94.0, 50.0), 11, 16),
    "nfl": _sport(25.0, FIELD, 23, 8),
}


def resolve(preset: str = "small", *layers: dict[str, Any]) -> TrajectoryConfig:
    """A preset with overrides on top, later ones winning key by key.

    Raises:
        UserError: unknown preset, key or value.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}{did_you_mean(preset, PRESETS)} (choose from {', '.join(PRESETS)})")
    return validate(TrajectoryConfig, merged(PRESETS[preset], *layers), source="trajectory")


def completed(config: TrajectoryConfig) -> TrajectoryConfig:
    """The configuration with everything filled in that was left to the data set; complete ones stay as they are."""
    suited = WALKS if config.files else SUITED.get(config.dataset, WALKS)
    values: dict[str, Any] = {
        "augment": suited.augment.model_copy(update=_own(config.augment)),
        "max_agents": config.max_agents or suited.max_agents,
        "scale": config.scale or suited.scale,
        "model": config.model if config.faithful else {**suited.model, **config.model},
        "trunk": config.trunk if config.faithful else {**suited.trunk, **config.trunk},
    }
    for name, usual in zip(("stage1", "stage2"), suited.steps, strict=True):
        own: StageConfig = getattr(config, name)
        steps = own.steps or usual
        looks = own.validate_every or math.ceil(steps / 5)
        filled = {"steps": steps, "batch_size": own.batch_size or suited.batch_size, "validate_every": looks}
        values[name] = own.model_copy(update=filled)
    return config.model_copy(update=values)


def _own(augment: AugmentConfig | None) -> dict[str, Any]:
    """What was asked for."""
    return {} if augment is None else {name: getattr(augment, name) for name in augment.model_fields_set}


class Budget(NamedTuple):
    """Of a stage: updates, scenes in each, and updates between looks at the validation scenes."""

    steps: int
    batch_size: int
    validate_every: int


def budget(stage: StageConfig) -> Budget:
    """Of a stage of a :func:`completed` configuration.

    Raises:
        ValueError: something is left open.
    """
    if stage.steps is None or stage.batch_size is None or stage.validate_every is None:
        raise ValueError("the configuration is not completed")
    return Budget(stage.steps, stage.batch_size, stage.validate_every)
