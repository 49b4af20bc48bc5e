"""Statistics of a model on disk: builds the network, finds the data, runs the collector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import nn

from neurocl.devices import Runtime
from neurocl.errors import UserError
from neurocl.merging.collector import Wanted, collect
from neurocl.merging.statistics import Statistics
from neurocl.merging.suite import LOGIT_SCALE, Suite, load_fitting, network
from neurocl.merging.transformers_models import input_batches, load_transformers_model, output_of
from neurocl.registry import did_you_mean

Forward = Callable[[nn.Module, Any], torch.Tensor]
Batches = Callable[[], Iterable[Any]]


def gather(
    model: Path,
    *,
    suite: Path | None,
    task: str | None,
    inputs: Path | None,
    kinds: Sequence[str] = ("gram",),
    parameters: Sequence[str] | None = None,
    num_examples: int = 256,
    batch_size: int = 32,
    diagonal: bool = False,
    conv: bool = False,
    merge_with: Sequence[Path] = (),
    data_dir: Path | None = None,
    runtime: Runtime,
) -> Statistics:
    """Collect statistics of one model.

    Args:
        model: an expert of ``suite``, or a Hugging Face folder.
        suite, task: where the data come from: unlabelled training pictures of that task.
        inputs: instead of them, a safetensors file of keyword arguments for a Hugging Face model.
        kinds: ``gram``, ``fisher``, ``kfac``.
        parameters: glob patterns; None is all.
        num_examples, batch_size: of the data.
        diagonal, conv: see :func:`neurocl.merging.collector.collect`.
        merge_with: statistics of the same model on other data, to be added.
        data_dir: where data are looked for first.
        runtime: device.

    Raises:
        UserError: neither or both sources of data, an unknown kind or task, a model that cannot be run.
    """
    for kind in kinds:
        if kind not in get_args(Wanted):
            known = get_args(Wanted)
            raise UserError(f"unknown kind {kind!r}{did_you_mean(kind, known)} (choose from {', '.join(known)})")
    if (suite is None) == (inputs is None):
        raise UserError("say where the data come from: --suite SUITE --task TASK, or --inputs FILE")
    if suite is not None:
        net, forwards, make_batches = _of_suite(model, suite, task, num_examples, batch_size, data_dir, runtime)
    else:
        assert inputs is not None
        net = load_transformers_model(model).to(runtime.device)
        forwards = dict.fromkeys(kinds, output_of)
        make_batches = _batches_of(inputs, batch_size, num_examples, runtime)
    parts = []
    for kind in kinds:
        wanted: Any = (kind,)
        parts.append(
            collect(
                net,
                make_batches(),
                kinds=wanted,
                parameters=parameters,
                forward=forwards[kind],
                diagonal=diagonal,
                conv=conv,
            )
        )
    return Statistics.merged([*parts, *(Statistics.load(path) for path in merge_with)])


def _of_suite(
    model: Path,
    suite: Path,
    task: str | None,
    num_examples: int,
    batch_size: int,
    data_dir: Path | None,
    runtime: Runtime,
) -> tuple[nn.Module, dict[str, Forward], Batches]:
    opened = Suite.open(suite, data_dir=data_dir)
    if task not in opened.tasks:
        raise UserError(f"{suite} has no task {task!r} (choose from {', '.join(opened.tasks)})")
    net = network(opened.network_config, load_fitting(model, opened.network_config)).to(runtime.device)
    items = opened.items(task, "train").first(num_examples)
    head = opened.heads[task].to(runtime.device)

    def features(module: nn.Module, batch: Any) -> torch.Tensor:
        return F.normalize(module(batch), dim=1)

    def class_logits(module: nn.Module, batch: Any) -> torch.Tensor:
        return LOGIT_SCALE * features(module, batch) @ head.T

    forwards: dict[str, Forward] = {"gram": features, "kfac": features, "fisher": class_logits}
    return net, forwards, lambda: (values.to(runtime.device) for values, _ in items.batches(batch_size))


def _batches_of(inputs: Path, batch_size: int, num_examples: int, runtime: Runtime) -> Batches:
    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for batch in input_batches(inputs, batch_size, num_examples):
            yield {name: value.to(runtime.device) for name, value in batch.items()}

    return batches
