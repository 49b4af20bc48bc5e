"""The multi-layer perceptron of the MNIST continual-learning benchmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class Mlp(nn.Module):
    """Fully connected layers with ReLU and a linear head with bias, Xavier-uniform weights.

    Args:
        input_shape: of one item; everything is flattened.
        num_classes: K.
        hidden: width of each hidden layer.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, hidden: Sequence[int] = (100, 100)) -> None:
        super().__init__()
        widths = [math.prod(input_shape), *hidden]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(widths[-1], num_classes)
        for layer in (*self.hidden, self.head):
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
        self.num_features = widths[-1]

    def features(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, num_features]."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = layer(x).relu()
        return x

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> logits [B, K]."""
        logits: Tensor = self.head(self.features(x))
        return logits


def mlp(input_shape: Sequence[int], num_classes: int, *, hidden: Sequence[int] = (100, 100)) -> Mlp:
    """Factory behind the name ``mlp``."""
    return Mlp(input_shape, num_classes, hidden)
