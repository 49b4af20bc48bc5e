"""The one training loop: streams tasks through a method, evaluates, and can stop and resume at any step.

What makes a resumed run equal an uninterrupted one bit for bit: the order of an epoch's items is a
function of (seed, task, epoch), learning rates are a function of the epoch, and everything else
that changes (network, memories, optimiser, random generators, running sums) is in the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neurocl.continual.config import TrainConfig
from neurocl.continual.method import Batch, Method
from neurocl.continual.metrics import Matrix, task_accuracies
from neurocl.continual.optimizer import learning_rate, restore_layouts
from neurocl.continual.progress import Progress
from neurocl.continual.scenario import Scenario, Task
from neurocl.devices import Runtime, generator_for, random_state, restore_random_state
from neurocl.errors import Interrupted, RunError, UserError
from neurocl.runs import RunFolder
from neurocl.stopping import StopRequest

ORDER_STREAM = 1
EVALUATION_BATCH = 64  # a ResNet19 at T = 4 keeps 128 MB per layer then
RESUME_MAY_CHANGE = ("device", "threads", "data_dir", "checkpoint_seconds", "keep_memory", "tensorboard")


@dataclass
class Position:
    """Where in the stream a run stands: the next step to take."""

    task: int = 0
    epoch: int = 0
    step: int = 0
    begun: bool = False


@dataclass
class Record:
    """What a run has measured so far. Rows of the matrices are as long as the number of tasks, None where unknown."""

    class_il: list[list[float | None]] = field(default_factory=list)
    task_il: list[list[float | None]] = field(default_factory=list)
    untrained_class_il: list[float | None] | None = None
    untrained_task_il: list[float | None] | None = None
    steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "evaluate": 0.0, "checkpoint": 0.0})
    epoch_sums: dict[str, float] = field(default_factory=dict)


class Loop:
    """Trains ``method`` on ``scenario`` inside ``folder``.

    Args:
        config: of the run.
        method: on the run's device.
        scenario: the stream.
        runtime: device and number format.
        folder: where metrics and checkpoints go; None keeps nothing.
        progress: told about every step.
    """

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        scenario: Scenario,
        runtime: Runtime,
        folder: RunFolder | None,
        progress: Progress,
    ) -> None:
        self.config = config
        self.method = method
        self.scenario = scenario
        self.runtime = runtime
        self.folder = folder
        self.progress = progress
        self.joint = config.method == "joint"
        self.epochs = method.stream_epochs or config.epochs
        self.num_stages = 1 if self.joint else len(scenario)
        self.position = Position()
        self.record = Record()
        self.optimizer: torch.optim.Optimizer | None = None
        self.checkpoint_digest: str | None = None
        self._last_checkpoint = time.monotonic()
        self._writer: Any = None

    def _tensorboard(self) -> Any:
        """A writer whose points after the checkpoint are replaced, or None; opened once the position is known."""
        if not self.config.tensorboard or self.folder is None:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("tensorboard is not installed: pip install 'neurocl[track]'") from None
        stale = self.record.steps + 1 if self.record.steps else None  # what a killed run wrote after its checkpoint
        return SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=stale)  # type: ignore[no-untyped-call]

    # -- state ------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of everything that changes."""
        if self.folder is None:
            return
        started = time.monotonic()
        tensors = {f"method.{name}": value for name, value in self.method.state_dict().items()}
        if self.optimizer is not None:
            for index, values in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{name}": v for name, v in values.items() if isinstance(v, Tensor)}
        tensors |= {f"random.{name}": value for name, value in random_state().items()}
        tensors["random.augment"] = self.method.setting.augment_generator.get_state()
        state = {
            "config_sha256": config_digest(self.config),
            "position": asdict(self.position),
            "record": asdict(self.record),
        }
        self.checkpoint_digest = self.folder.save_checkpoint(tensors, state)
        self._last_checkpoint = time.monotonic()
        self.record.seconds["checkpoint"] += self._last_checkpoint - started

    def load(self) -> None:
        """Go back to the folder's checkpoint.

        Raises:
            UserError: the checkpoint is damaged or belongs to another network or method.
        """
        assert self.folder is not None
        checkpoint = self.folder.load_checkpoint()
        if checkpoint.state.get("config_sha256") != config_digest(self.config):
            raise UserError(
                f"{self.folder.path}: the checkpoint belongs to another configuration than config.yaml; "
                "undo the change, or start a new run with it"
            )
        groups: dict[str, dict[str, Tensor]] = {"method": {}, "optimizer": {}, "random": {}}
        for name, value in checkpoint.tensors.items():
            group, _, rest = name.partition(".")
            if group not in groups:
                raise UserError(f"{self.folder.path}: the checkpoint holds an unknown tensor {name!r}")
            groups[group][rest] = value
        load_method(self.method, groups["method"], self.folder)
        try:
            self.position = Position(**checkpoint.state["position"])
            self.record = Record(**checkpoint.state["record"])
            counters = (self.position.task, self.position.epoch, self.position.step, self.record.steps)
            if not all(isinstance(value, int) and value >= 0 for value in counters):
                raise TypeError("a counter is not a number")
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.folder.path}: the checkpoint's state is damaged ({error})") from None
        if self.position.begun:
            self.method.task_index = self.position.task
            self.optimizer = self._new_optimizer()
            described = self.optimizer.state_dict()
            described["state"] = {}
            for name, value in groups["optimizer"].items():
                index, _, key = name.partition(".")
                described["state"].setdefault(int(index), {})[key] = value
            self.optimizer.load_state_dict(described)
            restore_layouts(self.optimizer)
        augment = groups["random"].pop("augment")
        self.method.setting.augment_generator.set_state(augment)
        restore_random_state(groups["random"])
        self.checkpoint_digest = checkpoint.digest
        self.folder.rewind_metrics(checkpoint.state.get("metrics_bytes", 0))

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return self.method.setting.make_optimizer(self.method.network.parameters())

    # -- the stream -------------------------------------------------------------------------------

    def run(self, *, stop_after_task: int | None = None) -> bool:
        """Train until the end of the stream, or of task number ``stop_after_task`` (from 0).

        Returns: whether the stream is finished.
        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint has been written.
            RunError: the loss is not finite, or the disk is full.
        """
        steps_per_task = [self._num_batches(n) * self.epochs for n in self._task_lengths()]
        name = f"{self.config.method} on {self.config.dataset}, seed {self.config.seed}"
        self.progress.start(name, self.num_stages, sum(steps_per_task), self.record.steps)
        last = self.num_stages if stop_after_task is None else min(self.num_stages, stop_after_task + 1)
        self._writer = self._tensorboard()
        try:
            with StopRequest().listen() as stop:
                if self.config.forward_transfer and self.record.untrained_class_il is None:
                    rows = self.evaluate(len(self.scenario) - 1, 0)
                    self.record.untrained_class_il = json_row(rows[0])
                    self.record.untrained_task_il = json_row(rows[1])
                while self.position.task < last:
                    task = (
                        self.scenario.merged_task(self.runtime.device)
                        if self.joint
                        else self.scenario.task(self.position.task, self.runtime.device)
                    )
                    self._train_task(task, stop)
                    self.save()  # what a method does between tasks can take long, and cannot be cut in two
                    if stop.requested:
                        raise Interrupted(self._interrupted_message())
                    self._close_task(task)
                    if stop.requested and self.position.task < last:
                        raise Interrupted(self._interrupted_message())
        finally:
            self.progress.stop()
            if self._writer is not None:
                self._writer.close()
        return self.position.task >= self.num_stages

    def _num_batches(self, num_items: int) -> int:
        """Batches per epoch; a last batch of a single item joins the one before, since BatchNorm needs two."""
        batches = math.ceil(num_items / self.config.batch_size)
        lone = self.config.batch_size > 1 and num_items % self.config.batch_size == 1
        return batches - 1 if lone and batches > 1 else batches

    def _task_lengths(self) -> list[int]:
        lengths = self.scenario.task_lengths
        return [sum(lengths)] if self.joint else lengths

    def _train_task(self, task: Task, stop: StopRequest) -> None:
        position = self.position
        began = time.monotonic()
        if not position.begun:
            self.method.train()
            self.method.begin_task(task)
            self.optimizer = self._new_optimizer()
            position.begun = True
        optimizer = self.optimizer
        assert optimizer is not None
        images, labels = self.method.training_data(task)
        self.method.train()
        steps = self._num_batches(len(labels))
        self.record.seconds["train"] += time.monotonic() - began
        while position.epoch < self.epochs:
            rate = learning_rate(self.config, position.epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate
            order = torch.randperm(
                len(labels),
                generator=generator_for(self.config.seed, ORDER_STREAM, task.index, position.epoch),
            )
            began, began_step = time.monotonic(), position.step
            while position.step < steps:
                low = position.step * self.config.batch_size
                high = len(order) if position.step + 1 == steps else low + self.config.batch_size
                index = order[low:high].to(labels.device)
                self._step(self._batch(images, labels, index), optimizer, last=position.step + 1 == steps)
                position.step += 1
                self.record.steps += 1
                elapsed = time.monotonic() - began
                done = position.step - began_step
                self.progress.step(
                    task.index,
                    position.epoch,
                    self.epochs,
                    {name: value / position.step for name, value in self.record.epoch_sums.items()},
                    done * self.config.batch_size / max(elapsed, 1e-9),
                )
                if position.step % self.config.accumulate and position.step < steps:
                    continue  # half-accumulated gradients are not part of a checkpoint
                due = time.monotonic() - self._last_checkpoint > self.config.checkpoint_seconds
                if stop.requested or due:
                    self.record.seconds["train"] += elapsed
                    self.save()
                    began, began_step = time.monotonic(), position.step
                if stop.requested:
                    raise Interrupted(self._interrupted_message())
            self.record.seconds["train"] += time.monotonic() - began
            self._log_epoch(task, rate, steps)
            position.epoch, position.step = position.epoch + 1, 0

    def _interrupted_message(self) -> str:
        where = f"{self.config.method} stopped in task {self.position.task + 1} of {self.num_stages}"
        if self.folder is None:
            return where
        return f"{where}; continue with: neurocl {self.config.area} train --resume {self.folder.path}"

    def _batch(self, images: Tensor, labels: Tensor, index: Tensor) -> Batch:
        raw = images[index.to(images.device)].to(self.runtime.device)
        x = self.method.setting.augment(raw, self.method.setting.augment_generator)
        return Batch(x, labels[index], raw, index)

    def _step(self, batch: Batch, optimizer: torch.optim.Optimizer, *, last: bool) -> None:
        try:
            with self.runtime.autocast():
                terms = self.method.loss(batch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError("BatchNorm sees one value per channel in a batch of one; use batch_size >= 2") from None
        if terms:
            total = torch.stack([term.float() for term in terms.values()]).sum()
            (total / self.config.accumulate).backward()
            self._note_losses(terms, total)
            if last or (self.position.step + 1) % self.config.accumulate == 0:
                if self.config.optimizer.clip_norm is not None:
                    nn.utils.clip_grad_norm_(self.method.network.parameters(), self.config.optimizer.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        self.method.after_step(batch)

    def _note_losses(self, terms: dict[str, Tensor], total: Tensor) -> None:
        """Add this step's terms to the epoch's sums; one device transfer a step."""
        values = torch.stack([total.detach(), *(term.detach().float() for term in terms.values())]).tolist()
        if not math.isfinite(values[0]):
            named = ", ".join(f"{name} = {value:g}" for name, value in zip(terms, values[1:], strict=True))
            raise RunError(
                f"the loss is not finite in task {self.position.task + 1}, epoch {self.position.epoch + 1}, step "
                f"{self.position.step + 1} ({named}); try a smaller learning rate (--set optimizer.lr=...) "
                "or optimizer.clip_norm"
            )
        for name, value in zip(("total", *terms), values, strict=True):
            self.record.epoch_sums[name] = self.record.epoch_sums.get(name, 0.0) + value

    def _log_epoch(self, task: Task, rate: float, steps: int) -> None:
        losses = {name: value / steps for name, value in self.record.epoch_sums.items()}
        self.record.epoch_sums = {}
        entry = {
            "event": "epoch",
            "task": task.index,
            "epoch": self.position.epoch,
            "step": self.record.steps,
        }
        if self.folder is not None:
            self.folder.log({**entry, "lr": rate, "losses": losses})
        if self._writer is not None:
            for name, value in losses.items():
                self._writer.add_scalar(f"loss/{name}", value, self.record.steps)

    def _close_task(self, task: Task) -> None:
        began = time.monotonic()
        self.method.end_task(task)
        self.record.seconds["train"] += time.monotonic() - began
        last = len(self.scenario) - 1 if self.joint else task.index
        class_il, task_il = self.evaluate(min(last + self.config.forward_transfer, len(self.scenario) - 1), last)
        self.record.class_il.append(json_row(class_il))
        self.record.task_il.append(json_row(task_il))
        if self.folder is not None:
            entry = {"event": "evaluation", "task": task.index, "step": self.record.steps}
            self.folder.log({**entry, "class_il": json_row(class_il), "task_il": json_row(task_il)})
        if self._writer is not None:
            self._writer.add_scalar("class_il", float(np.nanmean(class_il[: last + 1])), self.record.steps)
            self._writer.add_scalar("task_il", float(np.nanmean(task_il[: last + 1])), self.record.steps)
        self.progress.evaluated(task.index, class_il[: last + 1], task_il[: last + 1])
        self.optimizer = None
        self.position = Position(task=task.index + 1)
        self.save()

    @torch.no_grad()
    def evaluate(self, last_task: int, seen_until: int | None = None) -> tuple[list[float], list[float]]:
        """Accuracy on tasks 0..last_task, Class-IL and Task-IL, padded with NaN; leaves method and randomness alone.

        For tasks after ``seen_until`` the class-IL arg-max runs over all classes up to that task.
        """
        started = time.monotonic()
        was_training = self.method.training
        self.method.eval()
        offsets = self.scenario.offsets
        class_il, task_il = np.full(len(self.scenario), np.nan), np.full(len(self.scenario), np.nan)
        logits, labels = [], []
        for index in range(last_task + 1):
            test_images, test_labels = self.scenario.test_data(index, self.runtime.device)
            labels.append(test_labels.cpu().numpy())
            for low in range(0, len(test_labels), EVALUATION_BATCH):
                raw = test_images[low : low + EVALUATION_BATCH].to(self.runtime.device)
                with self.runtime.autocast():
                    output = self.method(self.method.setting.augment.normalise(raw))
                logits.append(output.float().cpu().numpy())
        all_logits, all_labels = np.concatenate(logits), np.concatenate(labels)
        bounds = range(last_task, last_task + 1) if seen_until is None else range(seen_until, last_task + 1)
        for bound in bounds:
            chosen = all_labels < offsets[bound + 1]
            rows = task_accuracies(all_logits[chosen], all_labels[chosen], offsets, bound)
            fresh = slice(0, bound + 1) if bound == bounds[0] else slice(bound, bound + 1)
            class_il[fresh], task_il[fresh] = rows[0][fresh], rows[1][fresh]
        self.method.train(was_training)
        self.record.seconds["evaluate"] += time.monotonic() - started
        return class_il.tolist(), task_il.tolist()


def config_digest(config: TrainConfig) -> str:
    """SHA-256 of everything in a configuration that a resumed run may not change."""
    fixed = config.model_dump(mode="json", exclude=set(RESUME_MAY_CHANGE))
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def json_row(row: Iterable[float]) -> list[float | None]:
    """NaN is not JSON: unknown accuracies become null."""
    return [None if math.isnan(value) else value for value in row]


def matrix(rows: list[list[float | None]]) -> Matrix:
    """Rows of a record or of a results file (null for unknown) as an array."""
    return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=np.float64)


def load_method(method: Method, tensors: dict[str, Tensor], folder: RunFolder) -> None:
    """Fill ``method`` from a checkpoint's tensors.

    Raises:
        UserError: names or shapes do not fit; the first one that doesn't is named.
    """
    expected = method.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            what = "lacks" if name not in tensors else "has an unexpected"
            raise UserError(
                f"{folder.path}: the checkpoint {what} tensor {name!r}; it belongs to another configuration"
            )
        if not name.endswith("_extra_state") and tensors[name].shape != expected[name].shape:
            shapes = f"{list(tensors[name].shape)} instead of {list(expected[name].shape)}"
            raise UserError(f"{folder.path}: tensor {name!r} of the checkpoint has shape {shapes}")
    method.load_state_dict(tensors)
