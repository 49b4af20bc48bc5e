"""A Vision Transformer of a few hundred weights with random pictures to train it on, for tests of training."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from neurocl.backbones.vit import VitConfig
from neurocl.merging.suite import Items
from neurocl.merging.training import Fit

NUM_CLASSES = 3
HOW = Fit(epochs=3, lr=3e-3, batch_size=8, weight_decay=0.0, warmup=0.0)


def vit() -> VitConfig:
    return VitConfig(input_shape=(1, 4, 4), patch_size=2, width=8, depth=1, heads=2, embed_dim=5)


def items(seed: int = 0, count: int = 24) -> Items:
    """Random pictures with labels that depend on where they are bright."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(NUM_CLASSES, size=count)
    pictures = generator.integers(0, 120, size=(count, 1, 4, 4))
    pictures[np.arange(count), 0, labels] += 130
    return Items(pictures.astype(np.uint8), torch.from_numpy(labels))


def head() -> torch.Tensor:
    """Fixed class vectors [K, E]."""
    return F.normalize(torch.randn(NUM_CLASSES, 5, generator=torch.Generator().manual_seed(9)), dim=1)
