"""The embedded problem: scikit-learn's digits on a network that was pre-trained on turned digits, in seconds."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from neurocl.backbones.vit import VisionTransformer, VitConfig
from neurocl.federated.config import FederatedConfig
from neurocl.federated.method import Samples
from neurocl.federated.network import Classifier
from neurocl.federated.pretraining import Recipe, pretrained
from neurocl.federated.problem import VIT_PLACES, Source, choose
from neurocl.federated.randomness import stream

WIDTH, NUM_CLASSES = 128, 10
PRETRAIN_EPOCHS, PRETRAIN_LR = 30, 1e-3
TEST_SHARE = 0.3
SPLIT_SEED = 0


def digits(config: FederatedConfig) -> Source:
    """1,797 digits of 8 x 8 pixels, 70 % for training, and a small network that knows them turned by 90 degrees.

    Raises:
        UserError: another backbone than ``perceptron`` and ``vit``.
    """
    train, test = _samples()
    names = tuple(str(digit) for digit in range(NUM_CLASSES))
    transformer = choose(config, "perceptron", "vit") == "vit"

    def build() -> Classifier:
        network = empty_network(transformer)
        network.backbone.load_state_dict(_pretrained(transformer))
        nn.init.zeros_(network.head.weight)
        return network

    return Source(
        "digits",
        train,
        test,
        names,
        build,
        lora_places=VIT_PLACES if transformer else (),
        blueprint={"kind": "digits", "backbone": "vit" if transformer else "perceptron"},
        inputs="8 x 8 pixels, row by row, each divided by 16",
    )


class Perceptron(nn.Module):
    """64 -> 128 -> 128 with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, WIDTH)
        self.fc2 = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x.flatten(1)).relu()).relu()
        return out


class PixelTransformer(nn.Module):
    """Three blocks of width 64 over sixteen patches of 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = VisionTransformer(
            VitConfig(input_shape=(1, 8, 8), patch_size=2, width=64, depth=3, heads=4, embed_dim=64)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.vit(x.view(-1, 1, 8, 8))
        return out


def empty_network(transformer: bool) -> Classifier:
    """The network before it knows anything: the transformer or the perceptron."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (
            Classifier(PixelTransformer(), 64, NUM_CLASSES)
            if transformer
            else Classifier(Perceptron(), WIDTH, NUM_CLASSES)
        )


@cache
def _samples() -> tuple[Samples, Samples]:
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.from_numpy(np.asarray(found.data, dtype=np.float32) / 16)
    y = torch.from_numpy(np.asarray(found.target, dtype=np.int64))
    order = torch.from_numpy(stream(SPLIT_SEED, "digits", 0).permutation(len(y)))
    cut = round(TEST_SHARE * len(y))
    test, train = order[:cut], order[cut:]
    return Samples(x[train], y[train]), Samples(x[test], y[test])


@cache
def _pretrained(transformer: bool) -> dict[str, Tensor]:
    """Weights of the backbone after it has learnt the training digits turned by 90 degrees."""
    train, _ = _samples()
    turned = Samples(train.x.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1), train.y)
    recipe = Recipe("digits vit" if transformer else "digits", PRETRAIN_EPOCHS, 32, PRETRAIN_LR)
    return pretrained(recipe, lambda: empty_network(transformer), turned)
