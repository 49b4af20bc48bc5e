"""Making a suite: pre-train the base, fix the heads, fine-tune one expert per task; what is finished stays."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.func import functional_call

from neurocl.backbones.vit import VisionTransformer, VitConfig
from neurocl.config import to_yaml
from neurocl.devices import Runtime, generator_for, seed_everything, versions
from neurocl.errors import RunError, UserError
from neurocl.merging.evaluation import accuracy
from neurocl.merging.linearised import first_order, unit_rows
from neurocl.merging.suite import (
    SUITE_SCHEMA,
    Items,
    Suite,
    SuiteConfig,
    load_domains,
    load_head,
    load_items,
    logits,
    network,
    save_network,
)
from neurocl.runs import make_folder, read_json, write_atomically

Say = Callable[[str], None]


class Regulariser(Protocol):
    """How fine-tuning may be changed so that task vectors compose: what is trained, on which loss, with which pull.

    ``deltas`` are the differences from the base by name of the trained parameters, the task vector so far.
    """

    def trains(self, name: str) -> bool:
        """Whether that parameter is trained; the others stay at the base."""

    def compose(self, deltas: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor] | None:
        """Differences from the base of the network that the loss is computed on; None for ``deltas`` themselves."""

    def penalty(self, deltas: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Scalar added to the loss, or None."""

    def step(self, deltas: Mapping[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
        """What to subtract from parameters beside the optimizer's step; ``factor`` falls from 1 to 0 with the rate."""


@dataclass(frozen=True)
class Fit:
    """How one network is trained: passes, rate, batch."""

    epochs: int
    lr: float
    batch_size: int
    weight_decay: float
    warmup: float

    def factor(self, step: int, steps: int) -> float:
        """Linear warm-up, then cosine to zero."""
        warm = self.warmup * steps
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))


def fit(
    model: VisionTransformer,
    items: Items,
    head: torch.Tensor,
    how: Fit,
    *,
    generator: torch.Generator,
    runtime: Runtime,
    regulariser: Regulariser | None = None,
    linear: bool = False,
    say: Say | None = None,
) -> float:
    """Train ``model`` on ``items`` by cross-entropy of :func:`neurocl.merging.suite.logits`; returns the last loss.

    With a regulariser, or linearised, weight decay pulls towards where ``model`` starts instead of towards zero.

    Args:
        model: changed in place.
        items: training items.
        head: [K, E]; trained along if it requires gradients.
        how: passes, rate, batch.
        generator: of the order of the items.
        runtime: device and number format.
        regulariser: see :class:`Regulariser`; deltas are taken from where ``model`` starts.
        linear: train the first-order expansion of the unit embedding around the start, see
            :class:`neurocl.merging.linearised.Linearised`.
        say: called with one line per epoch.

    Raises:
        RunError: the loss is not finite.
    """
    model.train()
    trained = {name: v for name, v in model.named_parameters() if regulariser is None or regulariser.trains(name)}
    frozen = [value for name, value in model.named_parameters() if name not in trained]
    from_start = regulariser is not None or linear
    start = {name: value.detach().clone() for name, value in trained.items()} if from_start else {}
    optimizer = torch.optim.AdamW(
        [*trained.values(), *([head] if head.requires_grad else [])],
        lr=how.lr,
        weight_decay=0.0 if from_start else how.weight_decay,
    )
    for value in frozen:
        value.requires_grad_(False)
    per_epoch = math.ceil(len(items) / how.batch_size)
    steps, step, mean = how.epochs * per_epoch, 0, math.nan
    for epoch in range(how.epochs):
        total = 0.0
        for rows in torch.randperm(len(items), generator=generator).split(how.batch_size):
            factor = how.factor(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = how.lr * factor
            inputs = items.batch(rows).to(runtime.device)
            deltas = {name: trained[name] - value for name, value in start.items()}
            with runtime.autocast():
                embedding = _embedding(model, inputs, start, deltas, regulariser, linear)
            unit = F.normalize(head, dim=1) if head.requires_grad else head
            loss = F.cross_entropy(logits(embedding, unit), items.labels[rows].to(runtime.device))
            penalty = regulariser.penalty(deltas) if regulariser is not None else None
            optimizer.zero_grad(set_to_none=True)
            (loss if penalty is None else loss + penalty).backward()
            if from_start:
                _side_step(trained, deltas, regulariser, factor, how.lr * factor * how.weight_decay)
            optimizer.step()
            total += loss.item() * len(rows)
            step += 1
        mean = total / len(items)
        if not math.isfinite(mean):
            raise RunError(f"the loss is {mean} in epoch {epoch + 1}; lower the learning rate")
        if say is not None:
            say(f"epoch {epoch + 1}/{how.epochs} loss {mean:.3f}")
    for value in frozen:
        value.requires_grad_(True)
    model.eval()
    return mean


def _embedding(
    model: VisionTransformer,
    inputs: torch.Tensor,
    start: Mapping[str, torch.Tensor],
    deltas: Mapping[str, torch.Tensor],
    regulariser: Regulariser | None,
    linear: bool,
) -> torch.Tensor:
    """What the loss is computed on: the network itself, the one its task vector is composed into, or its expansion."""
    composed = regulariser.compose(deltas) if regulariser is not None else None
    if linear:
        value, change = first_order(model, start, deltas if composed is None else composed, inputs, unit_rows)
        return value.detach() + change
    if composed is None:
        out: torch.Tensor = model(inputs)
    else:
        out = functional_call(model, {name: start[name] + value for name, value in composed.items()}, (inputs,))
    return out


@torch.no_grad()
def _side_step(
    trained: Mapping[str, torch.Tensor],
    deltas: Mapping[str, torch.Tensor],
    regulariser: Regulariser | None,
    factor: float,
    decay: float,
) -> None:
    """Weight decay on the task vector and the regulariser's step, both from the same point."""
    pull = regulariser.step(deltas, factor) if regulariser is not None else {}
    for name, delta in deltas.items():
        trained[name].sub_(decay * delta)
        if name in pull:
            trained[name].sub_(pull[name])


def class_means(model: VisionTransformer, items: Items, num_classes: int, runtime: Runtime) -> torch.Tensor:
    """The fixed head of a task: unit mean of the base's unit embeddings of each class, [K, E]."""
    sums = torch.zeros(num_classes, model.config.embed_dim, device=runtime.device)
    with torch.inference_mode():
        for inputs, labels in items.batches(256):
            unit = F.normalize(model(inputs.to(runtime.device)).float(), dim=1)
            sums.index_add_(0, labels.to(runtime.device), unit)
    return F.normalize(sums, dim=1).cpu()


def train_suite(
    config: SuiteConfig,
    out: Path,
    *,
    runtime: Runtime,
    data_dir: Path | None = None,
    regularise: Callable[[Suite, str], Regulariser | None] | None = None,
    say: Say | None = None,
) -> Suite:
    """Make a suite in ``out``, or finish one that was interrupted.

    Args:
        config: of the suite.
        out: its folder; new, empty, or of a suite with the same configuration.
        runtime: device and number format.
        data_dir: where data are looked for first.
        regularise: builds what each expert is regularised with; called when the experts before it are there.
        say: called with lines for a log.

    Raises:
        UserError: the folder holds something else, or data or weights are not here.
        RunError: training diverged, or the disk is full.
    """
    say = say or (lambda line: None)
    _claim(out, config)
    pretraining, tasks = load_domains(config, data_dir)
    vit = _vit_config(config, load_items(config, pretraining)["test"])
    if not (out / "base" / "config.json").is_file():
        _pretrain(config, vit, pretraining, out, runtime, say)
    suite = Suite(out, config, read_json(out / "suite.json"), data_dir)
    for index, domain in enumerate(tasks):
        items = load_items(config, domain)
        suite._items[domain.name] = items
        head_path = out / "heads" / f"{domain.name}.safetensors"
        if not head_path.is_file():
            base = network(vit, suite.base).to(runtime.device)
            _save_tensor(head_path, "head", class_means(base, items["train"], domain.num_classes, runtime))
        if (out / "experts" / domain.name / "config.json").is_file():
            say(f"{domain.name}: there already")
            continue
        _fine_tune(config, vit, suite, domain.name, index, runtime, regularise, say)
    return Suite.open(out, data_dir=data_dir)


def _claim(out: Path, config: SuiteConfig) -> None:
    document = {"schema": SUITE_SCHEMA, "config": config.model_dump(mode="json"), "versions": versions()}
    if (out / "suite.json").is_file():
        if read_json(out / "suite.json").get("config") != document["config"]:
            raise UserError(f"{out} holds a suite of another configuration; choose another --out")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; choose another --out")
    make_folder(out / "heads")
    write_atomically(out / "config.yaml", to_yaml(config))
    write_atomically(out / "suite.json", json.dumps(document, indent=1))


def _vit_config(config: SuiteConfig, items: Items) -> VitConfig:
    shape = tuple(int(n) for n in items.inputs.shape[1:])
    return VitConfig(
        input_shape=shape,
        patch_size=2 if len(shape) == 3 else 1,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        embed_dim=config.embed_dim,
    )


def _how(config: SuiteConfig, *, pretraining: bool) -> Fit:
    epochs, lr = (config.pretrain_epochs, config.pretrain_lr) if pretraining else (config.epochs, config.lr)
    return Fit(epochs, lr, config.batch_size, config.weight_decay, config.warmup)


def _pretrain(config: SuiteConfig, vit: VitConfig, domain: Any, out: Path, runtime: Runtime, say: Say) -> None:
    seed_everything(config.seed)
    items = load_items(config, domain)
    model = VisionTransformer(vit).to(runtime.device)
    head = F.normalize(torch.randn(domain.num_classes, vit.embed_dim), dim=1).to(runtime.device).requires_grad_(True)
    started = time.perf_counter()
    fit(
        model,
        items["train"],
        head,
        _how(config, pretraining=True),
        generator=generator_for(config.seed, 1),
        runtime=runtime,
        say=lambda line: say(f"base: {line}"),
    )
    unit = F.normalize(head.detach(), dim=1)
    score = accuracy(model, items["test"], unit, runtime)
    say(f"base on {domain.name}: {score:.1f} % in {time.perf_counter() - started:.0f} s")
    save_network(out / "base", vit, model.state_dict())


def _fine_tune(
    config: SuiteConfig,
    vit: VitConfig,
    suite: Suite,
    task: str,
    index: int,
    runtime: Runtime,
    regularise: Callable[[Suite, str], Regulariser | None] | None,
    say: Say,
) -> None:
    seed_everything(config.seed + 1 + index)
    model = network(vit, suite.base).to(runtime.device)
    head = load_head(suite.path, task).to(runtime.device)
    started = time.perf_counter()
    fit(
        model,
        suite.items(task, "train"),
        head,
        _how(config, pretraining=False),
        generator=generator_for(config.seed, 2, index),
        runtime=runtime,
        regulariser=regularise(suite, task) if regularise is not None else None,
        say=None,
    )
    score = accuracy(model, suite.items(task, "val"), head, runtime)
    say(f"{task}: {score:.1f} % on validation pictures in {time.perf_counter() - started:.0f} s")
    save_network(suite.path / "experts" / task, vit, model.state_dict())


def _save_tensor(path: Path, name: str, value: torch.Tensor) -> None:
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: value.contiguous()}, temporary)
    temporary.replace(path)
