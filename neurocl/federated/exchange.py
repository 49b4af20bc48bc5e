"""One round of messages: to every client and back, in this process or in several, with everything that can go wrong.

A client that raises, hangs, dies or answers nonsense is a :class:`Failure`; the others are not affected.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

from neurocl.errors import NeuroclError
from neurocl.federated.config import FederatedConfig
from neurocl.federated.method import Client, FederatedMethod, Place, Reply, Store
from neurocl.federated.payload import LARGEST_NUMBER, Payload, check_bounded, check_finite, decode, encode
from neurocl.federated.problem import Problem
from neurocl.runs import make_folder, write_error

LARGEST_REPLY = 2 << 30


@dataclass(frozen=True)
class Failure:
    """A client that did not answer.

    Attributes:
        client: its number.
        kind: raised, hung, died, malformed, not-finite or dropped.
        text: what happened.
    """

    client: int
    kind: str
    text: str


@dataclass(frozen=True)
class Outcome:
    """What came back in a round.

    Attributes:
        replies: sorted by client.
        failures: sorted by client.
    """

    replies: list[Reply]
    failures: list[Failure]


class Exchange(Protocol):
    """A runtime: brings messages to clients and their replies back."""

    def __call__(self, place: Place, messages: Mapping[int, Payload], attempt: int) -> Outcome:
        """One message to each client."""

    def close(self) -> None:
        """Stop everything that was started."""


class Stores:
    """What clients keep between rounds: one file per client and round, the last committed one counts.

    A round that is repeated after a crash starts from what its clients had before it.

    Args:
        folder: for the files; None keeps everything in memory.
        done: rounds that are over and saved, when a run is taken up again.
    """

    def __init__(self, folder: Path | None, done: int = 0) -> None:
        self.folder = folder
        self._memory: dict[int, Store] = {}
        self._written: dict[int, Store] = {}
        self._step = done
        if folder is not None:
            make_folder(folder)
            # The crash may have come after the round was saved and before its files were renamed.
            for path in sorted(folder.glob("client-*.new-*")):
                if int(path.suffix.rpartition("-")[2]) <= done:
                    path.replace(path.with_suffix(".safetensors"))
                else:
                    path.unlink()

    def read(self, client: int) -> Store:
        """What a client had at the end of the last committed round."""
        if self.folder is None:
            return {name: array.copy() for name, array in self._memory.get(client, {}).items()}
        path = self.folder / f"client-{client}.safetensors"
        if not path.is_file():
            return {}
        return {name: value.numpy() for name, value in load_file(path).items()}

    def latest(self, client: int) -> Store:
        """What a client has now, the round that is not yet committed included."""
        written = self._written.get(client)
        return {name: array.copy() for name, array in written.items()} if written else self.read(client)

    def write(self, client: int, store: Store) -> None:
        """Remember what a client wants to keep, until the round is committed."""
        self._written[client] = store
        if self.folder is not None and store:
            path = self.folder / f"client-{client}.new-{self._step + 1}"
            try:
                save_file({name: torch.from_numpy(array.copy()) for name, array in store.items()}, path)
            except OSError as error:
                raise write_error(path, error) from None

    def discard(self, clients: Iterable[int]) -> None:
        """These clients' replies do not count, and so neither does what they stored in this round."""
        for client in clients:
            self._written.pop(client, None)
            if self.folder is not None:
                (self.folder / f"client-{client}.new-{self._step + 1}").unlink(missing_ok=True)

    def commit(self) -> None:
        """The round is over and saved: make what was written in it current."""
        self._step += 1
        for client, store in self._written.items():
            if self.folder is None:
                self._memory[client] = store
            elif store:
                path = self.folder / f"client-{client}.new-{self._step}"
                path.replace(path.with_suffix(".safetensors"))
        self._written = {}


@dataclass(frozen=True)
class Fault:
    """A planned mishap, for tests and demonstrations: ``kind`` is drop, raise, hang, die, nan, shape or garbage."""

    kind: str
    client: int
    task: int
    round: int
    phase: str = "round"


def run_client(method: FederatedMethod, client: Client, place: Place, message: bytes, fault: str = "") -> bytes:
    """A client's work from encoded message to encoded reply."""
    if fault == "raise":
        raise RuntimeError("planned fault")
    reply = method.client(client, place, decode(message, max_bytes=LARGEST_REPLY))
    if fault == "nan":
        name = next(name for name, array in reply.arrays.items() if array.dtype.kind == "f")
        spoilt = reply.arrays[name] * float("nan")
        reply = Payload({**reply.arrays, name: spoilt}, reply.meta)
    if fault == "shape":
        name = next(iter(reply.arrays))
        reply = Payload({**reply.arrays, name: reply.arrays[name].ravel()[:1]}, reply.meta)
    return b"not a payload" if fault == "garbage" else encode(reply)


def checked(client: int, data: bytes, limit: int = LARGEST_REPLY) -> Reply | Failure:
    """A reply as it came in, or what is wrong with it."""
    try:
        payload = decode(data, max_bytes=limit)
    except NeuroclError as error:
        return Failure(client, "malformed", str(error))
    name = check_finite(payload)
    if name is not None:
        return Failure(client, "not-finite", f"{name} holds NaN or infinity")
    name = check_bounded(payload)
    if name is not None:
        return Failure(client, "malformed", f"{name} holds a number beyond {LARGEST_NUMBER:.0e}")
    count = payload.meta.get("n")
    if not isinstance(count, int | float) or isinstance(count, bool) or count < 0:
        return Failure(client, "malformed", "the reply does not say how many samples stand behind it")
    return Reply(client, payload)


def sorted_outcome(found: Sequence[Reply | Failure]) -> Outcome:
    """Replies and failures, each sorted by client."""
    replies = sorted((item for item in found if isinstance(item, Reply)), key=lambda item: item.client)
    failures = sorted((item for item in found if isinstance(item, Failure)), key=lambda item: item.client)
    return Outcome(replies, failures)


class SequentialExchange:
    """All clients in this process, one after the other.

    Args:
        problem: with the clients' data.
        method: what they run.
        stores: what they keep.
        faults: planned mishaps; hang and die count as lost replies here.
    """

    def __init__(self, problem: Problem, method: FederatedMethod, stores: Stores, faults: Sequence[Fault] = ()) -> None:
        self.problem = problem
        self.method = method
        self.stores = stores
        self.faults = planned(faults)

    def __call__(self, place: Place, messages: Mapping[int, Payload], attempt: int) -> Outcome:
        found: list[Reply | Failure] = []
        for number, message in sorted(messages.items()):
            fault = self.faults.get((*place.key, number), "") if attempt == 0 else ""
            if fault in ("drop", "hang", "die"):
                found.append(
                    Failure(number, {"drop": "dropped", "hang": "hung", "die": "died"}[fault], "planned fault")
                )
                continue
            client = client_of(self.problem, number, place, self.stores.read(number))
            try:
                data = run_client(self.method, client, place, encode(message), fault)
            except NeuroclError as error:
                found.append(Failure(number, "raised", str(error)))
                continue
            except Exception as error:
                found.append(Failure(number, "raised", f"{type(error).__name__}: {error}"))
                continue
            reply = checked(number, data)
            if isinstance(reply, Reply):
                self.stores.write(number, client.store)
            found.append(reply)
        return sorted_outcome(found)

    def close(self) -> None:
        """Nothing was started."""


def client_of(problem: Problem, number: int, place: Place, store: Store) -> Client:
    """A client at a place, with its data of the task."""
    data = problem.train_samples(number, place.task)
    return Client(number, data, problem.config.seed, store, torch.device(problem.config.device))


def planned(faults: Sequence[Fault]) -> dict[tuple[str, int, int, int], str]:
    """Faults by phase, task, round and client."""
    return {(fault.phase, fault.task, fault.round, fault.client): fault.kind for fault in faults}


@dataclass
class _Worker:
    """A process that runs clients."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    client: int = -1
    deadline: float = field(default=float("inf"))


class ProcessExchange:
    """Clients in several processes side by side; one that hangs or dies is replaced.

    Processes talk in encoded payloads and JSON over pipes.

    Args:
        problem: with the clients' data; every process makes its own from the configuration.
        stores: what clients keep.
        faults: planned mishaps.
    """

    def __init__(self, problem: Problem, stores: Stores, faults: Sequence[Fault] = ()) -> None:
        self.config: FederatedConfig = problem.config
        self.stores = stores
        self.faults = planned(faults)
        self._workers = [self._start() for _ in range(min(self.config.workers, problem.num_clients))]

    def _start(self) -> _Worker:
        mine, theirs = socket.socketpair()
        command = [sys.executable, "-m", "neurocl.federated.worker", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        pipe = Connection(mine.detach())
        pipe.send_bytes(self.config.model_dump_json().encode())
        return _Worker(process, pipe)

    def __call__(self, place: Place, messages: Mapping[int, Payload], attempt: int) -> Outcome:
        waiting = sorted(messages, reverse=True)
        found: list[Reply | Failure] = []
        busy: list[_Worker] = []
        idle = list(self._workers)
        while waiting or busy:
            while waiting and idle:
                worker, number = idle.pop(), waiting.pop()
                fault = self.faults.get((*place.key, number), "") if attempt == 0 else ""
                if fault == "drop":
                    found.append(Failure(number, "dropped", "planned fault"))
                    idle.append(worker)
                    continue
                worker.client = number
                worker.deadline = time.monotonic() + self.config.timeout if self.config.timeout else float("inf")
                try:
                    self._send(worker, place, messages[number], fault)
                except OSError:
                    found.append(Failure(number, "died", "the process was gone"))
                    idle.append(self._replaced(worker))
                    continue
                busy.append(worker)
            nearest = min((worker.deadline for worker in busy), default=float("inf"))
            left = None if nearest == float("inf") else max(0.0, nearest - time.monotonic())
            ready = wait([worker.pipe for worker in busy], timeout=left) if busy else []
            now = time.monotonic()
            for worker in list(busy):
                if worker.pipe in ready:
                    busy.remove(worker)
                    item, alive = self._receive(worker)
                    found.append(item)
                    idle.append(worker if alive else self._replaced(worker))
                elif now >= worker.deadline:
                    busy.remove(worker)
                    found.append(Failure(worker.client, "hung", f"no reply within {self.config.timeout:g} s"))
                    idle.append(self._replaced(worker))
        return sorted_outcome(found)

    def _send(self, worker: _Worker, place: Place, message: Payload, fault: str) -> None:
        task, phase = place.task, place.phase
        header = {
            "client": worker.client,
            "task": task.index,
            "phase": [phase.name, phase.rounds, phase.train],
            "round": place.round,
            "fault": fault,
        }
        worker.pipe.send_bytes(json.dumps(header).encode())
        worker.pipe.send_bytes(encode(message))
        store = {name: array for name, array in self.stores.read(worker.client).items()}
        worker.pipe.send_bytes(encode(Payload(store)))

    def _receive(self, worker: _Worker) -> tuple[Reply | Failure, bool]:
        number = worker.client
        try:
            header = json.loads(worker.pipe.recv_bytes(1 << 20))
            if header["error"]:
                return Failure(number, "raised", str(header["error"])), True
            data = worker.pipe.recv_bytes(LARGEST_REPLY)
            kept = decode(worker.pipe.recv_bytes(LARGEST_REPLY), max_bytes=LARGEST_REPLY)
        except (EOFError, OSError, ValueError) as error:
            return Failure(number, "died", f"the process ended ({type(error).__name__})"), False
        except NeuroclError as error:
            return Failure(number, "malformed", str(error)), False
        reply = checked(number, data)
        if isinstance(reply, Reply):
            self.stores.write(number, dict(kept.arrays))
        return reply, True

    def _replaced(self, worker: _Worker) -> _Worker:
        _end(worker)
        fresh = self._start()
        self._workers[self._workers.index(worker)] = fresh
        return fresh

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            _end(worker)
        self._workers = []


def _end(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.wait()
