"""A federated run: tasks, phases and rounds over any exchange, saved after every round and taken up where it stopped.

``K`` clients, ``T`` tasks, ``C`` classes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neurocl.config import to_yaml, validate
from neurocl.devices import machine, peak_memory_mb, versions
from neurocl.errors import Interrupted, RunError, UserError
from neurocl.federated import metrics
from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.config import FederatedConfig
from neurocl.federated.exchange import Exchange, Failure, Fault, ProcessExchange, SequentialExchange, Stores
from neurocl.federated.local_training import EVALUATION_BATCH, batches
from neurocl.federated.method import FederatedMethod, Place, Predictor, Reply, RoundLost, Samples, Task
from neurocl.federated.payload import Payload, num_bytes
from neurocl.federated.privacy import spent
from neurocl.federated.problem import Problem
from neurocl.runs import RunFolder
from neurocl.stopping import StopRequest

MAX_LOST_ROUNDS = 3
#: in the folder of a run whose clients keep their own stores elsewhere
REMOTE = "flower"
Say = Callable[[dict[str, Any]], None]
Connect = Callable[[Problem, FederatedMethod, Stores, RunFolder], Exchange]


@dataclass
class Progress:
    """Where a run is and what it has measured; with the server's state all that a resumed run needs.

    Attributes:
        step: rounds that are over, of all phases of all tasks.
        correct: right answers on task i after task t, [T][T]; of all clients' models where each has its own.
        bytes_up, bytes_down: so far.
        lost: rounds in a row without enough replies.
        failures: of all rounds: number of times by kind.
        seconds: of all rounds.
    """

    step: int = 0
    correct: list[list[int]] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    lost: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class FederatedRun:
    """One run.

    Args:
        problem: data and tasks.
        method: what is run.
        exchange: brings messages to the clients.
        stores: what clients keep.
        folder: where the run is kept; None keeps nothing.
        say: called with every record of the log.
    """

    def __init__(
        self,
        problem: Problem,
        method: FederatedMethod,
        exchange: Exchange,
        stores: Stores,
        *,
        folder: RunFolder | None = None,
        say: Say | None = None,
    ) -> None:
        self.problem = problem
        self.method = method
        self.exchange = exchange
        self.stores = stores
        self.folder = folder
        self.say = say or (lambda record: None)
        self.progress = Progress()
        self.state = Payload()
        #: clients that are not asked any more, and how the last of them were taken out
        self.removed: frozenset[int] = frozenset()
        self.unlearning: dict[str, Any] | None = None

    def run(self) -> dict[str, Any]:
        """All rounds that are left; returns the result document.

        Raises:
            RunError: three rounds in a row without enough replies.
            Interrupted: SIGINT or SIGTERM; everything up to the last round is saved.
        """
        if self.progress.step == 0:
            self.state = self.method.initial_state()
        with StopRequest().listen() as stop:
            for step, place, first, last in self._schedule():
                if step < self.progress.step:
                    continue
                if first:
                    self.state = self.method.begin_task(self.state, place.task)
                self._round(place)
                if last:
                    self.state = self.method.end_task(self.state, place.task)
                    self._evaluate(place)
                self.progress.step = step + 1
                self._save()
                if stop.requested:
                    where = f" in {self.folder.path}" if self.folder else ""
                    raise Interrupted(f"stopped after round {place.round + 1} of task {place.task.index + 1}{where}")
        return self._result()

    def _schedule(self) -> Iterator[tuple[int, Place, bool, bool]]:
        """Every round: its number, its place, and whether it is the first or last of its task."""
        step = 0
        for task in self.problem.tasks:
            rounds = [(phase, number) for phase in self.method.phases(task) for number in range(phase.rounds)]
            for index, (phase, number) in enumerate(rounds):
                yield step, Place(task, phase, number), index == 0, index == len(rounds) - 1
                step += 1

    def participants(self, place: Place) -> list[int]:
        """The clients that take part in a round, sorted."""
        return [client for client in self.method.coming(self.state, place) if client not in self.removed]

    def _round(self, place: Place) -> None:
        started = time.perf_counter()
        config, progress = self.problem.config, self.progress
        message = self.method.message(self.state, place)
        asked, quorum = self.participants(place), self.method.quorum(self.state, place)
        replies: list[Reply] = []
        failures: list[Failure] = []
        up = down = 0
        waiting = asked
        for attempt in range(config.max_repeats + 1):
            # Who has answered is not asked again: nobody says two things in a round, or stores twice.
            outcome = self.exchange(place, dict.fromkeys(waiting, message), attempt)
            failures += outcome.failures
            down += num_bytes(message) * len(waiting)
            up += sum(num_bytes(reply.payload) for reply in outcome.replies)
            answered = {reply.client for reply in outcome.replies}
            waiting = [client for client in waiting if client not in answered]
            # Whoever has no samples has nothing to say.
            replies += [reply for reply in outcome.replies if float(reply.payload.meta["n"]) > 0]  # type: ignore[arg-type]
            if len(replies) >= quorum or not outcome.failures:
                break
        replies.sort(key=lambda reply: reply.client)
        if replies:
            replies, rejected = self._fitting(place, replies)
            failures += rejected
            self.stores.discard(failure.client for failure in rejected)
        for failure in failures:
            progress.failures[failure.kind] = progress.failures.get(failure.kind, 0) + 1
        reason, lost = "", bool(asked)
        # With privacy a round to which nobody came must look like any other: noise on a sum of nothing.
        if len(replies) >= quorum or (config.privacy is not None and not asked):
            try:
                self.state = self.method.aggregate(self.state, place, replies)
            except RoundLost as error:
                reason = str(error)
            else:
                lost = False
                progress.lost = 0 if self.method.closes(place) else progress.lost
        if lost:
            self.stores.discard(asked)
            progress.lost += 1
            if progress.lost >= MAX_LOST_ROUNDS:
                told = reason or "; ".join(f"client {item.client} {item.kind}: {item.text}" for item in failures[:3])
                raise RunError(f"{MAX_LOST_ROUNDS} rounds in a row without enough replies ({told or 'no samples'})")
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        progress.bytes_up, progress.bytes_down = progress.bytes_up + up, progress.bytes_down + down
        self._log(
            {
                "event": "round",
                "task": place.task.index,
                "phase": place.phase.name,
                "round": place.round,
                "clients": [reply.client for reply in replies],
                "failures": [[item.client, item.kind, item.text] for item in failures],
                "bytes_up": up,
                "bytes_down": down,
                "seconds": seconds,
                **({"lost": reason} if reason else {}),
            }
        )

    def _fitting(self, place: Place, replies: list[Reply]) -> tuple[list[Reply], list[Failure]]:
        """Replies with the arrays and shapes that the method allows, and the others."""
        good, bad = [], []
        for reply in replies:
            reason = self.method.objection(self.state, place, reply.payload)
            if reason:
                bad.append(Failure(reply.client, "malformed", reason))
            else:
                good.append(reply)
        return good, bad

    def _evaluate(self, place: Place) -> None:
        task, progress = place.task, self.progress
        predictors, seen = self._predictors(task), task.classes.stop
        samples = [self.problem.test_samples(known) for known in self.problem.tasks[: task.index + 1]]
        row = [sum(count_correct(predict, own, seen) for predict in predictors) for own in samples]
        progress.correct.append(row + [0] * (len(self.problem.tasks) - len(row)))
        totals = [len(predictors) * len(own) for own in samples]
        record = {
            "event": "task",
            "task": task.index,
            "accuracy": [100 * right / max(1, total) for right, total in zip(row, totals, strict=True)],
            "average": 100 * sum(row) / max(1, sum(totals)),
            "bytes_up": progress.bytes_up,
            "bytes_down": progress.bytes_down,
        }
        self._log(record)

    def _predictors(self, task: Task) -> list[Predictor]:
        """The server's model, or one of every client."""
        if not self.method.personal:
            return [self.method.predictor(self.state, task)]
        stores = (self.stores.latest(client) for client in range(self.problem.num_clients))
        return [self.method.predictor(Payload(store), task) for store in stores]

    def _log(self, record: dict[str, Any]) -> None:
        if self.folder is not None:
            self.folder.log(record)
        self.say(record)

    def _save(self) -> None:
        if self.folder is not None:
            tensors = {name: torch.from_numpy(np.array(array)) for name, array in self.state.arrays.items()}
            self.folder.save_checkpoint(tensors, self.saved())
        self.stores.commit()

    def saved(self) -> dict[str, Any]:
        """What a checkpoint holds beside the arrays of the state."""
        gone = {"removed": sorted(self.removed), "unlearning": self.unlearning} if self.removed else {}
        return {"meta": self.state.meta, "progress": self.progress.__dict__, **gone}

    def load(self) -> None:
        """Take up the last saved round.

        Raises:
            UserError: a damaged checkpoint.
        """
        assert self.folder is not None
        checkpoint = self.folder.load_checkpoint()
        self.folder.rewind_metrics(checkpoint.state["metrics_bytes"])
        arrays = {name: value.numpy() for name, value in checkpoint.tensors.items()}
        self.state = Payload(arrays, checkpoint.state["meta"])
        self.progress = Progress(**checkpoint.state["progress"])
        self.removed = frozenset(checkpoint.state.get("removed", ()))
        self.unlearning = checkpoint.state.get("unlearning")

    def _result(self) -> dict[str, Any]:
        progress, config = self.progress, self.problem.config
        correct = np.array(progress.correct, dtype=np.int64)
        predictors = self._predictors(self.problem.tasks[-1])
        total = np.array([len(self.problem.test_samples(task)) for task in self.problem.tasks], dtype=np.int64)
        total *= len(predictors)
        found = metrics.summarize(correct, total)
        everybody = range(self.problem.num_clients)
        own = np.array([self._local(predictors[client % len(predictors)], client) for client in everybody])
        accuracies = metrics.client_accuracies(own[:, 0], own[:, 1])
        if own[:, 1].any():
            found |= metrics.client_fairness(accuracies)
        gone = {"unlearning": self.unlearning} if self.unlearning is not None else {}
        private = {"privacy": spent(self.state, config.privacy, config.participation)} if config.privacy else {}
        return {
            "status": "finished",
            "area": "federated",
            "config": config.model_dump(mode="json"),
            "protocol": {
                "tasks": [list(task.classes) for task in self.problem.tasks],
                "batch_size": config.batch_size,
                "evaluated_on": "test split",
            },
            "method": config.method,
            "dataset": config.dataset,
            "seed": config.seed,
            "accuracy": {"class_il": np.nan_to_num(metrics.accuracy_matrix(correct, total), nan=0.0).tolist()},
            "metrics": {"class_il": found},
            "bytes": {"up": progress.bytes_up, "down": progress.bytes_down},
            "failures": progress.failures,
            **private,
            **gone,
            "seconds": {"total": progress.seconds},
            "machine": machine(torch.device(config.device)),
            "memory_mb": peak_memory_mb(torch.device(config.device)),
            "versions": versions(),
        }

    def _local(self, predict: Predictor, client: int) -> tuple[int, int]:
        """Right answers of the last model on a client's own test share of all tasks, and how many there are."""
        parts = [self.problem.local_test_samples(client, task) for task in self.problem.tasks]
        samples = Samples(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
        return count_correct(predict, samples, self.problem.tasks[-1].classes.stop), len(samples)


@torch.no_grad()
def count_correct(predict: Predictor, samples: Samples, seen: int) -> int:
    """Right answers among the classes seen so far."""
    right = 0
    for batch in batches(samples, EVALUATION_BATCH):
        right += int((predict(batch.x)[:, :seen].argmax(dim=1).cpu() == batch.y).sum())
    return right


def run_federated(
    config: FederatedConfig,
    *,
    out: Path | None = None,
    say: Say | None = None,
    faults: Sequence[Fault] = (),
    connect: Connect | None = None,
) -> tuple[dict[str, Any], Path]:
    """Run a method over a federation in a new run folder; returns the result and the folder.

    Args:
        config: of the run.
        out: the folder, ``runs/...`` if None.
        say: called with every record of the log.
        faults: planned mishaps of clients in this process or its own ones.
        connect: makes another runtime than these, such as :mod:`neurocl.federated.flower`'s.

    Raises:
        UserError: a configuration that does not fit, or data that are not there.
        RunError: the federation broke down, or the disk is full.
        Interrupted: stopped by the user; everything is saved.
    """
    dataset = config.dataset.replace(":", "-")
    folder = RunFolder.create(out, stem=f"federated-{config.method}-{dataset}-{config.seed}")
    try:
        return _run(config, folder, say, faults, connect, fresh=True), folder.path
    except BaseException:
        if not (folder.path / "config.yaml").exists():
            # Nothing began: the next attempt may have the same name.
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def resume_federated(path: Path, *, say: Say | None = None, connect: Connect | None = None) -> dict[str, Any]:
    """Go on with an interrupted run, in the runtime that it began in.

    Raises:
        UserError: not a federated run, in use, or with a damaged checkpoint.
    """
    folder = RunFolder.open(path)
    return _run(load_federated_config(folder), folder, say, (), connect, fresh=False)


def load_federated_config(folder: RunFolder) -> FederatedConfig:
    """The configuration of a run.

    Raises:
        UserError: a run of another area.
    """
    values = folder.config
    if "partition" not in values:
        raise UserError(f"{folder.path} is not a federated run")
    return validate(FederatedConfig, values, source=str(folder.path / "config.yaml"))


def _run(
    config: FederatedConfig,
    folder: RunFolder,
    say: Say | None,
    faults: Sequence[Fault],
    connect: Connect | None,
    *,
    fresh: bool,
) -> dict[str, Any]:
    if not fresh and (connect is None) == (folder.path / REMOTE).exists():
        where = "in this process: go on with `neurocl federated run --resume`"
        if connect is None:
            where = "on Flower: go on with `neurocl federated server --resume`, or with --runtime flower-sim"
        raise UserError(f"{folder.path} was begun {where}")
    folder.acquire()
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        problem = problem_for(config)
        method = method_for(problem)
        if connect is not None and method.personal:
            raise UserError(f"{config.method} leaves every model with its client, where no server can judge it")
        if fresh:
            folder.write_config(to_yaml(config))
        done = 0
        if not fresh and folder.has_checkpoint():
            done = int(folder.load_checkpoint().state["progress"]["step"])
        elif not fresh:
            folder.rewind_metrics()
        stores = Stores(folder.path / "clients", done)
        exchange: Exchange
        if connect is not None:
            exchange = connect(problem, method, stores, folder)
        elif config.workers:
            exchange = ProcessExchange(problem, stores, faults)
        else:
            exchange = SequentialExchange(problem, method, stores, faults)
        try:
            run = FederatedRun(problem, method, exchange, stores, folder=folder, say=say)
            if done:
                run.load()
            result = run.run()
        finally:
            exchange.close()
        folder.write_result(result)
        return result
    finally:
        folder.release()
