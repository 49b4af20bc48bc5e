"""What answers a server's messages at a client, after a look at whether the client agrees to them."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from flwr.app import Message
from pydantic import ValidationError

from neurocl.config import Config
from neurocl.errors import NeuroclError, UserError
from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.config import FederatedConfig
from neurocl.federated.exchange import LARGEST_REPLY, Failure, Fault, ProcessExchange, SequentialExchange, Stores
from neurocl.federated.flower.records import HELLO, MAX_TEXT, VERSION, Answer, Header, from_record, to_record
from neurocl.federated.method import FederatedMethod, Phase, Place
from neurocl.federated.payload import decode, encode
from neurocl.federated.problem import Problem
from neurocl.runs import make_folder, write_atomically

Say = Callable[[str], None]
_RUN = re.compile(r"[0-9a-f]{16}")
_NAME = re.compile(r"[a-z0-9-]+")


class Own(Config):
    """What a client decides itself, whatever a server says.

    Attributes:
        client: its number.
        dataset: the one data set that it takes part with.
        data_dir: where that is looked for first.
        backbone: its own folder with the network, where the server starts from one in a folder.
        secure_sum: it takes part in secure summation only.
        device, threads: of its computation.
    """

    client: int
    dataset: str = "digits"
    data_dir: Path | None = None
    backbone: Path | None = None
    secure_sum: bool = False
    device: str = "cpu"
    threads: int | None = 1


class FlowerClient:
    """Answers a server's messages: checks what is asked, does it in a runtime of its own, and remembers the answer.

    Args:
        own: what this client decides.
        folder: for what it stores and for its last answer, in a folder for every run and client.
        apart: compute in a process of its own, which may hang or die; else in this one.
        faults: planned mishaps, for tests.
        say: called with a line for every server that asks for this client and every message that is answered.
    """

    def __init__(
        self, own: Own, folder: Path, *, apart: bool = True, faults: Iterable[Fault] = (), say: Say | None = None
    ) -> None:
        self.own = own
        self.folder = folder
        self.apart = apart
        self.faults = tuple(faults)
        self.say = say or (lambda line: None)
        self._open: tuple[str, Problem, FederatedMethod, SequentialExchange | ProcessExchange] | None = None

    def __call__(self, message: Message) -> Message:
        """The reply to a message of a server; also refusals and failures are replies."""
        own = self.own.client
        if message.metadata.message_type == HELLO:
            self.say(f"client {own} is connected, and waits for the server to begin")
            return Message(to_record(Answer(version=VERSION, client=own)), reply_to=message)
        asked, started = "a message", time.perf_counter()
        try:
            header, data = from_record(Header, message.content)
            asked = f"task {header.task + 1}, {header.phase} {header.round + 1} of {header.rounds}"[:MAX_TEXT]
            found = self.answer(header, data)
        except NeuroclError as error:
            found = Failure(own, "raised", str(error))
        except Exception as error:  # whatever happens here, the server is told
            found = Failure(own, "raised", f"{type(error).__name__}: {error}")
        failed = f"{found.kind}: {' '.join(found.text.split())}" if isinstance(found, Failure) else ""
        line = f"{asked}: {failed or f'answered in {time.perf_counter() - started:.1f} s'}"
        # A server's words must not steer a terminal.
        self.say("".join(letter if letter.isprintable() else " " for letter in line))
        if isinstance(found, Failure):
            answer = Answer(version=VERSION, client=own, kind=found.kind, text=found.text[:MAX_TEXT])
            return Message(to_record(answer), reply_to=message)
        return Message(to_record(Answer(version=VERSION, client=own), found), reply_to=message)

    def answer(self, header: Header, data: bytes) -> bytes | Failure:
        """The encoded reply to an encoded message.

        Raises:
            UserError: the client does not agree to what is asked.
            PayloadError: the message is none.
        """
        number = self.own.client
        if header.client != number:
            raise UserError(f"this is client {number}, not {header.client}")
        if not _RUN.fullmatch(header.run):
            raise UserError("a run is named by sixteen hexadecimal digits")
        # Nodes of a simulation share a folder.
        folder = self.folder / f"{header.run}-{number}"
        key = hashlib.sha256(header.model_dump_json(exclude={"timeout"}).encode() + data).hexdigest()
        last = folder / f"answer-{key}"
        # The same question twice: a reply was lost on the way, or a server was killed before it could save.
        if last.is_file():
            return last.read_bytes()
        problem, method, runtime = self._runtime(header)
        place = self._place(header, problem, method)
        runtime.stores = Stores(folder, done=header.counted)
        if isinstance(runtime, ProcessExchange):
            runtime.config = runtime.config.model_copy(update={"timeout": header.timeout})
        payload = decode(data, max_bytes=LARGEST_REPLY)
        outcome = runtime(place, {number: payload}, header.attempt)
        if outcome.failures:
            return outcome.failures[0]
        reply = encode(outcome.replies[0].payload)
        for old in folder.glob("answer-*"):
            old.unlink()
        write_atomically(last, reply)
        return reply

    def close(self) -> None:
        """End the process that was started."""
        if self._open is not None:
            self._open[3].close()
            self._open = None

    def _runtime(self, header: Header) -> tuple[Problem, FederatedMethod, SequentialExchange | ProcessExchange]:
        """Problem, method and runtime of a run, kept while its configuration stays the same."""
        if self._open is None or self._open[0] != header.config:
            self.close()
            config = agreed(header.config, self.own)
            problem = problem_for(config)
            method = method_for(problem)
            runtime: SequentialExchange | ProcessExchange
            make_folder(self.folder)
            if self.apart:
                runtime = ProcessExchange(problem, Stores(None), self.faults)
            else:
                runtime = SequentialExchange(problem, method, Stores(None), self.faults)
            self._open = (header.config, problem, method, runtime)
        return self._open[1:]

    def _place(self, header: Header, problem: Problem, method: FederatedMethod) -> Place:
        """The place of a message, if the method has such a one."""
        if not 0 <= header.task < len(problem.tasks):
            raise UserError(f"there is no task {header.task}, only {len(problem.tasks)}")
        task, phase = problem.tasks[header.task], Phase(header.phase, header.rounds, header.train)
        if phase not in tuple(method.phases(task)) or not 0 <= header.round < phase.rounds:
            raise UserError(f"{problem.config.method} has no round {header.round} of such a phase {header.phase!r}")
        return Place(task, phase, header.round)


def agreed(text: str, own: Own) -> FederatedConfig:
    """The configuration that a server proposes, with this client's own word on everything that touches its machine.

    Raises:
        UserError: no configuration, or one that the client does not agree with.
    """
    try:
        config = FederatedConfig.model_validate_json(text)
    except ValidationError as error:
        found = error.errors()[0]
        raise UserError(f"refused: {'.'.join(map(str, found['loc']))}: {found['msg']}") from None
    if config.dataset != own.dataset:
        raise UserError(f"refused: the server asks for {config.dataset}, this client takes part with {own.dataset}")
    if not 0 <= own.client < config.partition.num_clients:
        raise UserError(f"refused: the federation has {config.partition.num_clients} clients, this is {own.client}")
    if own.secure_sum and config.secure_sum is None:
        raise UserError("refused: the server would see the replies of this client, which takes part in sums only")
    backbone = config.backbone
    if backbone is not None and not _NAME.fullmatch(backbone):
        # A path on the server's machine says nothing here, and a server does not choose what is read here.
        if own.backbone is None:
            raise UserError("refused: the server starts from a folder with a network; name your copy with --backbone")
        backbone = str(own.backbone)
    local = {"data_dir": own.data_dir, "device": own.device, "threads": own.threads, "workers": 1, "backbone": backbone}
    return config.model_copy(update=local)
