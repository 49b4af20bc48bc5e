"""Real pictures: a frozen EfficientNet-Lite0, and a small network over its features that was pre-trained elsewhere.

Or the pictures themselves, for a Vision Transformer of transformers from a folder.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurocl.backbones.tokens import cached_tokens
from neurocl.backbones.vit import VisionTransformer, VitConfig
from neurocl.data.domains import load_domain
from neurocl.federated.config import FederatedConfig
from neurocl.federated.method import Samples
from neurocl.federated.network import Classifier
from neurocl.federated.pretraining import Recipe, pretrained
from neurocl.federated.problem import VIT_PLACES, Source, choose

FEATURES, WIDTH = 320, 256
TOKENS, VIT_WIDTH = 25, 128
PRETRAINED_ON = "tiny-imagenet-100"
RECIPES = {
    "perceptron": Recipe("pictures", epochs=20, batch_size=64, lr=1e-3, weight_decay=0.05),
    "vit": Recipe("pictures vit", epochs=10, batch_size=64, lr=1e-3, weight_decay=0.05, warmup=0.1),
}


def pictures(config: FederatedConfig) -> Source:
    """A picture domain of :mod:`neurocl.data.domains`.

    ``perceptron`` sees the encoder's pooled features, ``vit`` its feature map as 25 tokens; both know Tiny-ImageNet. A
    folder is a model of transformers that sees the pictures.

    Raises:
        UserError: the pictures, the encoder's weights or the folder's model are not here.
    """
    name = config.dataset
    if config.backbone and Path(config.backbone).is_dir():
        from neurocl.federated.transformers_vit import transformers_source

        return transformers_source(config, Path(config.backbone))
    kind = choose(config, "perceptron", "vit")
    train, test, class_names = _samples(name, kind, config.data_dir)

    def build() -> Classifier:
        network = empty_network(kind, len(class_names))
        network.backbone.load_state_dict(_pretrained(kind, config.data_dir))
        nn.init.zeros_(network.head.weight)
        return network

    places = VIT_PLACES if kind == "vit" else ()
    told = "feature maps of neurocl's EfficientNet-Lite0 as 25 tokens, see neurocl.backbones.tokens"
    return Source(
        name,
        train,
        test,
        class_names,
        build,
        lr=3e-4,
        lora_places=places,
        blueprint={"kind": "features", "backbone": kind},
        inputs=told if kind == "vit" else f"{told}, and the mean of these",
    )


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


def empty_network(kind: str, num_classes: int) -> Classifier:
    """The network before it knows anything, ``perceptron`` or ``vit``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "vit":
            config = VitConfig(input_shape=(TOKENS, FEATURES), width=VIT_WIDTH, depth=4, heads=4, embed_dim=VIT_WIDTH)
            return Classifier(VisionTransformer(config), VIT_WIDTH, num_classes)
        return Classifier(FeaturePerceptron(), WIDTH, num_classes)


@cache
def _samples(name: str, kind: str, data_dir: Path | None) -> tuple[Samples, Samples, tuple[str, ...]]:
    domain = load_domain(name, data_dir=data_dir)
    parts = {}
    for split in ("train", "val", "test"):
        tokens = torch.from_numpy(cached_tokens(f"{name}-{split}", domain.images[split]).astype("float32"))
        parts[split] = Samples(tokens if kind == "vit" else tokens.mean(dim=1), torch.from_numpy(domain.labels[split]))
    # Nothing is chosen on validation pictures here, so they train.
    train = Samples(torch.cat([parts["train"].x, parts["val"].x]), torch.cat([parts["train"].y, parts["val"].y]))
    return train, parts["test"], domain.class_names


@cache
def _pretrained(kind: str, data_dir: Path | None) -> dict[str, Tensor]:
    """Weights of the backbone after it has learnt a hundred classes of Tiny-ImageNet."""
    train, _, class_names = _samples(PRETRAINED_ON, kind, data_dir)
    return pretrained(RECIPES[kind], lambda: empty_network(kind, len(class_names)), train)
