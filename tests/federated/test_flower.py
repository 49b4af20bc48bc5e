"""Flower changes nothing: messages come through as they were, clients answer for themselves, models are the same."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from neurocl.cli.main import app
from neurocl.errors import RunError, UserError
from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.config import FederatedConfig, SecureSumConfig
from neurocl.federated.driver import FederatedRun, resume_federated, run_federated
from neurocl.federated.exchange import Exchange, Failure, Fault, SequentialExchange, Stores
from neurocl.federated.method import Place
from neurocl.federated.payload import Payload, PayloadError, decode, encode
from tests.federated.small_problem import config, in_memory

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message

from neurocl.federated.flower.client import FlowerClient, Own, agreed
from neurocl.federated.flower.exchange import FlowerExchange
from neurocl.federated.flower.keys import make_keys
from neurocl.federated.flower.processes import Address, free_port
from neurocl.federated.flower.records import (
    HELLO,
    MAX_HEADER_BYTES,
    PHASE,
    VERSION,
    Answer,
    Header,
    from_record,
    to_record,
)
from neurocl.federated.flower.server import Security, serving

RUN = "0123456789abcdef"
SCAFFOLD: dict[str, Any] = {"method": "scaffold", "optimizer": "sgd", "classes_per_task": (2,)}
DEADLINE = 150.0


def header(own: FederatedConfig, **changes: Any) -> Header:
    """Of the first round."""
    values: dict[str, Any] = {
        "version": VERSION,
        "run": RUN,
        "client": 1,
        "counted": 0,
        "task": 0,
        "phase": "round",
        "rounds": own.rounds,
        "train": True,
        "round": 0,
        "attempt": 0,
        "timeout": 60.0,
        "config": own.model_dump_json(),
    }
    return Header(**(values | changes))


def message(content: RecordDict | None, kind: str = PHASE, *, node: int = 7, number: str = "m") -> Message:
    """What arrives at a node."""
    told = Metadata(
        run_id=1,
        message_id=number,
        src_node_id=1,
        dst_node_id=node,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=100.0,
        message_type=kind,
    )
    return make_message(told, content=content)


def first_message(own: FederatedConfig) -> Payload:
    method = method_for(problem_for(own))
    task = method.problem.tasks[0]
    return method.message(method.initial_state(), Place(task, method.phases(task)[0], 0))


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"])
def test_arrays_of_every_type_and_shape_come_through_flower_as_they_were(kind: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "matrix": rng.integers(0, 2, (3, 5)).astype(kind),
        "scalar": np.array(1).astype(kind),
        "empty": np.zeros((0, 4), dtype=kind),
        "strided": rng.integers(0, 2, (6, 4)).astype(kind)[::2, ::-1],
    }
    meta: dict[str, Any] = {"n": 3, "x": 0.1, "yes": True, "text": "ähm\n", "list": [1, 2], "nothing": []}
    asked = header(config(), client=2)
    found, data = from_record(Header, inflated(to_record(asked, encode(Payload(arrays, meta)))))
    payload = decode(data)
    assert found == asked
    assert payload.meta == dict(sorted(meta.items()))
    assert set(payload.arrays) == set(arrays)
    for name, array in arrays.items():
        assert payload.arrays[name].dtype == array.dtype
        assert payload.arrays[name].shape == array.shape
        assert np.array_equal(payload.arrays[name], array)


def inflated(content: RecordDict) -> RecordDict:
    """The records after they were cut into Flower's objects and put together again."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    objects = {name: item.deflate() for name, item in get_all_nested_objects(content).items()}
    whole = inflate_object_from_contents(content.object_id, objects)
    assert isinstance(whole, RecordDict)
    return whole


def test_records_that_neurocl_does_not_write_are_refused() -> None:
    good = to_record(Answer(version=VERSION, client=0), b"data")
    assert from_record(Answer, good)[1] == b"data"
    text = good.config_records["neurocl"]["header"]
    array = good.array_records["neurocl.payload"]
    foreign = ArrayRecord({"payload": Array(np.zeros(2))})
    two = ArrayRecord({"payload": array["payload"], "more": array["payload"]})
    for records, words in (
        ({}, "without a header"),
        ({"neurocl": ConfigRecord({"header": 3}), "neurocl.payload": array}, "without a header"),
        ({"neurocl": ConfigRecord({"header": "x" * (MAX_HEADER_BYTES + 1)}), "neurocl.payload": array}, "too long"),
        ({"neurocl": ConfigRecord({"header": "{}"}), "neurocl.payload": array}, "version"),
        ({"neurocl": ConfigRecord({"header": '{"version":1,"client":-1}'}), "neurocl.payload": array}, "client"),
        ({"neurocl": ConfigRecord({"header": '{"version":9,"client":1}'}), "neurocl.payload": array}, "version 9"),
        ({"neurocl": ConfigRecord({"header": text})}, "exactly one payload"),
        ({"neurocl": ConfigRecord({"header": text}), "neurocl.payload": foreign}, "exactly one payload"),
        ({"neurocl": ConfigRecord({"header": text}), "neurocl.payload": two}, "exactly one payload"),
    ):
        with pytest.raises(PayloadError, match=words):
            from_record(Answer, RecordDict(records))
    with pytest.raises(PayloadError, match="at most 3"):
        from_record(Answer, good, limit=3)


def test_a_client_answers_as_in_the_local_runtime_and_a_question_twice_with_the_same_bytes(tmp_path: Path) -> None:
    own = config(**SCAFFOLD)
    problem = problem_for(own)
    payload = first_message(own)
    local = SequentialExchange(problem, method_for(problem), Stores(None))
    place = Place(problem.tasks[0], method_for(problem).phases(problem.tasks[0])[0], 0)
    expected = local(place, {1: payload}, 0).replies[0].payload
    client = FlowerClient(Own(client=1), tmp_path, apart=False)
    reply = client(message(to_record(header(own), encode(payload))))
    answer, data = from_record(Answer, reply.content)
    assert (answer.client, answer.kind) == (1, "")
    assert data == encode(expected)
    stored = sorted(path.name for path in (tmp_path / f"{RUN}-1").iterdir())
    # A client that was started again finds its answer; that it stored one more time would show in the file's date.
    dates = {path: path.stat().st_mtime_ns for path in (tmp_path / f"{RUN}-1").iterdir()}
    again = FlowerClient(Own(client=1), tmp_path, apart=False)(message(to_record(header(own), encode(payload))))
    assert from_record(Answer, again.content)[1] == data
    assert dates == {path: path.stat().st_mtime_ns for path in (tmp_path / f"{RUN}-1").iterdir()}
    assert [name.partition("-")[0] for name in stored] == ["answer", "client"]


def test_a_client_tells_when_it_is_connected_and_what_it_answered(tmp_path: Path) -> None:
    own, lines = config(**SCAFFOLD), []
    client = FlowerClient(Own(client=1), tmp_path, apart=False, say=lines.append)
    client(message(to_record(Answer(version=VERSION, client=0)), HELLO))
    client(message(to_record(header(own), encode(first_message(own)))))
    client(message(to_record(header(own, client=2), encode(Payload()))))
    client(message(to_record(header(own, phase="\x1b[2Jround"), encode(Payload()))))
    assert lines[0] == "client 1 is connected, and waits for the server to begin"
    assert re.fullmatch(r"task 1, round 1 of 2: answered in \d+\.\d s", lines[1])
    assert lines[2] == "task 1, round 1 of 2: raised: this is client 1, not 2"
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)


def test_what_a_client_stores_counts_when_the_server_says_so(tmp_path: Path) -> None:
    own = config(**SCAFFOLD)
    payload = first_message(own)
    client = FlowerClient(Own(client=1), tmp_path, apart=False)

    def control(counted: int, attempt: int) -> Any:
        reply = client(message(to_record(header(own, counted=counted, attempt=attempt, round=1), encode(payload))))
        return decode(from_record(Answer, reply.content)[1]).arrays["control.head.weight"]

    first = control(0, 0)
    # The reply was lost: the store is what it was before, and the answer too.
    assert np.array_equal(control(0, 1), first)
    # It was used: the control variate of the client is no longer zero, so its change is another one.
    assert not np.array_equal(control(1, 2), first)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"client": 2}, "this is client 1, not 2"),
        ({"run": "../../elsewhere"}, "hexadecimal"),
        ({"task": 7}, "no task 7"),
        ({"phase": "other"}, "no round 0 of such a phase"),
        ({"round": 99}, "no round 99"),
        ({"config": "{"}, "refused"),
        ({"config": '{"unknown": 1}'}, "refused: unknown"),
        (
            {"config": config(dataset="eurosat").model_dump_json()},
            "asks for eurosat, this client takes part with digits",
        ),
        ({"config": config(partition={"num_clients": 1}).model_dump_json()}, "has 1 clients"),
    ],
)
def test_a_client_refuses_what_it_does_not_agree_with(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    own = config()
    client = FlowerClient(Own(client=1), tmp_path / "store", apart=False)
    reply = client(message(to_record(header(own, **changes), encode(Payload()))))
    answer, data = from_record(Answer, reply.content)
    assert answer.kind == "raised"
    assert words in answer.text
    assert data == b""
    assert not list((tmp_path / "store").glob("*/*"))


def test_a_server_has_no_word_in_where_a_client_computes_and_reads(tmp_path: Path) -> None:
    text = config(device="cuda:7", threads=64, workers=9, data_dir="/etc").model_dump_json()
    found = agreed(text, Own(client=0, data_dir=tmp_path, threads=2))
    assert (found.device, found.threads, found.workers, found.data_dir) == ("cpu", 2, 1, tmp_path)
    assert agreed(config(backbone="vit").model_dump_json(), Own(client=0)).backbone == "vit"
    elsewhere = config(backbone="/srv/vit").model_dump_json()
    assert agreed(elsewhere, Own(client=0, backbone=tmp_path)).backbone == str(tmp_path)
    careful = Own(client=0, secure_sum=True)
    assert agreed(config(secure_sum={}).model_dump_json(), careful).secure_sum is not None
    with pytest.raises(UserError, match="takes part in sums only"):
        agreed(config().model_dump_json(), careful)
    # A server cannot name a file to read, nor, by the same key, code to import.
    for own in (elsewhere, config(backbone="..").model_dump_json(), config(dataset="os:getcwd").model_dump_json()):
        with pytest.raises(UserError, match="refused"):
            agreed(own, Own(client=0))


class Wire:
    """A Grid whose nodes are FlowerClients in this process; ``spoil`` may replace or withhold replies."""

    def __init__(self, clients: dict[int, FlowerClient]) -> None:
        self.clients = clients
        self.replies: dict[str, Message] = {}
        self.spoil: Callable[[int, Message], list[Message]] = lambda node, reply: [reply]
        self.sent: list[tuple[int, str]] = []

    def get_node_ids(self) -> list[int]:
        return list(self.clients)

    def push_messages(self, messages: list[Message]) -> list[str]:
        ids = []
        for item in messages:
            node, number = item.metadata.dst_node_id, f"m{len(self.sent)}"
            self.sent.append((node, item.metadata.message_type))
            reply = self.clients[node](message(item.content, item.metadata.message_type, node=node, number=number))
            for kept in self.spoil(node, reply) if item.metadata.message_type == PHASE else [reply]:
                self.replies[number] = kept
            ids.append(number)
        return ids

    def pull_messages(self, ids: list[str]) -> list[Message]:
        return [self.replies.pop(number) for number in ids if number in self.replies]


@pytest.fixture
def wired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[FlowerExchange, Wire]:
    """Three clients of scaffold behind nodes 30, 20 and 10, with one folder."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr("neurocl.federated.flower.exchange.GRACE", 0.1)
    problem = problem_for(config(**SCAFFOLD, timeout=0.1))
    nodes = {30: 0, 20: 1, 10: 2}
    wire = Wire({node: FlowerClient(Own(client=number), tmp_path, apart=False) for node, number in nodes.items()})
    return FlowerExchange(wire, problem, Stores(None), run=RUN, patience=1.0, pause=0.01), wire


def round_of(exchange: Exchange, attempt: int = 0, clients: Sequence[int] = (0, 1, 2)) -> Any:
    method = method_for(problem_for(config(**SCAFFOLD)))
    task = method.problem.tasks[0]
    place = Place(task, method.phases(task)[0], 0)
    return exchange(place, dict.fromkeys(clients, method.message(method.initial_state(), place)), attempt)


def test_rounds_over_a_grid_are_those_of_the_local_runtime(wired: tuple[FlowerExchange, Wire]) -> None:
    exchange, wire = wired
    problem = problem_for(exchange.config)
    local = SequentialExchange(problem, method_for(problem), Stores(None))
    for attempt in range(2):
        expected, found = round_of(local, attempt=attempt), round_of(exchange, attempt=attempt)
        assert [reply.client for reply in found.replies] == [0, 1, 2]
        for one, other in zip(found.replies, expected.replies, strict=True):
            assert encode(one.payload) == encode(other.payload)
        local.stores.commit()
        exchange.stores.commit()
    # Nodes are asked once who they are.
    assert [kind for _, kind in wire.sent].count(HELLO) == 3


def test_secure_sums_over_a_grid_are_those_of_the_local_runtime(
    wired: tuple[FlowerExchange, Wire], tmp_path: Path
) -> None:
    pytest.importorskip("Crypto")
    lost = Fault("raise", client=2, task=1, round=0, phase="statistics.0.masked")
    own = config(method="fedncm", secure_sum={}, max_repeats=0)
    local, _ = in_memory(own, lost)
    wire = wired[1]
    wire.clients = {
        node: FlowerClient(Own(client=number, secure_sum=True), tmp_path / "own", apart=False, faults=(lost,))
        for node, number in ((30, 0), (20, 1), (10, 2))
    }
    stores = Stores(None)
    exchange = FlowerExchange(wire, local.problem, stores, run=RUN, patience=1.0, pause=0.01)
    over = FederatedRun(local.problem, local.method, exchange, stores)
    expected, found = local.run(), over.run()
    assert encode(over.state) == encode(local.state)
    assert found["accuracy"] == expected["accuracy"]
    assert found["failures"] == expected["failures"] == {"raised": 1}


def test_everything_that_can_go_wrong_on_the_way_is_a_failure_of_its_client(wired: tuple[FlowerExchange, Wire]) -> None:
    exchange, wire = wired

    def broken(code: int) -> Callable[[Message], list[Message]]:
        return lambda reply: [make_message(reply.metadata, error=Error(code, "what\x1b[31m happened"))]

    def instead(answer: Answer, data: bytes) -> Callable[[Message], list[Message]]:
        return lambda reply: [make_message(reply.metadata, content=to_record(answer, data))]

    nan = encode(Payload({"head.weight": np.array([np.nan])}, {"n": 1}))
    for attempt, (change, kind, words) in enumerate(
        (
            (broken(2), "raised", "what [31m happened"),
            (broken(5), "died", "happened"),
            (lambda reply: [], "hung", "no reply within"),
            (lambda reply: [make_message(reply.metadata, content=RecordDict())], "malformed", "without a header"),
            (instead(Answer(version=VERSION, client=1), b"not a payload"), "malformed", "message"),
            (instead(Answer(version=VERSION, client=1), nan), "not-finite", "NaN"),
            (instead(Answer(version=VERSION, client=1, kind="died", text="gone"), b""), "died", "gone"),
            (instead(Answer(version=VERSION, client=1, kind="exploded", text="?"), b""), "raised", "?"),
            (lambda reply: [reply, reply], "", ""),
            # From now on nobody knows who that node is, until it is asked again.
            (instead(Answer(version=VERSION, client=2), nan), "malformed", "answered by client 2"),
        )
    ):
        wire.spoil = lambda node, reply, change=change: change(reply) if node == 20 else [reply]
        outcome = round_of(exchange, attempt=attempt)
        assert [(item.client, item.kind) for item in outcome.failures] == ([(1, kind)] if kind else []), kind
        assert all(words in item.text for item in outcome.failures)
        assert {reply.client for reply in outcome.replies} >= {0, 2}
        exchange.stores.discard(range(3))


def test_who_is_not_connected_is_dropped_and_too_few_end_the_run(wired: tuple[FlowerExchange, Wire]) -> None:
    exchange, wire = wired
    gone = wire.clients.pop(20)
    outcome = round_of(exchange)
    assert outcome.failures == [Failure(1, "dropped", "not connected")]
    # Those who have answered are still here, so nobody waits for them when the lost one is asked again.
    plain = exchange.config
    for changes in ({"min_clients": 2}, {"secure_sum": SecureSumConfig()}):
        exchange.config = plain.model_copy(update=changes)
        assert round_of(exchange, attempt=1, clients=[1]).failures == outcome.failures
    exchange.config = plain.model_copy(update={"secure_sum": SecureSumConfig(threshold=1)})
    with pytest.raises(RunError, match="2 of 3 clients are connected after 1 s, at least 3 are needed"):
        round_of(exchange, attempt=1)
    exchange.config = plain
    # A restarted client has another node; a second one with its number is not heard.
    wire.clients[21] = gone
    wire.clients[22] = FlowerClient(Own(client=1), gone.folder, apart=False)
    assert round_of(exchange, attempt=1).failures == []
    wire.clients.clear()
    with pytest.raises(RunError, match="0 of 3 clients are connected after 1 s, at least 1 are needed"):
        round_of(exchange, attempt=2)


def test_addresses_and_security_are_checked_before_anything_starts(tmp_path: Path) -> None:
    assert str(Address.parse("[::1]:80")) == "[::1]:80"
    assert Address.parse("localhost:80").loopback
    assert str(Address.parse("0.0.0.0:80").here) == "127.0.0.1:80"
    for text in ("host", "host:", ":80", "host:0", "host:99999", "host:-1"):
        with pytest.raises(UserError, match="HOST:PORT"):
            Address.parse(text)
    files = {path.name: path for path in make_keys(tmp_path / "keys", 2, ["example.org", "10.0.0.7"])}
    outside, inside = Address.parse("0.0.0.0:80"), Address.parse("127.0.0.1:80")
    for security, address, words in (
        (Security(), outside, "can be reached from other machines"),
        (Security(ca=files["ca.crt"]), inside, "not given: --cert, --key"),
        (Security(clients=tmp_path), inside, "--auth needs TLS"),
        (Security(tmp_path / "no", files["server.crt"], files["server.key"]), inside, "no such file"),
    ):
        with pytest.raises(UserError, match=words):
            serving(address, security)
    serving(outside, Security(), insecure=True)
    serving(outside, Security(files["ca.crt"], files["server.crt"], files["server.key"]))
    with pytest.raises(UserError, match="no public keys"):
        Security(clients=tmp_path).keys()


def test_a_superlink_is_controlled_by_its_server_alone_and_takes_no_giant_requests() -> None:
    from neurocl.federated.flower.child import HEADER, LARGEST_REQUEST, Guard

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def status(path: str, **headers: str) -> int:
        sent: list[Any] = []

        async def send(event: Any) -> None:
            sent.append(event)

        given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": path, "headers": given}
        asyncio.run(Guard(inside, "secret")(scope, None, send))  # type: ignore[arg-type]
        return int(sent[0]["status"])

    secret = {HEADER.replace("-", "_"): "secret"}
    assert status("/v1/fleet/pull-messages", content_length="9") == 200
    assert status("/v1/control/register-node", content_length="9") == 403
    assert status("/v1/control/start-run", content_length="9", **{HEADER.replace("-", "_"): "other"}) == 403
    assert status("/v1/control/start-run", content_length="9", **secret) == 200
    assert status("/docs", content_length="9") == 403
    assert status("/v1/fleet/push-object", content_length=str(LARGEST_REQUEST + 1)) == 413
    assert status("/v1/fleet/push-object") == 413


def test_without_flower_or_with_another_one_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise PackageNotFoundError(name)

    for version, words in ((none, "need flwr 1.41: pip install"), (lambda name: "1.42.0", "not 1.42.0: pip install")):
        monkeypatch.delitem(sys.modules, "neurocl.federated.flower", raising=False)
        monkeypatch.setattr("importlib.metadata.version", version)
        with pytest.raises(UserError, match=words):
            importlib.import_module("neurocl.federated.flower")


def test_keys_are_private_fresh_and_never_overwritten(tmp_path: Path) -> None:
    files = {path.name: path for path in make_keys(tmp_path / "keys", 2, ["10.0.0.7"])}
    assert set(Security(clients=tmp_path / "keys" / "clients").keys()) == {0, 1}
    for name, path in files.items():
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if name.endswith(".key") else 0o644) & ~umask()
    with pytest.raises(UserError, match="never overwritten"):
        make_keys(tmp_path / "keys", 2)
    (tmp_path / "keys" / "clients" / "client-1.pub").write_bytes(files["client-0.pub"].read_bytes())
    with pytest.raises(UserError, match="the same key"):
        Security(clients=tmp_path / "keys" / "clients").keys()


def umask() -> int:
    old = os.umask(0)
    os.umask(old)
    return old


# A client with planned mishaps; without them it is `neurocl federated client`.
FAULTY_CLIENT = """
import sys
from pathlib import Path
from neurocl.federated.exchange import Fault
from neurocl.federated.flower.client import Own
from neurocl.federated.flower.node import join
from neurocl.federated.flower.processes import Address
number, server, store, root, key = sys.argv[1:]
faults = [Fault("die", 1, 0, 0), Fault("raise", 1, 0, 1)]
join(
    Own(client=int(number)), Address.parse(server), Path(store), root_certificates=Path(root), key=Path(key),
    faults=faults, say=print
)
"""
SERVER = """
import sys
from pathlib import Path
from neurocl.federated.config import FederatedConfig
from neurocl.federated.driver import run_federated
from neurocl.federated.flower.processes import Address
from neurocl.federated.flower.server import Security, serving
config, address, out, *files = sys.argv[1:]
connect = serving(Address.parse(address), Security(*map(Path, files)), patience=100)
run_federated(FederatedConfig.model_validate_json(config), out=Path(out), connect=connect)
"""


class Processes:
    """Processes with their logs, each the head of a group of its own; all are gone when the block ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: object, **environment: str) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{name}.log", "wb") as log:
            self.started[name] = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.started[name]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started.values():
            process.terminate()
        for process in self.started.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_machines_give_the_model_of_the_local_runtime_through_faults_a_killed_server_and_strangers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {path.name: path for path in make_keys(tmp_path / "keys", 2)}
    strange = {path.name: path for path in make_keys(tmp_path / "other", 1)}
    own = config(**SCAFFOLD, rounds=3, timeout=100.0, partition={"num_clients": 2, "beta": 1.0})
    # Client 1's code dies in the first round and raises in the second.
    faults = [Fault("die", 1, 0, 0), Fault("raise", 1, 0, 1)]
    local, _ = run_federated(own, out=tmp_path / "local", faults=faults)
    address, run, root = f"127.0.0.1:{free_port()}", tmp_path / "run", keys["ca.crt"]
    security = [root, keys["server.crt"], keys["server.key"], tmp_path / "keys" / "clients"]
    with Processes(tmp_path) as processes:
        server = processes.start("server", "-c", SERVER, own.model_dump_json(), address, run, *security)
        common = ["--server", address, "--root-certificates", root, "--store", tmp_path / "client-0"]
        healthy = ["--client", 0, "--auth-key", keys["client-0.key"]]
        processes.start("client-0", "-m", "neurocl", "federated", "client", *common, *healthy)
        faulty = [1, address, tmp_path / "client-1", root, keys["client-1.key"]]
        processes.start("client-1", "-c", FAULTY_CLIENT, *faulty)
        wait_for(lambda: len(records(run)) >= 2 or server.poll() is not None)
        # SuperNodes with a key that the server does not know, and without any.
        node = ["-m", "neurocl.federated.flower.child", "supernode", "--isolation", "process", "--superlink", address]
        node += ["--root-certificates", root, "--max-retries", 3]
        for name, key in (("wrong", ["--auth-supernode-private-key", strange["client-0.key"]]), ("none", [])):
            home = {"FLWR_HOME": str(tmp_path / name), "NEUROCL_FLOWER_PARENT": str(os.getpid())}
            processes.start(name, *node, "--port", free_port(), *key, **home)
        wait_for(lambda: all(processes.started[name].poll() is not None for name in ("wrong", "none")))
        # Killed after two rounds: its SuperLink ends with it, and the clients wait for the next one.
        server.kill()
        server.wait()
        wait_for(lambda: not flower_processes(run))
        options = ["--ca", root, "--cert", security[1], "--key", security[2], "--auth", security[3], "--json"]
        command = ["federated", "server", "--resume", run, "--address", address, *options]
        assert not app(list(map(str, command)), standalone_mode=False)
        assert not flower_processes(run)
    assert not flower_processes(tmp_path)
    for name in ("wrong", "none"):
        assert processes.started[name].returncode != 0
        assert "[code: 200" in processes.log(name)
        assert "Receiving" not in processes.log(name)
    lost = [[item[:2] for item in record["failures"]] for record in records(run)]
    assert lost == [[[1, "died"]], [[1, "raised"]], []]
    assert [record["clients"] for record in records(run)] == [[0], [0], [0, 1]]
    expected = state_of(tmp_path / "local")
    for name, array in state_of(run).items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-6)
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"] == local["metrics"]
    assert found["bytes"] == local["bytes"]
    with pytest.raises(UserError, match="was begun on Flower"):
        resume_federated(run)


def flower_processes(folder: Path) -> list[str]:
    """Command lines of SuperLinks and SuperNodes that work in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if "neurocl.federated.flower.child" in words and any(str(folder) in word for word in words):
                found.append(" ".join(words))
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def state_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = load_file(next((run / "checkpoint").glob("tensors-*.safetensors")))
    return found


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [record for record in map(json.loads, lines) if record["event"] == "round"]
