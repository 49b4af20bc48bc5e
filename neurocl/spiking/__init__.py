"""Spiking networks that learn streams of tasks: neurons, networks, soft-DTW, STAER, energy and export."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neurocl.spiking.config import NeuronConfig, SpikingTrainConfig
    from neurocl.spiking.encoding import Encoder
    from neurocl.spiking.network import SpikingClassifier, SpikingMlp, SpikingResNet
    from neurocl.spiking.neuron import lif, lif_membrane
    from neurocl.spiking.soft_dtw import soft_dtw, soft_dtw_alignment, soft_dtw_divergence
    from neurocl.spiking.staer import Staer, StaerConfig, alignment_loss

_HOMES = {
    "NeuronConfig": "config",
    "SpikingTrainConfig": "config",
    "Encoder": "encoding",
    "SpikingClassifier": "network",
    "SpikingMlp": "network",
    "SpikingResNet": "network",
    "lif": "neuron",
    "lif_membrane": "neuron",
    "soft_dtw": "soft_dtw",
    "soft_dtw_alignment": "soft_dtw",
    "soft_dtw_divergence": "soft_dtw",
    "Staer": "staer",
    "StaerConfig": "staer",
    "alignment_loss": "staer",
}

__all__ = [
    "Encoder",
    "NeuronConfig",
    "SpikingClassifier",
    "SpikingMlp",
    "SpikingResNet",
    "SpikingTrainConfig",
    "Staer",
    "StaerConfig",
    "alignment_loss",
    "lif",
    "lif_membrane",
    "soft_dtw",
    "soft_dtw_alignment",
    "soft_dtw_divergence",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        # importing neurocl.spiking.soft_dtw binds the module to this name first; the function replaces it
        value = getattr(importlib.import_module(f"neurocl.spiking.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'neurocl.spiking' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
