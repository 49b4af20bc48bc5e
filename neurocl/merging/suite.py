"""A suite of experts on disk: a base, one fine-tuned model per picture domain, a fixed head for each.

The protocol is the one of the vision papers in small: only the encoder is fine-tuned, every task keeps the head it had
with the base, and the task of a test picture is known.

``B`` batch, ``E`` embedding, ``K`` classes of a task.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from safetensors.torch import save_file

from neurocl.backbones.vit import VisionTransformer, VitConfig
from neurocl.config import Config, validate
from neurocl.data.domains import PICTURE_DOMAINS, Domain, digits_domains, load_domain
from neurocl.errors import UserError
from neurocl.runs import make_folder, read_json, write_atomically

SUITE_SCHEMA = 1
ARCHITECTURE = "NeuroclVisionTransformer"
LOGIT_SCALE = 20.0  # logits are this times the cosine of embedding and class vector

SuiteName = Literal["digits", "pictures"]
Split = Literal["train", "val", "test"]


class SuiteConfig(Config):
    """How a suite is made.

    Attributes:
        name: ``digits`` (embedded, seconds) or ``pictures`` (eight public sets on a frozen EfficientNet-Lite, minutes).
        tasks: domains, in order; empty is all of the suite.
        width, depth, heads: of the Vision Transformer.
        embed_dim: E.
        pretrain_epochs, pretrain_lr: of the base.
        epochs, lr: of every expert.
        batch_size, weight_decay, warmup: of both; ``warmup`` is a share of the steps.
        regularise: how experts are kept apart while they are fine-tuned, see :mod:`neurocl.merging.regularisers`.
        strength: of that; None is the regulariser's own.
        seed: of everything.
    """

    name: SuiteName = "digits"
    tasks: tuple[str, ...] = ()
    width: Annotated[int, Field(ge=8)] = 64
    depth: Annotated[int, Field(ge=1)] = 3
    heads: Annotated[int, Field(ge=1)] = 4
    embed_dim: Annotated[int, Field(ge=2)] = 32
    pretrain_epochs: Annotated[int, Field(ge=1)] = 30
    pretrain_lr: Annotated[float, Field(gt=0)] = 2e-3
    epochs: Annotated[int, Field(ge=1)] = 12
    lr: Annotated[float, Field(gt=0)] = 5e-4
    batch_size: Annotated[int, Field(ge=1)] = 64
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    regularise: Literal["none", "ita", "iel", "tak"] = "none"
    strength: Annotated[float, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> SuiteConfig:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "pictures": {
        "width": 192,
        "depth": 6,
        "heads": 3,
        "embed_dim": 192,
        "pretrain_epochs": 8,
        "pretrain_lr": 5e-4,
        "epochs": 10,
        "lr": 2e-4,
    },
}
# A small network that has learnt a little, in seconds: enough to see that everything runs.
SMOKE: dict[str, Any] = {
    "width": 32,
    "depth": 2,
    "heads": 2,
    "pretrain_epochs": 8,
    "pretrain_lr": 5e-3,
    "epochs": 3,
    "lr": 2e-3,
    "batch_size": 32,
}


def suite_config(name: str = "digits", **changes: Any) -> SuiteConfig:
    """The configuration of a suite with its own defaults.

    Raises:
        UserError: no such suite, unknown key or task, or a value out of range.
    """
    if name not in PRESETS:
        raise UserError(f"suite must be one of {', '.join(PRESETS)}, got {name!r}")
    config = validate(SuiteConfig, {"name": name, **PRESETS[name], **changes}, source="suite")
    unknown = [task for task in config.tasks if task not in task_names(config)]
    if unknown:
        raise UserError(f"suite {name} has no task {unknown[0]!r} (choose from {', '.join(task_names(config))})")
    return config


def task_names(config: SuiteConfig) -> tuple[str, ...]:
    """All tasks that the suite could have."""
    if config.name == "digits":
        return tuple(domain.name for domain in digits_domains(config.seed)[1:])
    return PICTURE_DOMAINS


@dataclass(frozen=True)
class Items:
    """What a network sees of a domain: inputs [N, ...] as stored, labels [N].

    Pixels are uint8, tokens float16; :meth:`batch` makes floats of them.
    """

    inputs: Any
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: torch.Tensor) -> torch.Tensor:
        """Float inputs of some rows."""
        values = torch.from_numpy(np.ascontiguousarray(self.inputs[rows.numpy()]))
        return values.float() / 255 if values.dtype == torch.uint8 else values.float()

    def batches(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All items in order."""
        for rows in torch.arange(len(self)).split(size):
            yield self.batch(rows), self.labels[rows]

    def first(self, count: int) -> Items:
        """The first items of a seeded shuffle, for calibration on few examples."""
        rows = np.sort(np.random.default_rng(0).permutation(len(self))[:count])
        return Items(self.inputs[rows], self.labels[torch.from_numpy(rows)])


def load_items(config: SuiteConfig, domain: Domain) -> dict[str, Items]:
    """The splits of a domain as a suite's network takes them."""
    if config.name == "digits":
        inputs: dict[str, Any] = dict(domain.images)
    else:
        from neurocl.backbones.tokens import cached_tokens

        inputs = {split: cached_tokens(f"{domain.name}-{split}", images) for split, images in domain.images.items()}
    return {split: Items(inputs[split], torch.from_numpy(domain.labels[split])) for split in inputs}


def load_domains(config: SuiteConfig, data_dir: Path | None = None) -> tuple[Domain, list[Domain]]:
    """(what the base is pre-trained on, the tasks)."""
    wanted = config.tasks or task_names(config)
    if config.name == "digits":
        first, *others = digits_domains(config.seed)
        by_name = {domain.name: domain for domain in others}
        return first, [by_name[name] for name in wanted]
    pretraining = load_domain("tiny-imagenet-100", data_dir=data_dir, seed=config.seed)
    return pretraining, [load_domain(name, data_dir=data_dir, seed=config.seed) for name in wanted]


def network(config: VitConfig, state: Mapping[str, torch.Tensor] | None = None) -> VisionTransformer:
    """A network, with weights if they are given."""
    model = VisionTransformer(config)
    if state is not None:
        model.load_state_dict(dict(state))
    return model.eval()


def logits(embedding: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Scaled cosines: embedding [B, E], head [K, E] of unit rows -> [B, K]."""
    return LOGIT_SCALE * F.normalize(embedding.float(), dim=1) @ head.T


def save_network(folder: Path, config: VitConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Write ``config.json`` and ``model.safetensors``."""
    make_folder(folder)
    document = {"architectures": [ARCHITECTURE], "model_type": "neurocl-vit", **config.model_dump(mode="json")}
    temporary = folder / ".model.safetensors.tmp"
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, temporary)
    temporary.replace(folder / "model.safetensors")
    write_atomically(folder / "config.json", json.dumps(document, indent=1))


def network_config(folder: Path) -> VitConfig:
    """Size of a saved network.

    Raises:
        UserError: the folder holds something else.
    """
    document = read_json(folder / "config.json")
    if not isinstance(document, dict) or document.get("architectures") != [ARCHITECTURE]:
        raise UserError(f"{folder}: not a network of a neurocl suite (its config.json names another architecture)")
    values = {key: value for key, value in document.items() if key in VitConfig.model_fields}
    return validate(VitConfig, values, source=str(folder / "config.json"))


def load_state(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder or safetensors file.

    Raises:
        UserError: see :class:`neurocl.merging.checkpoints.FileSource`.
    """
    from neurocl.merging.checkpoints import FileSource

    source = FileSource.open(path)
    try:
        return {
            name: source.read(name, 0, spec.numel).clone().reshape(spec.shape) for name, spec in source.tensors.items()
        }
    finally:
        source.close()


def load_fitting(path: Path, config: VitConfig) -> dict[str, torch.Tensor]:
    """:func:`load_state` of a network of that size.

    Raises:
        UserError: also names or shapes of another network.
    """
    state = load_state(path)
    wanted = {name: value.shape for name, value in VisionTransformer(config).state_dict().items()}
    odd = {name: value.shape for name, value in state.items()}.items() ^ wanted.items()
    if odd:
        raise UserError(f"{path}: tensor {min(name for name, _ in odd)!r} does not fit the network of the suite")
    return state


def load_head(folder: Path, task: str) -> torch.Tensor:
    """Class vectors [K, E] of one task of the suite in ``folder``.

    Raises:
        UserError: no such file, or a damaged one.
    """
    path = folder / "heads" / f"{task}.safetensors"
    tensors = load_state(path)
    if "head" not in tensors:
        raise UserError(f"{path}: holds no tensor 'head'")
    return tensors["head"]


@dataclass(frozen=True)
class Suite:
    """A finished (or growing) suite folder.

    Attributes:
        path: ``base/``, ``experts/TASK/``, ``heads/TASK.safetensors``, ``suite.json``.
        config: how it was made.
        document: ``suite.json``.
        data_dir: where its data are looked for first.
    """

    path: Path
    config: SuiteConfig
    document: dict[str, Any]
    data_dir: Path | None = None
    _items: dict[str, dict[str, Items]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, *, data_dir: Path | None = None) -> Suite:
        """Read a suite.

        Raises:
            UserError: not a suite, or one whose training was not finished.
        """
        if not (path / "suite.json").is_file():
            raise UserError(f"{path} is not a suite of experts (no suite.json); `neurocl merging train` makes one")
        document = read_json(path / "suite.json")
        if not isinstance(document, dict) or document.get("schema") != SUITE_SCHEMA:
            raise UserError(f"{path / 'suite.json'}: not a suite that this version reads")
        config = validate(SuiteConfig, document.get("config", {}), source=str(path / "suite.json"))
        return cls(path, config, document, data_dir)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.config.tasks) or task_names(self.config)

    @cached_property
    def network_config(self) -> VitConfig:
        return network_config(self.path / "base")

    @cached_property
    def base(self) -> dict[str, torch.Tensor]:
        return load_state(self.path / "base")

    @cached_property
    def experts(self) -> dict[str, dict[str, torch.Tensor]]:
        missing = [task for task in self.tasks if not (self.path / "experts" / task / "config.json").is_file()]
        if missing:
            raise UserError(f"{self.path}: the expert {missing[0]} is missing; `neurocl merging train` goes on there")
        return {task: load_state(self.path / "experts" / task) for task in self.tasks}

    @cached_property
    def heads(self) -> dict[str, torch.Tensor]:
        return {task: load_head(self.path, task) for task in self.tasks}

    def items(self, task: str, split: Split) -> Items:
        """A split of a task; read once."""
        if task not in self._items:
            _, domains = load_domains(self.config, self.data_dir)
            for domain in domains:
                self._items[domain.name] = load_items(self.config, domain)
        return self._items[task][split]
