"""Spiking networks that learn streams of tasks: neurons, networks, soft-DTW, STAER, energy and export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neurocl.lazy import lazy_attributes

if TYPE_CHECKING:
    from neurocl.spiking.config import NeuronConfig, SpikingTrainConfig
    from neurocl.spiking.encoding import Encoder
    from neurocl.spiking.energy import EnergyReport, measure_energy
    from neurocl.spiking.export import export_run, to_nir
    from neurocl.spiking.network import SpikingClassifier, SpikingMlp, SpikingResNet
    from neurocl.spiking.neuron import lif, lif_membrane
    from neurocl.spiking.softdtw import soft_dtw, soft_dtw_alignment, soft_dtw_divergence
    from neurocl.spiking.staer import Staer, StaerConfig, alignment_loss

_HOMES = {
    "NeuronConfig": "config",
    "SpikingTrainConfig": "config",
    "Encoder": "encoding",
    "EnergyReport": "energy",
    "measure_energy": "energy",
    "export_run": "export",
    "to_nir": "export",
    "SpikingClassifier": "network",
    "SpikingMlp": "network",
    "SpikingResNet": "network",
    "lif": "neuron",
    "lif_membrane": "neuron",
    "soft_dtw": "softdtw",
    "soft_dtw_alignment": "softdtw",
    "soft_dtw_divergence": "softdtw",
    "Staer": "staer",
    "StaerConfig": "staer",
    "alignment_loss": "staer",
}

__all__ = [
    "Encoder",
    "EnergyReport",
    "NeuronConfig",
    "SpikingClassifier",
    "SpikingMlp",
    "SpikingResNet",
    "SpikingTrainConfig",
    "Staer",
    "StaerConfig",
    "alignment_loss",
    "export_run",
    "lif",
    "lif_membrane",
    "measure_energy",
    "soft_dtw",
    "soft_dtw_alignment",
    "soft_dtw_divergence",
    "to_nir",
]

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
