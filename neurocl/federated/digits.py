"""The embedded problem: scikit-learn's digits on a network that was pre-trained on turned digits, in seconds."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurocl.federated.config import FederatedConfig
from neurocl.federated.method import Samples
from neurocl.federated.network import Classifier
from neurocl.federated.problem import Source
from neurocl.federated.randomness import stream, torch_stream

WIDTH, NUM_CLASSES = 128, 10
PRETRAIN_EPOCHS, PRETRAIN_LR = 30, 1e-3
TEST_SHARE = 0.3
SPLIT_SEED = 0


def digits(config: FederatedConfig) -> Source:
    """1,797 digits of 8 x 8 pixels, 70 % for training; a perceptron 64-128-128 that knows them turned by 90 degrees."""
    train, test = _samples()
    state = _pretrained()

    def build() -> Classifier:
        network = _network()
        network.backbone.load_state_dict(state)
        nn.init.zeros_(network.head.weight)
        return network

    return Source("digits", train, test, tuple(str(digit) for digit in range(NUM_CLASSES)), build)


class Perceptron(nn.Module):
    """64 -> 128 -> 128 with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, WIDTH)
        self.fc2 = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x.flatten(1)).relu()).relu()
        return out


def _network() -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier(Perceptron(), WIDTH, NUM_CLASSES)


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
def _pretrained() -> dict[str, Tensor]:
    """Weights of the perceptron after it has learnt the training digits turned by 90 degrees."""
    train, _ = _samples()
    turned = train.x.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1)
    network = _network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=PRETRAIN_LR)
    generator = torch_stream(0, "digits pre-training", 0)
    for _ in range(PRETRAIN_EPOCHS):
        for rows in torch.randperm(len(turned), generator=generator).split(32):
            loss = F.cross_entropy(network(turned[rows]), train.y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return {name: value.detach().clone() for name, value in network.backbone.state_dict().items()}
