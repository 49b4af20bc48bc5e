"""Residual networks for small images: ResNet18 with a 3x3 stem, and the ANN twin of the spiking ResNet19.

Reference: He et al., "Deep residual learning", 2016; layout of the twin as in the STAER code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def scaled(channels: Sequence[int], width: float) -> tuple[int, ...]:
    """Channel counts times ``width``, at least 1."""
    return tuple(max(1, round(count * width)) for count in channels)


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the input (through conv1x1-BN where shape changes), ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, stages of blocks, global average pooling, linear head.

    Args:
        input_shape: (C, H, W).
        num_classes: K.
        stem: channels of the 3x3 stem.
        blocks: blocks per stage; every stage but the first halves the resolution.
        channels: channels per stage.
        bias: whether the head has a bias.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        stem: int,
        blocks: Sequence[int],
        channels: Sequence[int],
        bias: bool,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(input_shape[-3], stem, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(stem)
        stages = []
        previous = stem
        for index, (count, width) in enumerate(zip(blocks, channels, strict=True)):
            stride = 1 if index == 0 else 2
            stages.append(Block(previous, width, stride))
            stages.extend(Block(width, width, 1) for _ in range(count - 1))
            previous = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(previous, num_classes, bias=bias)
        self.num_features = previous
        # Convolutions follow the layout of their weights, and this one is the faster.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, num_features]."""
        h = torch.relu(self.norm(self.stem(x)))
        pooled: Tensor = self.stages(h).mean(dim=(2, 3))
        return pooled

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, K]."""
        logits: Tensor = self.head(self.features(x))
        return logits


def resnet18(input_shape: Sequence[int], num_classes: int, *, width: float = 1.0) -> ResNet:
    """ResNet18 of the continual-learning literature: 2-2-2-2 blocks, 64 to 512 channels times ``width``."""
    channels = scaled((64, 128, 256, 512), width)
    return ResNet(input_shape, num_classes, stem=channels[0], blocks=(2, 2, 2, 2), channels=channels, bias=True)


def resnet19(input_shape: Sequence[int], num_classes: int, *, width: float = 1.0) -> ResNet:
    """ANN twin of the spiking ResNet19: 3-3-2 blocks, 128-256-512 channels times ``width``, head without bias."""
    channels = scaled((128, 256, 512), width)
    return ResNet(input_shape, num_classes, stem=channels[0], blocks=(3, 3, 2), channels=channels, bias=False)


def resnet_small(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    stem: int = 64,
    blocks: Sequence[int] = (1, 1),
    channels: Sequence[int] = (64, 128),
) -> ResNet:
    """ANN twin of ``spiking-resnet-small``."""
    return ResNet(input_shape, num_classes, stem=stem, blocks=blocks, channels=channels, bias=False)
