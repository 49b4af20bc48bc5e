"""A Vision Transformer of Hugging Face's transformers, from a folder, over raw pictures.

``B`` batch, ``D`` width of the transformer.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurocl.data.domains import load_domain
from neurocl.errors import UserError
from neurocl.federated.config import FederatedConfig
from neurocl.federated.method import Samples
from neurocl.federated.network import Classifier
from neurocl.federated.problem import Source
from neurocl.runs import read_json

#: beginnings of what a configuration may say to load code, kernels or other models
FOREIGN = ("_", "auto_map", "attn", "kernel", "quantization", "backbone")
LR = 1e-4  # a transformer that was trained on millions of pictures stands no more


class PictureTransformer(nn.Module):
    """Pictures [B, 3, H, W] in 0 to 1 -> class tokens [B, D]; resized and normalised as the folder says.

    Args:
        model: of transformers.
        side: of the pictures that it was made for.
        mean, std: of their colours.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, side: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model = model
        self.side = side
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(-1, 3, -1, -1)
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        out: Tensor = self.model(pixel_values=(x - self.mean) / self.std).last_hidden_state[:, 0]
        return out


def transformers_source(config: FederatedConfig, folder: Path) -> Source:
    """A picture domain for the model of a folder with ``config.json`` and safetensors.

    Raises:
        UserError: transformers is not installed, or the folder holds no picture transformer that it can load.
    """
    name = config.dataset
    train, test, class_names = _pictures(name, config.data_dir)
    settings = _settings(folder)
    state = _model(folder).state_dict()

    def build() -> Classifier:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _empty(folder)
            model.load_state_dict(state)
            network = Classifier(PictureTransformer(model, **settings), int(model.config.hidden_size), len(class_names))
        nn.init.zeros_(network.head.weight)
        return network

    return Source(
        name,
        train,
        test,
        class_names,
        build,
        lr=LR,
        blueprint={"kind": "transformers", "model": json.loads(_model(folder).config.to_json_string()), **settings},
        inputs="RGB pictures with numbers from 0 to 1, of any size: the network resizes and normalises them itself",
    )


def empty_transformer(
    model: dict[str, Any], num_classes: int, *, side: int, mean: list[float], std: list[float]
) -> Classifier:
    """The network of a configuration of transformers, before it knows anything.

    Raises:
        UserError: transformers is not installed, or does not know such a model.
    """
    transformers = _transformers()
    values = {key: value for key, value in model.items() if key != "model_type" and not key.startswith(FOREIGN)}
    try:
        config = transformers.AutoConfig.for_model(model.get("model_type"), **values)
        built = transformers.AutoModel.from_config(config, trust_remote_code=False, add_pooling_layer=False)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"transformers cannot build this model: {' '.join(str(error).split())[:200]}") from None
    return Classifier(PictureTransformer(built.float(), side, mean, std), int(config.hidden_size), num_classes)


@cache
def _pictures(name: str, data_dir: Path | None) -> tuple[Samples, Samples, tuple[str, ...]]:
    domain = load_domain(name, data_dir=data_dir)
    parts = {
        split: Samples(torch.from_numpy(images).float() / 255, torch.from_numpy(domain.labels[split]))
        for split, images in domain.images.items()
    }
    train = Samples(torch.cat([parts["train"].x, parts["val"].x]), torch.cat([parts["train"].y, parts["val"].y]))
    return train, parts["test"], domain.class_names


def _transformers() -> Any:
    from neurocl.compat.torchvision import ensure_torchaudio, ensure_torchvision

    ensure_torchvision()
    ensure_torchaudio()
    try:
        import transformers
        from transformers.utils import logging
    except ImportError:
        raise UserError("backbones of transformers need: pip install 'neurocl[vision]'") from None
    logging.set_verbosity_error()  # a head that is left out is no news
    logging.disable_progress_bar()
    return transformers


@cache
def _model(folder: Path) -> Any:
    return load_transformer(folder)


def load_transformer(folder: Path) -> Any:
    """The picture transformer of a folder, without its pooling layer, in float32.

    Raises:
        UserError: transformers is not installed, or the folder holds no picture transformer that it can load.
    """
    transformers = _transformers()
    try:
        model = transformers.AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            add_pooling_layer=False,
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{folder}: transformers cannot load it: {' '.join(str(error).split())[:200]}") from None
    if not hasattr(model.config, "image_size") or not hasattr(model.config, "hidden_size"):
        raise UserError(f"{folder}: a {type(model).__name__} is no picture transformer")
    return model


def _empty(folder: Path) -> Any:
    return type(_model(folder))(_model(folder).config, add_pooling_layer=False)


def _settings(folder: Path) -> dict[str, Any]:
    """Side and colours of the pictures, from the model's and the processor's configuration."""
    side = _model(folder).config.image_size
    found: dict[str, Any] = {"side": side if isinstance(side, int) else side[0], "mean": [0.5] * 3, "std": [0.5] * 3}
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        document = read_json(processor)
        for key, name in (("mean", "image_mean"), ("std", "image_std")):
            values = document.get(name, found[key]) if isinstance(document, dict) else None
            if not isinstance(values, list) or len(values) != 3:
                raise UserError(f"{processor}: {name} must be three numbers, got {json.dumps(values)[:80]}")
            found[key] = [float(value) for value in values]
    return found
