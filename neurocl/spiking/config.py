"""The configuration of a spiking run: what the ordinary one holds plus time, encoder and neuron (torch-free)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from neurocl.config import Config
from neurocl.continual.config import OptimizerConfig, TrainConfig


class NeuronConfig(Config):
    """Leaky integrate-and-fire neurons; the defaults are STAER's."""

    decay: float = Field(0.5, ge=0, le=1, description="membrane decay per step")
    threshold: float = Field(1.0, gt=0)
    reset: Literal["delayed", "immediate", "hard"] = Field(
        "delayed",
        description="delayed: subtract the threshold one step later; immediate: at once; hard: to zero",
    )
    alpha: float = Field(2.0, gt=0, description="sharpness of the arctan surrogate gradient")
    learnable: bool = Field(False, description="learn decay and threshold of every layer (slower)")
    backend: Literal["auto", "spikingjelly"] = Field(
        "auto", description="spikingjelly: its LIFNode, another model (immediate reset, fires at >=)"
    )

    @model_validator(mode="after")
    def _spikingjelly_has_constants(self) -> NeuronConfig:
        if self.backend == "spikingjelly" and (self.learnable or self.reset == "delayed"):
            raise ValueError("the spikingjelly back end has reset immediate or hard and no learnable constants")
        if self.backend == "spikingjelly" and self.decay == 0:
            raise ValueError("the spikingjelly back end needs a decay above 0")
        return self


class SpikingTrainConfig(TrainConfig):
    """One run of a spiking network; see :class:`neurocl.continual.config.TrainConfig` for the rest."""

    area: Literal["continual", "spiking"] = "spiking"
    method: str = Field("staer", description="see `neurocl list methods`")
    backbone: str = Field("spiking-mlp", description="see `neurocl list backbones`")
    timesteps: int = Field(4, ge=1, description="T, steps of simulation; STAER needs an even number")
    encoder: Literal["static", "poisson", "latency"] = Field(
        "static", description="how an image becomes input over time"
    )
    neuron: NeuronConfig = NeuronConfig()
    temporal_separation: bool = Field(False, description="classification loss at every time step")
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw", lr=3e-3, weight_decay=0.0)
    schedule: Literal["constant", "cosine", "multistep"] = "cosine"

    def network_arguments(self) -> dict[str, Any]:
        return {
            "timesteps": self.timesteps,
            "encoder": self.encoder,
            "neuron": self.neuron,
            **self.backbone_options,
        }

    @property
    def per_step_loss(self) -> bool:
        return self.temporal_separation

    @property
    def frames(self) -> int | None:
        return self.timesteps
