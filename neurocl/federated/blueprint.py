"""The networks of neurocl's own problems, made again from a few plain values: no data, no weights, nobody's code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from neurocl.errors import UserError
from neurocl.federated.network import Classifier


def network_of(blueprint: Mapping[str, Any], num_classes: int) -> Classifier:
    """The network of a :class:`~neurocl.federated.problem.Source`, with any weights.

    Args:
        blueprint: of the source.
        num_classes: C.

    Raises:
        UserError: no such network.
    """
    kind, backbone = blueprint.get("kind"), blueprint.get("backbone")
    # Weights are drawn and thrown away; that must not touch anybody else's random numbers.
    with torch.random.fork_rng(devices=[]):
        if kind == "digits" and backbone in ("perceptron", "vit"):
            from neurocl.federated import digits

            return digits.empty_network(backbone == "vit")
        if kind == "features" and backbone in ("perceptron", "vit"):
            from neurocl.federated import pictures

            return pictures.empty_network(backbone, num_classes)
        if kind == "transformers":
            from neurocl.federated.transformers_vit import empty_transformer

            own = {key: blueprint[key] for key in ("side", "mean", "std") if key in blueprint}
            if not isinstance(blueprint.get("model"), dict) or len(own) < 3:
                raise UserError("a network of transformers needs model, side, mean and std")
            return empty_transformer(blueprint["model"], num_classes, **own)
    raise UserError(f"there is no network {kind!r} with backbone {backbone!r}")
