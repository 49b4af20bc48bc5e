"""CCVR: FedAvg, and after each round the head is re-trained on draws from the classes of the current task."""

from __future__ import annotations

from typing import Literal

from neurocl.federated.prototypes import Prototypes, PrototypesConfig


class CcvrConfig(PrototypesConfig):
    """Of CCVR; as for all methods that re-train the head, with other defaults.

    Attributes:
        classes: the original knows one task only; ``seen`` re-trains on all tasks so far.
    """

    classes: Literal["seen", "task"] = "task"


class Ccvr(Prototypes):
    """Classifier calibration with virtual representations, class by class, after every round.

    Reference: Luo et al., "No fear of heterogeneity: classifier calibration for federated learning with non-IID data",
    NeurIPS 2021, arXiv 2106.05001.
    """

    Config = CcvrConfig
    config: CcvrConfig
