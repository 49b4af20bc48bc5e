"""Train a method on a stream, resume a run, evaluate a finished one: everything the command line does, as functions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neurocl import config as configuration
from neurocl.continual.building import build_method, build_scenario, config_class, resolve
from neurocl.continual.config import TrainConfig
from neurocl.continual.loop import Loop, load_method, matrix
from neurocl.continual.method import Method
from neurocl.continual.metrics import Matrix, final_average_accuracy, summarize
from neurocl.continual.progress import Progress
from neurocl.continual.scenario import Scenario
from neurocl.devices import Runtime, machine, peak_memory_mb, prepare, versions
from neurocl.energy_meter import EnergyMeter
from neurocl.errors import Interrupted, NeuroclError, UserError
from neurocl.runs import RunFolder

LARGE_FOR_A_CPU = 5_000_000


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
