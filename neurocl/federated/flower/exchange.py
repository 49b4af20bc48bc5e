"""Rounds over Flower's Grid: clients are found among the connected nodes, replies become those of any runtime."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import httpx
import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from neurocl.errors import RunError
from neurocl.federated.config import FederatedConfig
from neurocl.federated.exchange import Failure, Outcome, Stores, checked, sorted_outcome
from neurocl.federated.flower.records import (
    HELLO,
    LONGEST_TIMEOUT,
    MAX_TEXT,
    PHASE,
    VERSION,
    Answer,
    Header,
    from_record,
    to_record,
)
from neurocl.federated.method import Place, Reply
from neurocl.federated.payload import Payload, PayloadError, encode
from neurocl.federated.problem import Problem

# A deployment looks for messages every few seconds, and a client's first one starts a process.
SHORTEST_TIMEOUT, GRACE = 120.0, 30.0
HELLO_SECONDS = 60.0


class FlowerExchange:
    """Rounds over a Grid: client numbers are found among the connected nodes, replies become those of any runtime.

    ``stores`` holds here, for every client, how many of its replies were used. Clients keep what they store themselves
    and learn from that number which of it is current.

    Args:
        grid: of a running ServerApp.
        problem: with the configuration of the run.
        stores: see above.
        run: sixteen hexadecimal digits that name the run to its clients.
        patience: seconds to wait for all clients before the first round, and later for as many as a round needs.
        numbers: client numbers by node, where the server knows them from keys; else nodes are asked.
        pause: seconds between two looks.
    """

    def __init__(
        self,
        grid: Grid,
        problem: Problem,
        stores: Stores,
        *,
        run: str,
        patience: float = 600.0,
        numbers: Mapping[int, int] | None = None,
        pause: float = 0.1,
    ) -> None:
        self.grid = grid
        self.config: FederatedConfig = problem.config
        self.num_clients = problem.num_clients
        self.stores = stores
        self.run = run
        self.patience = patience
        self.pause = pause
        self._fixed = numbers is not None
        self._numbers: dict[int, int] = dict(numbers or {})
        self._asked: dict[str, tuple[int, float]] = {}
        self._seconds: list[float] = []

    @property
    def timeout(self) -> float:
        """Seconds that clients have: the configuration's, else five median rounds, at least two minutes."""
        typical = 5 * float(np.median(self._seconds)) if self._seconds else 0.0
        return min(self.config.timeout or max(SHORTEST_TIMEOUT, typical), LONGEST_TIMEOUT)

    def __call__(self, place: Place, messages: Mapping[int, Payload], attempt: int) -> Outcome:
        if not messages:
            return Outcome([], [])
        nodes = self._nodes(sorted(messages))
        found: list[Reply | Failure] = [
            Failure(number, "dropped", "not connected") for number in messages if number not in nodes
        ]
        started, timeout = time.monotonic(), self.timeout
        # Most methods send one message to all.
        encoded: dict[int, bytes] = {}
        instructions = []
        for number, node in sorted(nodes.items()):
            message = messages[number]
            data = encoded.setdefault(id(message), encode(message))
            content = to_record(self._header(place, number, attempt, timeout), data)
            instructions.append(Message(content, node, PHASE, ttl=timeout + 2 * GRACE, group_id=str(place.round)))
        waiting = self._push(instructions, nodes)
        while waiting:
            for reply in self._pull(waiting):
                found.append(self._read(reply, waiting.pop(reply.metadata.reply_to_message_id)))
            if time.monotonic() >= started + timeout + GRACE:
                break
            if waiting:
                time.sleep(self.pause)
        found += [Failure(number, "hung", f"no reply within {timeout:g} s") for number in waiting.values()]
        self._seconds.append(time.monotonic() - started)
        for item in found:
            if isinstance(item, Reply):
                self.stores.write(item.client, {"count": np.array(self._counted(item.client) + 1)})
        return sorted_outcome(found)

    def close(self) -> None:
        """Nothing was started."""

    def _counted(self, client: int) -> int:
        return int(self.stores.read(client).get("count", 0))

    def _header(self, place: Place, number: int, attempt: int, timeout: float) -> Header:
        return Header(
            version=VERSION,
            run=self.run,
            client=number,
            counted=self._counted(number),
            task=place.task.index,
            phase=place.phase.name,
            rounds=place.phase.rounds,
            train=place.phase.train,
            round=place.round,
            attempt=attempt,
            timeout=timeout,
            config=self.config.model_dump_json(exclude={"data_dir", "workers", "device", "threads"}),
        )

    def _push(self, instructions: list[Message], nodes: Mapping[int, int]) -> dict[str, int]:
        """Send; returns client numbers by the ids under which replies will come."""
        if not instructions:
            return {}
        ids = list(_over(self.grid.push_messages, instructions))
        return {message: number for message, number in zip(ids, sorted(nodes), strict=True) if message}

    def _pull(self, waiting: Mapping[str, Any]) -> list[Message]:
        """Replies to messages that somebody still waits for; what comes late or twice is nobody's."""
        replies = _over(self.grid.pull_messages, list(waiting))
        unique = {reply.metadata.reply_to_message_id: reply for reply in replies}
        return [reply for message, reply in unique.items() if message in waiting]

    def _read(self, reply: Message, number: int) -> Reply | Failure:
        if reply.has_error():
            # 2: the client's code raised, 8: it crashed; the others: nobody can say.
            kind = "raised" if reply.error.code == 2 else "died"
            return Failure(number, kind, _told(reply.error.reason or f"Flower's error {reply.error.code}"))
        try:
            answer, data = from_record(Answer, reply.content)
        except PayloadError as error:
            return Failure(number, "malformed", _told(str(error)))
        if answer.client != number:
            self._numbers = {node: own for node, own in self._numbers.items() if own != number}
            return Failure(number, "malformed", f"answered by client {answer.client}")
        if answer.kind:
            kinds = ("raised", "hung", "died", "malformed", "not-finite", "dropped")
            return Failure(number, answer.kind if answer.kind in kinds else "raised", _told(answer.text))
        return checked(number, data)

    def _nodes(self, wanted: list[int]) -> dict[int, int]:
        """Connected nodes by client number, after waiting as long as it makes sense."""
        first, least = not self._seconds, self._least(len(wanted))
        deadline = time.monotonic() + self.patience
        while True:
            online = set(_over(self.grid.get_node_ids))
            self._greet(online)
            nodes: dict[int, int] = {}
            for node, number in sorted(self._numbers.items(), reverse=not self._fixed):
                if node in online and number in wanted:
                    nodes.setdefault(number, node)
            now = time.monotonic()
            pending = any(now < until for node, until in self._asked.values() if node in online)
            # Those who have answered already are not wanted again, but they are here.
            here = len({number for node, number in self._numbers.items() if node in online})
            if len(nodes) == len(wanted) or (here >= least and not pending and not first):
                return nodes
            if now >= deadline:
                if here >= least:
                    return nodes
                raise RunError(
                    f"{here} of {self.num_clients} clients are connected after {self.patience:g} s, "
                    f"at least {least} are needed"
                )
            time.sleep(max(self.pause, 0.2))

    def _least(self, asked: int) -> int:
        """Connected clients without which a round cannot succeed."""
        secure = self.config.secure_sum
        least = self.config.min_clients if secure is None else max(2, math.ceil(secure.threshold * asked - 1e-9))
        return max(least, self.config.min_clients)

    def _greet(self, online: set[int]) -> None:
        """Ask nodes that are new which client they are, and hear what others have answered."""
        if self._fixed:
            return
        now = time.monotonic()
        self._asked = {
            message: (node, until) for message, (node, until) in self._asked.items() if now < until and node in online
        }
        if self._asked:
            for reply in self._pull(self._asked):
                node, _ = self._asked.pop(reply.metadata.reply_to_message_id)
                if reply.has_error():
                    continue
                try:
                    answer, _ = from_record(Answer, reply.content)
                except PayloadError:
                    continue
                # Who came first keeps a number as long as it is there.
                taken = {number for other, number in self._numbers.items() if other in online}
                if answer.client not in taken:
                    self._numbers[node] = answer.client
        busy = {node for node, _ in self._asked.values()}
        fresh = sorted(online - set(self._numbers) - busy)
        if fresh:
            content = to_record(Answer(version=VERSION, client=0))
            hellos = [Message(content, node, HELLO, ttl=HELLO_SECONDS + GRACE) for node in fresh]
            for message, node in zip(_over(self.grid.push_messages, hellos), fresh, strict=True):
                if message:
                    self._asked[message] = (node, now + HELLO_SECONDS)


def _over(call: Callable[..., Iterable[Any]], *arguments: Any) -> list[Any]:
    """A call to the Grid.

    Raises:
        RunError: the SuperLink does not answer.
    """
    try:
        return list(call(*arguments))
    except httpx.HTTPError as error:
        raise RunError(f"the SuperLink does not answer ({error}); the run can go on with --resume") from None


def _told(text: str) -> str:
    """A stranger's words, fit for a log and a terminal."""
    return "".join(character if character.isprintable() else " " for character in text[:MAX_TEXT])
