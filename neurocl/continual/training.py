"""Train a method on a stream, resume a run, evaluate a finished one: everything the command line does, as functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from neurocl import config as configuration
from neurocl.backbones.catalog import BACKBONES
from neurocl.continual.catalog import METHODS
from neurocl.continual.config import TrainConfig
from neurocl.continual.loop import Loop, build_optimizer, load_method, matrix
from neurocl.continual.method import Method, Setting
from neurocl.continual.metrics import Matrix, final_average_accuracy, summarize
from neurocl.continual.presets import starting_values
from neurocl.continual.progress import Progress
from neurocl.continual.scenario import Scenario, class_permutation
from neurocl.data.augment import Augment
from neurocl.data.catalog import load_benchmark, load_dataset
from neurocl.devices import (
    Runtime,
    generator_for,
    machine,
    peak_memory_mb,
    prepare,
    seed_everything,
    versions,
)
from neurocl.energy_meter import EnergyMeter
from neurocl.errors import Interrupted, NeuroclError, UserError
from neurocl.registry import did_you_mean
from neurocl.runs import RunFolder

AUGMENT_STREAM = 2
LARGE_FOR_A_CPU = 5_000_000
WHOLE_SERIES_ONLY = ("er-ace", "lwf", "icarl")


@dataclass(frozen=True)
class RunResult:
    """What a run measured.

    Attributes:
        path: the run folder, None if nothing was kept.
        status: ``"finished"``, ``"stopped"`` (after a task, on request), ``"interrupted"`` or ``"failed"``.
        class_il, task_il: accuracy matrices [stages, tasks] in per cent, NaN where unknown.
        metrics: ``{"class_il": {...}, "task_il": {...}}``, see :mod:`neurocl.continual.metrics`.
        document: all of ``result.json``.
    """

    path: Path | None
    status: str
    class_il: Matrix
    task_il: Matrix
    metrics: dict[str, dict[str, float]]
    document: dict[str, Any]


def config_class(area: str) -> type[TrainConfig]:
    """The configuration class of a command group."""
    if area == "spiking":
        from neurocl.spiking.config import SpikingTrainConfig

        return SpikingTrainConfig
    return TrainConfig


def resolve(area: str = "continual", *layers: Mapping[str, Any]) -> TrainConfig:
    """Merge ``layers`` (the last wins) over the starting values of their benchmark and method.

    Raises:
        UserError: an unknown key or name, or a value out of range.
    """
    model = config_class(area)
    given = configuration.merged({"area": area}, *layers)
    if given["area"] != area:
        raise UserError(f"the configuration is for `neurocl {given['area']} train`, not for `neurocl {area} train`")
    fields = model.model_fields
    method = str(given.get("method", fields["method"].default))
    dataset = str(given.get("dataset", fields["dataset"].default))
    METHODS.entry(method, area)
    benchmark = load_benchmark(dataset)
    size = given.get("buffer_size", fields["buffer_size"].default)
    start = starting_values(
        area,
        method,
        dataset,
        size if isinstance(size, int) and size > 0 else 200,
        epochs=benchmark.epochs,
        batch_size=benchmark.batch_size,
        augment=benchmark.augment,
    )
    if "batch_size" in given and "replay_batch" not in given:
        start.pop("replay_batch")
        given["replay_batch"] = given["batch_size"]
    if "schedule" in given:
        start.pop("milestones", None)
    config = configuration.validate(model, configuration.merged(start, given))
    if config.per_step_loss and config.method in WHOLE_SERIES_ONLY:
        raise UserError(f"temporal_separation has no meaning for {config.method}, whose loss needs averaged logits")
    method_class = METHODS.load(config.method, area)
    configuration.validate(method_class.Config, config.options, source=f"options of {config.method}")
    BACKBONES.entry(config.backbone, area)
    return config


def build_scenario(config: TrainConfig) -> Scenario:
    """The stream that ``config`` describes.

    Raises:
        UserError: the data set is absent or broken, or sizes and orders do not fit it.
    """
    if config.data_dir is not None and not config.data_dir.is_dir():
        raise UserError(f"data_dir {config.data_dir} is not a folder")
    benchmark = load_benchmark(config.dataset)
    dataset = load_dataset(config.dataset, data_dir=config.data_dir, timesteps=config.frames or 1)
    if dataset.is_events and config.frames is None:
        # ordinary networks see one picture per recording: the event counts of its whole length
        dataset = replace(dataset, train_images=dataset.train_images[:, 0], test_images=dataset.test_images[:, 0])
    order = config.class_order
    if config.permute_classes:
        old_to_new = class_permutation(len(dataset.class_names), config.seed)
        order = tuple(int(old) for old in np.argsort(old_to_new))
    return Scenario(
        dataset,
        config.task_sizes or benchmark.task_sizes,
        class_order=order,
        val_fraction=config.val_fraction,
        seed=config.seed,
        max_train_per_class=config.max_train_per_class,
        max_test_per_class=config.max_test_per_class,
    )


def build_network(config: TrainConfig, scenario: Scenario) -> nn.Module:
    """The backbone that ``config`` names, freshly initialised from torch's global generator.

    Raises:
        UserError: the backbone does not know one of ``backbone_options``.
    """
    factory: Callable[..., nn.Module] = BACKBONES.load(config.backbone, config.area)
    arguments = config.network_arguments()
    known = [name for name in inspect.signature(factory).parameters if name not in ("input_shape", "num_classes")]
    for name in arguments:
        if name not in known:
            raise UserError(
                f"backbone {config.backbone} has no option {name!r}{did_you_mean(name, known)} "
                f"(it has {', '.join(known) or 'none'})"
            )
    try:
        return factory(scenario.input_shape, scenario.num_classes, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"backbone_options of {config.backbone}: {error}") from None


def build_method(config: TrainConfig, scenario: Scenario, runtime: Runtime) -> Method:
    """Network and method on the run's device, seeded."""
    if config.augment == "strong" and scenario.input_shape[-3] not in (1, 3):
        raise UserError("augment strong changes colours, which event frames do not have; use none or crop-flip")
    seed_everything(config.seed)
    benchmark = load_benchmark(config.dataset)
    network = build_network(config, scenario)
    setting = Setting(
        task_sizes=scenario.task_sizes,
        input_shape=scenario.input_shape,
        augment=Augment(config.augment, benchmark.mean, benchmark.std),
        buffer_size=config.buffer_size,
        batch_size=config.batch_size,
        replay_batch=config.replay_batch,
        epochs=config.epochs,
        per_step_loss=config.per_step_loss,
        make_optimizer=partial(build_optimizer, config.optimizer),
        augment_generator=generator_for(config.seed, AUGMENT_STREAM),
        seed=config.seed,
    )
    method_class: type[Method] = METHODS.load(config.method, config.area)
    options = configuration.validate(method_class.Config, config.options, source=f"options of {config.method}")
    method = method_class(network, setting, options)
    return method.to(runtime.device)


def _document(loop: Loop, status: str, error: str | None) -> dict[str, Any]:
    """Everything that ``result.json`` says."""
    record, config, scenario = loop.record, loop.config, loop.scenario
    metrics: dict[str, dict[str, float]] = {}
    if record.class_il:
        for kind, rows, untrained in (
            ("class_il", record.class_il, record.untrained_class_il),
            ("task_il", record.task_il, record.untrained_task_il),
        ):
            full = matrix(rows)
            if len(full) == len(scenario):
                base = None if untrained is None else matrix([untrained])[0]
                metrics[kind] = summarize(full, base)
            elif loop.joint:
                metrics[kind] = {"final_average_accuracy": final_average_accuracy(full)}
            else:
                done = len(full)
                metrics[kind] = summarize(full[:, :done])
    total = sum(record.seconds.values())
    return {
        "status": status,
        "error": error,
        "area": config.area,
        "method": config.method,
        "dataset": config.dataset,
        "seed": config.seed,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "protocol": {
            "tasks": list(scenario.task_sizes),
            "class_order": list(scenario.class_order),
            "class_names": list(scenario.class_names),
            "evaluated_on": "validation split" if config.val_fraction else "test split",
            "epochs": config.epochs,
            "batch_size": config.batch_size,
            "replay_batch": config.replay_batch,
            "buffer_size": config.buffer_size,
            "train_items": scenario.task_lengths,
        },
        "config": config.model_dump(mode="json"),
        "accuracy": {"class_il": record.class_il, "task_il": record.task_il},
        "metrics": metrics,
        "parameters": sum(p.numel() for p in loop.method.network.parameters()),
        "steps": record.steps,
        "seconds": {**record.seconds, "total": total},
        "peak_memory_mb": peak_memory_mb(loop.runtime.device),
        "checkpoint_sha256": loop.checkpoint_digest,
        "versions": versions(),
        "machine": machine(loop.runtime.device),
    }


@dataclass(frozen=True)
class _Parts:
    """What a configuration stands for: everything that can be wrong with it has been found once these exist."""

    runtime: Runtime
    scenario: Scenario
    method: Method


def _build(config: TrainConfig) -> _Parts:
    runtime = prepare(config.device, config.precision, config.threads, keep_memory=config.keep_memory)
    scenario = build_scenario(config)
    return _Parts(runtime, scenario, build_method(config, scenario, runtime))


def _run(
    config: TrainConfig,
    parts: _Parts,
    folder: RunFolder | None,
    progress: Progress | None,
    *,
    continuing: bool,
    stop_after_task: int | None,
) -> RunResult:
    runtime, scenario = parts.runtime, parts.scenario
    loop = Loop(config, parts.method, scenario, runtime, folder, progress or Progress())
    if continuing and folder is not None:
        if folder.has_checkpoint():
            loop.load()
        else:
            folder.rewind_metrics()
    status, failure = "failed", None
    meter = EnergyMeter(device=str(runtime.device))
    try:
        with meter:
            status = "finished" if loop.run(stop_after_task=stop_after_task) else "stopped"
    except Interrupted as stop:
        status, failure = "interrupted", str(stop)
        raise
    except NeuroclError as error:
        failure = str(error)
        raise
    except torch.OutOfMemoryError as error:
        failure = "out of device memory"
        raise UserError(
            f"the device ran out of memory ({str(error).splitlines()[0]}); use a smaller --batch-size"
        ) from None
    finally:
        document = _document(loop, status, failure)
        document["energy"] = {"scope": "training and evaluation since the last start", **asdict(meter.reading)}
        if folder is not None and (status != "failed" or failure is not None):
            folder.write_result(document)
    empty = np.empty((0, len(scenario)))
    return RunResult(
        folder.path if folder is not None else None,
        status,
        matrix(loop.record.class_il) if loop.record.class_il else empty,
        matrix(loop.record.task_il) if loop.record.task_il else empty,
        document["metrics"],
        document,
    )


def train(
    config: TrainConfig | None = None,
    *,
    out: Path | str | None = None,
    keep: bool = True,
    progress: Progress | None = None,
    stop_after_task: int | None = None,
    **values: Any,
) -> RunResult:
    """Train a method on a stream of tasks.

    Args:
        config: from :func:`resolve`; or give its values as keywords, such as ``method="derpp", epochs=1``
            (``area="spiking"`` for spiking networks).
        out: the run folder; default ``runs/<area>-<method>-<dataset>-<seed>-<time>``.
        keep: write a run folder at all.
        progress: told about every step.
        stop_after_task: stop after this task (counted from 0), to be resumed later.

    Raises:
        UserError: wrong values or data. RunError: the loss is not finite, the disk is full.
        Interrupted: SIGINT or SIGTERM; a checkpoint has been written.
    """
    if config is not None and values:
        raise UserError(f"give either a config or values, not both (got {', '.join(values)})")
    if config is None:
        config = resolve(values.pop("area", "continual"), values)
    parts = _build(config)
    weights = sum(parameter.numel() for parameter in parts.method.network.parameters())
    if progress is not None and parts.runtime.device.type == "cpu" and weights > LARGE_FOR_A_CPU:
        progress.message(
            f"note: {config.backbone} has {weights / 1e6:.1f} million weights and takes seconds per step on a CPU; "
            "the small backbones in `neurocl list backbones` are made for one"
        )
    folder = None
    if keep:
        stem = f"{config.area}-{config.method}-{Path(config.dataset).stem}-{config.seed}"
        folder = RunFolder.create(Path(out) if out is not None else None, stem=stem)
        folder.acquire()
        folder.write_config(configuration.to_yaml(config))
    try:
        return _run(config, parts, folder, progress, continuing=False, stop_after_task=stop_after_task)
    finally:
        if folder is not None:
            folder.release()


def _stored(folder: RunFolder, document: dict[str, Any]) -> RunResult:
    """The result of a finished run as it was written."""
    rows = document["accuracy"]
    return RunResult(
        folder.path, "finished", matrix(rows["class_il"]), matrix(rows["task_il"]), document["metrics"], document
    )


def load_config(folder: RunFolder) -> TrainConfig:
    """The configuration a run was started with."""
    values = folder.config
    model = config_class(str(values.get("area", "continual")))
    return configuration.validate(model, values, source=str(folder.path / "config.yaml"))


def resume(
    path: Path | str,
    *,
    progress: Progress | None = None,
    stop_after_task: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    data_dir: Path | str | None = None,
) -> RunResult:
    """Continue a run from its last checkpoint (from the start if it had none); the numbers equal an unbroken run's.

    Raises:
        UserError: not a run folder, or a damaged checkpoint; nothing is changed then.
    """
    folder = RunFolder.open(Path(path))
    config = load_config(folder)
    changes = {"device": device, "threads": threads, "data_dir": Path(data_dir).resolve() if data_dir else None}
    config = config.model_copy(update={key: value for key, value in changes.items() if value is not None})
    folder.acquire()
    try:
        if folder.has_result():
            document = folder.read_result()
            if document["status"] == "finished":
                return _stored(folder, document)
        return _run(config, _build(config), folder, progress, continuing=True, stop_after_task=stop_after_task)
    finally:
        folder.release()


@dataclass(frozen=True)
class LoadedRun:
    """A run reopened for evaluation or analysis: the trained method in evaluation mode and its stream."""

    folder: RunFolder
    config: TrainConfig
    method: Method
    scenario: Scenario
    runtime: Runtime
    tasks_done: int


def load_run(path: Path | str, *, device: str | None = None, threads: int | None = None) -> LoadedRun:
    """Reopen a run with the weights of its last checkpoint.

    Raises:
        UserError: not a run folder, no checkpoint, or a damaged one.
    """
    folder = RunFolder.open(Path(path))
    config = load_config(folder)
    runtime = prepare(
        device or config.device, config.precision, threads or config.threads, keep_memory=config.keep_memory
    )
    scenario = build_scenario(config)
    method = build_method(config, scenario, runtime)
    checkpoint = folder.load_checkpoint()
    tensors = {
        name.removeprefix("method."): value for name, value in checkpoint.tensors.items() if name.startswith("method.")
    }
    load_method(method, tensors, folder)
    method.eval()
    done = int(checkpoint.state["position"]["task"])
    if config.method == "joint":
        done = len(scenario) if done else 0
    return LoadedRun(folder, config, method, scenario, runtime, done)


def evaluate(path: Path | str, *, device: str | None = None, threads: int | None = None) -> dict[str, Any]:
    """Measure a run's checkpoint again on the tasks it has learnt.

    Returns: ``{"tasks": n, "class_il": [...], "task_il": [...]}`` in per cent.
    Raises:
        UserError: not a run folder, a damaged checkpoint, or no task finished yet.
    """
    run = load_run(path, device=device, threads=threads)
    if not run.tasks_done:
        raise UserError(f"{run.folder.path} has not finished its first task; continue it with --resume")
    loop = Loop(
        run.config.model_copy(update={"tensorboard": False}),
        run.method,
        run.scenario,
        run.runtime,
        None,
        Progress(),
    )
    class_il, task_il = loop.evaluate(run.tasks_done - 1)
    done = run.tasks_done
    return {"tasks": done, "class_il": class_il[:done], "task_il": task_il[:done]}
