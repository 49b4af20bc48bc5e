"""Weights that a federation starts from: a network trained on other data once, kept in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from neurocl import __version__
from neurocl.data.locate import cache_dir
from neurocl.federated.method import Samples
from neurocl.federated.network import Classifier
from neurocl.federated.randomness import torch_stream
from neurocl.runs import make_folder, write_error


@dataclass(frozen=True)
class Recipe:
    """How a network is pre-trained; part of what the weights are found by.

    Attributes:
        name: of network and data.
        epochs, batch_size, lr, weight_decay: of AdamW.
        warmup: share of the steps in which the rate rises; it then falls along a cosine. None keeps it constant.
    """

    name: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.0
    warmup: float | None = None


def pretrained(recipe: Recipe, build: Callable[[], Classifier], samples: Samples) -> dict[str, Tensor]:
    """Weights of the backbone after training on all classes of the samples.

    The result is the same on one machine with the same version of torch, in every process; it is kept in the cache, so
    that worker processes do not train again.

    Args:
        recipe: how.
        build: makes the network, with a head over all classes of the samples.
        samples: to train on.

    Raises:
        RunError: the cache cannot be written.
    """
    labels = hashlib.sha256(samples.y.numpy().tobytes()).hexdigest()
    data = [list(samples.x.shape), float(samples.x.double().sum()), labels]
    key = json.dumps([asdict(recipe), __version__, torch.__version__, *data])
    kept = cache_dir() / "federated" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if kept.is_file():
        try:
            # Copies: the file is mapped into memory, and nobody knows for how long it stays.
            return {name: value.clone() for name, value in load_file(kept).items()}
        except SafetensorError:
            kept.unlink(missing_ok=True)  # cut off by a full disk; it is made again
    network = build()
    _train(network, recipe, samples)
    state = {name: value.detach().clone().contiguous() for name, value in network.backbone.state_dict().items()}
    _keep(kept, state)
    return state


def _train(network: Classifier, recipe: Recipe, samples: Samples) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * -(-len(samples) // recipe.batch_size)
    if recipe.warmup is not None:
        rate = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.lr, total_steps=steps, pct_start=recipe.warmup, cycle_momentum=False
        )
    generator = torch_stream(0, f"{recipe.name} pre-training", 0)
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(samples), generator=generator).split(recipe.batch_size):
            loss = F.cross_entropy(network(samples.x[rows]), samples.y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if recipe.warmup is not None:
                rate.step()


def _keep(path: Path, state: dict[str, Tensor]) -> None:
    make_folder(path.parent)
    try:
        handle, name = tempfile.mkstemp(prefix=f"{path.stem}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        try:
            save_file(state, name)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise write_error(path, error) from None
