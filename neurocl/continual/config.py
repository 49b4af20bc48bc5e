"""The configuration of one continual-learning run (torch-free, so that ``--help`` and ``info`` stay light)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from neurocl.config import Config

OptimizerName = Literal["sgd", "adam", "adamw"]


class OptimizerConfig(Config):
    """The optimiser; a new one is made at every task."""

    name: OptimizerName = "sgd"
    lr: float = Field(0.1, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    momentum: float = Field(0.0, ge=0, lt=1, description="SGD only")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam and AdamW only")

    @field_validator("betas")
    @classmethod
    def _below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both betas must lie in 0 <= beta < 1")
        return value

    clip_norm: float | None = Field(None, gt=0, description="clip the gradient's norm to this")


class TrainConfig(Config):
    """One run: a method learns the tasks of a data set one after the other."""

    area: Literal["continual", "spiking"] = "continual"
    method: str = Field("derpp", description="see `neurocl list methods`")
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own, see `neurocl info METHOD`")
    dataset: str = Field("seq-digits", description="see `neurocl list datasets`, or a .npz file")
    data_dir: Path | None = Field(None, description="where data sets lie; default $NEUROCL_DATA, then the user's cache")
    backbone: str = Field("mlp", description="see `neurocl list backbones`")
    backbone_options: dict[str, Any] = Field(default_factory=dict, description="width, hidden sizes ...")
    buffer_size: int = Field(200, ge=1, description="items in the replay memory, over all tasks")
    epochs: int = Field(5, ge=1, description="passes over each task")
    batch_size: int = Field(16, ge=1)
    replay_batch: int = Field(16, ge=1, description="items drawn from memory per step")
    accumulate: int = Field(1, ge=1, description="optimiser step every so many batches")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: Literal["constant", "cosine", "multistep"] = Field(
        "constant", description="per epoch, restarted each task"
    )
    milestones: tuple[int, ...] = Field((), description="multistep: epochs after which lr is multiplied by 0.1")
    augment: Literal["none", "crop-flip", "strong"] = "none"
    seed: int = Field(0, ge=0, lt=2**32)
    permute_classes: bool = Field(False, description="order of classes drawn from the seed")
    class_order: tuple[int, ...] | None = Field(None, description="explicit order of the original class ids")
    task_sizes: tuple[int, ...] | None = Field(None, description="classes per task; default the benchmark's")
    val_fraction: float = Field(
        0.0, ge=0, lt=1, description="hold out this share of the training set and evaluate on it"
    )
    max_train_per_class: int | None = Field(None, ge=1, description="reduced budget: first so many items of each class")
    max_test_per_class: int | None = Field(None, ge=1)
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int | None = Field(None, ge=1)
    keep_memory: bool = Field(True, description="on a CPU, reuse freed memory: faster steps, higher peak")
    checkpoint_seconds: float = Field(60.0, ge=0, description="write a checkpoint at least this often")
    forward_transfer: bool = Field(False, description="also evaluate every task before training on it")
    tensorboard: bool = False

    @field_validator("dataset")
    @classmethod
    def _absolute_file(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError("a name of printable characters is needed")
        return str(Path(value).expanduser().resolve()) if value.endswith(".npz") else value

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value.expanduser().resolve() if value is not None else None

    @model_validator(mode="after")
    def _orders_agree(self) -> TrainConfig:
        if self.permute_classes and self.class_order is not None:
            raise ValueError("permute_classes and class_order exclude each other")
        if self.schedule == "multistep" and not self.milestones:
            raise ValueError("schedule multistep needs milestones, such as --set milestones=[35,45]")
        if self.milestones and self.schedule != "multistep":
            raise ValueError("milestones are used by schedule multistep only")
        return self

    def network_arguments(self) -> dict[str, Any]:
        """Keyword arguments for the backbone's factory besides shape and number of classes."""
        return dict(self.backbone_options)

    @property
    def per_step_loss(self) -> bool:
        """Whether classification losses are taken at every time step of a spiking network."""
        return False

    @property
    def frames(self) -> int | None:
        """Frames that event recordings are binned into; None where the network has no time."""
        return None
