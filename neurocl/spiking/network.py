"""Spiking networks: the residual networks of STAER and a multi-layer perceptron, stateless between calls.

A network maps a sequence [T, B, C, H, W] to logits over time [T, B, K]. Convolutions and normalisation
see time as extra batch; only the neurons loop over it. Letters: T steps, B batch, C channels, K classes.

Reference: layout and neuron of the STAER code (arXiv 2601.20870); Zheng et al., 2021, for normalisation
over time and batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from neurocl.backbones.resnet import scaled
from neurocl.errors import UserError
from neurocl.spiking.config import NeuronConfig
from neurocl.spiking.encoding import Encoder, EncoderName, is_static
from neurocl.spiking.neuron import lif, lif_residual, norm_lif


class Lif(nn.Module):
    """LIF neurons over a sequence; forward hooks see their spikes.

    Args:
        neuron: constants, reset and back end.
    """

    def __init__(self, neuron: NeuronConfig) -> None:
        super().__init__()
        self.neuron = neuron
        self.decay: float | nn.Parameter = neuron.decay
        self.threshold: float | nn.Parameter = neuron.threshold
        if neuron.learnable:
            self.decay = nn.Parameter(torch.tensor(neuron.decay))
            self.threshold = nn.Parameter(torch.tensor(neuron.threshold))

    def _spikingjelly(self, current: Tensor) -> Tensor:
        from spikingjelly.activation_based import neuron, surrogate

        node = neuron.LIFNode(
            tau=1.0 / (1.0 - self.neuron.decay) if self.neuron.decay < 1 else math.inf,
            decay_input=False,
            v_threshold=self.neuron.threshold,
            v_reset=None if self.neuron.reset == "immediate" else 0.0,
            detach_reset=True,
            surrogate_function=surrogate.ATan(alpha=self.neuron.alpha),
            step_mode="m",
        )
        spikes: Tensor = node(current)
        return spikes

    def forward(self, current: Tensor, other: Tensor | None = None) -> Tensor:
        """Spikes for the input current (plus ``other``), [T, B, ...] -> [T, B, ...]."""
        if self.neuron.backend == "spikingjelly":
            return self._spikingjelly(current if other is None else current + other)
        constants: dict[str, Any] = {
            "decay": self.decay,
            "threshold": self.threshold,
            "reset": self.neuron.reset,
            "alpha": self.neuron.alpha,
        }
        if other is not None:
            return lif_residual(current, other, **constants)
        return lif(current, **constants)


class NormLif(nn.Module):
    """BatchNorm over time and batch, then LIF neurons.

    Args:
        neuron: constants of the neurons.
        channels: C.
        dims: 1 for vectors [N, C], 2 for maps [N, C, H, W].
    """

    def __init__(self, neuron: NeuronConfig, channels: int, dims: int = 2) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if dims == 2 else nn.BatchNorm1d(channels)
        self.lif = Lif(neuron)

    def forward(self, x: Tensor, timesteps: int, repeat: int = 1) -> Tensor:
        """Normalise and fire: [T*B, C, ...] -> spikes [T, B, C, ...].

        With ``repeat`` = T, ``x`` is [B, C, ...] and stands for T equal steps.

        Raises:
            UserError: training with a single value per channel, where a variance does not exist.
        """
        if self.norm.training and repeat * x.numel() // x.shape[1] < 2:
            raise UserError("BatchNorm sees one value per channel; use batch_size >= 2 or timesteps >= 2")
        neuron = self.lif.neuron
        if neuron.learnable or neuron.backend != "auto":
            expanded = x.repeat(repeat, *([1] * (x.ndim - 1))) if repeat > 1 else x
            spikes: Tensor = self.lif(self.norm(expanded).unflatten(0, (timesteps, -1)))
            return spikes
        fused = norm_lif(
            x,
            self.norm,
            timesteps=timesteps,
            decay=neuron.decay,
            threshold=neuron.threshold,
            reset=neuron.reset,
            alpha=neuron.alpha,
            repeat=repeat,
            track=self.norm.track_running_stats,
        )
        sequence: Tensor = fused.unflatten(0, (timesteps, -1))  # type: ignore[no-untyped-call]
        return sequence


@contextmanager
def frozen_statistics(network: nn.Module, frozen: bool = True) -> Iterator[None]:
    """Within the block, BatchNorm in training mode uses batch statistics and leaves its running ones alone."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)] if frozen else []
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class SpikingBlock(nn.Module):
    """conv-BN-LIF, conv-BN-LIF, plus the input (through conv1x1-BN where shape changes), LIF."""

    def __init__(self, in_channels: int, channels: int, stride: int, neuron: NeuronConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.lif1 = NormLif(neuron, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.lif2 = NormLif(neuron, channels)
        self.lif3 = Lif(neuron)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, C, H, W] -> [T, B, C', H', W']."""
        steps = x.shape[0]
        flat = x.flatten(0, 1)
        h = self.lif1(self.conv1(flat), steps)
        h = self.lif2(self.conv2(h.flatten(0, 1)), steps)
        identity = x if self.shortcut is None else self.shortcut(flat).unflatten(0, (steps, -1))
        spikes: Tensor = self.lif3(h, identity)
        return spikes


class SpikingNetwork(nn.Module, ABC):
    """Base of the sequence networks: ``features`` then a linear head without bias."""

    head: nn.Linear

    @abstractmethod
    def features(self, x_seq: Tensor) -> Tensor:
        """[T, B, C, H, W] -> features over time [T, B, D]."""

    def forward(self, x_seq: Tensor) -> Tensor:
        """[T, B, C, H, W] -> logits [T, B, K] in training mode, their time mean [B, K] in evaluation mode."""
        logits: Tensor = self.head(self.features(x_seq))
        if self.training:
            return logits
        return (logits.float() if logits.dtype == torch.bfloat16 else logits).mean(dim=0)


class SpikingResNet(SpikingNetwork):
    """Spiking residual network.

    Args:
        in_channels: C of the input.
        num_classes: K.
        stem: channels of the 3x3 stem.
        blocks: blocks per stage; every stage but the first halves the resolution.
        channels: channels per stage.
        neuron: constants of all LIF layers.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        stem: int = 128,
        blocks: Sequence[int] = (3, 3, 2),
        channels: Sequence[int] = (128, 256, 512),
        neuron: NeuronConfig | None = None,
    ) -> None:
        super().__init__()
        neuron = neuron or NeuronConfig()
        if len(blocks) != len(channels):
            raise UserError(f"blocks and channels must have one entry per stage, got {blocks} and {channels}")
        self.stem = nn.Conv2d(in_channels, stem, 3, 1, 1, bias=False)
        self.stem_lif = NormLif(neuron, stem)
        stages = []
        previous = stem
        for index, (count, width) in enumerate(zip(blocks, channels, strict=True)):
            first = SpikingBlock(previous, width, 1 if index == 0 else 2, neuron)
            stages.append(nn.Sequential(first, *(SpikingBlock(width, width, 1, neuron) for _ in range(count - 1))))
            previous = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(previous, num_classes, bias=False)
        self.num_features = previous

    def features(self, x_seq: Tensor) -> Tensor:
        """[T, B, C, H, W] -> pooled spikes [T, B, D]. A static sequence passes the stem's convolution once."""
        steps = x_seq.shape[0]
        repeat = steps if is_static(x_seq) else 1
        flat = x_seq[0] if repeat > 1 else x_seq.flatten(0, 1)
        flat = flat.contiguous(memory_format=torch.channels_last)
        spikes = self.stem_lif(self.stem(flat), steps, repeat)
        pooled: Tensor = self.stages(spikes).mean(dim=(3, 4))
        return pooled


class SpikingMlp(SpikingNetwork):
    """Fully connected spiking network: linear-BN-LIF layers and a linear head, all without bias.

    Args:
        num_inputs: C*H*W.
        num_classes: K.
        hidden: width of each hidden layer.
        neuron: constants of all LIF layers.
    """

    def __init__(
        self,
        num_inputs: int,
        num_classes: int,
        hidden: Sequence[int] = (128, 128),
        neuron: NeuronConfig | None = None,
    ) -> None:
        super().__init__()
        neuron = neuron or NeuronConfig()
        widths = [num_inputs, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))
        self.lifs = nn.ModuleList(NormLif(neuron, width, dims=1) for width in hidden)
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        self.num_features = widths[-1]

    def features(self, x_seq: Tensor) -> Tensor:
        """[T, B, ...] -> spikes of the last hidden layer [T, B, D]."""
        steps = x_seq.shape[0]
        repeat = steps if is_static(x_seq) else 1
        flat = x_seq[0].flatten(1) if repeat > 1 else x_seq.flatten(0, 1).flatten(1)
        spikes = flat
        for layer, neurons in zip(self.hidden, self.lifs, strict=True):
            spikes = neurons(layer(flat), steps, repeat)
            flat, repeat = spikes.flatten(0, 1), 1
        return spikes


class SpikingClassifier(nn.Module):
    """Encoder and spiking network: what a continual-learning method trains.

    Args:
        network: maps [T, B, ...] to logits over time.
        encoder: turns items into [T, B, ...].
    """

    def __init__(self, network: SpikingNetwork, encoder: Encoder) -> None:
        super().__init__()
        self.network = network
        self.encoder = encoder

    @property
    def timesteps(self) -> int:
        return self.encoder.timesteps

    def features(self, x: Tensor) -> Tensor:
        """[B, ...] -> time-averaged features [B, D]."""
        return self.network.features(self.encoder(x)).mean(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> logits [T, B, K] in training mode, [B, K] in evaluation mode."""
        logits: Tensor = self.network(self.encoder(x))
        return logits


def _resnet(
    input_shape: Sequence[int],
    num_classes: int,
    timesteps: int,
    encoder: EncoderName,
    neuron: NeuronConfig,
    stem: int,
    blocks: Sequence[int],
    channels: Sequence[int],
) -> SpikingClassifier:
    network = SpikingResNet(input_shape[-3], num_classes, stem=stem, blocks=blocks, channels=channels, neuron=neuron)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return SpikingClassifier(network, Encoder(timesteps, encoder))


def spiking_resnet19(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    timesteps: int,
    encoder: EncoderName = "static",
    neuron: NeuronConfig | None = None,
    width: float = 1.0,
) -> SpikingClassifier:
    """STAER's network: stem 128, 3-3-2 blocks of 128-256-512 channels times ``width``."""
    channels = scaled((128, 256, 512), width)
    neuron = neuron or NeuronConfig()
    return _resnet(input_shape, num_classes, timesteps, encoder, neuron, channels[0], (3, 3, 2), channels)


def spiking_resnet18(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    timesteps: int,
    encoder: EncoderName = "static",
    neuron: NeuronConfig | None = None,
    width: float = 1.0,
) -> SpikingClassifier:
    """Stem 64, 2-2-2-2 blocks of 64 to 512 channels times ``width``."""
    channels = scaled((64, 128, 256, 512), width)
    neuron = neuron or NeuronConfig()
    return _resnet(input_shape, num_classes, timesteps, encoder, neuron, channels[0], (2, 2, 2, 2), channels)


def spiking_resnet_small(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    timesteps: int,
    encoder: EncoderName = "static",
    neuron: NeuronConfig | None = None,
    stem: int = 64,
    blocks: Sequence[int] = (1, 1),
    channels: Sequence[int] = (64, 128),
) -> SpikingClassifier:
    """A spiking ResNet that a CPU can train."""
    neuron = neuron or NeuronConfig()
    return _resnet(input_shape, num_classes, timesteps, encoder, neuron, stem, blocks, channels)


def spiking_mlp(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    timesteps: int,
    encoder: EncoderName = "static",
    neuron: NeuronConfig | None = None,
    hidden: Sequence[int] = (128, 128),
) -> SpikingClassifier:
    """Fully connected spiking network on flattened items."""
    item = input_shape[-3:] if len(input_shape) == 4 else input_shape
    network = SpikingMlp(math.prod(item), num_classes, hidden, neuron)
    return SpikingClassifier(network, Encoder(timesteps, encoder))
