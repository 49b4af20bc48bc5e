"""Real pictures: features of a frozen EfficientNet-Lite0, and a perceptron over them that was pre-trained elsewhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurocl.backbones.tokens import cached_tokens
from neurocl.data.domains import load_domain
from neurocl.federated.config import FederatedConfig
from neurocl.federated.method import Samples
from neurocl.federated.network import Classifier
from neurocl.federated.problem import Source
from neurocl.federated.randomness import torch_stream

FEATURES, WIDTH = 320, 256
PRETRAINED_ON = "tiny-imagenet-100"
PRETRAIN_EPOCHS, PRETRAIN_LR = 20, 1e-3


def pictures(config: FederatedConfig) -> Source:
    """A picture domain of :mod:`neurocl.data.domains` behind the encoder; the perceptron knows Tiny-ImageNet.

    Raises:
        UserError: the pictures or the encoder's weights are not here.
    """
    name = config.dataset
    train, test, class_names = _samples(name, config.data_dir)
    state = _pretrained(config.data_dir)

    def build() -> Classifier:
        network = _network(len(class_names))
        network.backbone.load_state_dict(state)
        nn.init.zeros_(network.head.weight)
        return network

    return Source(name, train, test, class_names, build, lr=3e-4)


class FeaturePerceptron(nn.Module):
    """320 -> 256 -> 256 with GELU over normalised features."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.fc1 = nn.Linear(FEATURES, WIDTH)
        self.fc2 = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(self.norm(x)))
        out: Tensor = hidden + F.gelu(self.fc2(hidden))
        return out


def _network(num_classes: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier(FeaturePerceptron(), WIDTH, num_classes)


@cache
def _samples(name: str, data_dir: Path | None) -> tuple[Samples, Samples, tuple[str, ...]]:
    domain = load_domain(name, data_dir=data_dir)
    parts = {}
    for split in ("train", "val", "test"):
        tokens = cached_tokens(f"{name}-{split}", domain.images[split])
        pooled = torch.from_numpy(tokens.astype("float32").mean(axis=1))
        parts[split] = Samples(pooled, torch.from_numpy(domain.labels[split]))
    # Nothing is chosen on validation pictures here, so they train.
    train = Samples(torch.cat([parts["train"].x, parts["val"].x]), torch.cat([parts["train"].y, parts["val"].y]))
    return train, parts["test"], domain.class_names


@cache
def _pretrained(data_dir: Path | None) -> dict[str, Tensor]:
    """Weights of the perceptron after it has learnt a hundred classes of Tiny-ImageNet."""
    train, _, class_names = _samples(PRETRAINED_ON, data_dir)
    network = _network(len(class_names))
    optimizer = torch.optim.AdamW(network.parameters(), lr=PRETRAIN_LR, weight_decay=0.05)
    generator = torch_stream(0, "pictures pre-training", 0)
    for _ in range(PRETRAIN_EPOCHS):
        for rows in torch.randperm(len(train), generator=generator).split(64):
            loss = F.cross_entropy(network(train.x[rows]), train.y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return {name: value.detach().clone() for name, value in network.backbone.state_dict().items()}
