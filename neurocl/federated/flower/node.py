"""A client on its own machine: a SuperNode beside this process, which does the SuperNode's work itself."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import httpx
from filelock import FileLock, Timeout
from flwr.app.message import Message
from flwr.common.constant import SubStatus
from flwr.supercore.constant import TaskType
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from neurocl.errors import UserError
from neurocl.federated.exchange import Fault
from neurocl.federated.flower.client import FlowerClient, Own, Say
from neurocl.federated.flower.processes import (
    Address,
    acquire,
    end,
    free_port,
    heartbeat,
    private_folder,
    runtime_client,
    start,
    wait_until_open,
    write_secret,
)
from neurocl.stopping import StopRequest

PAUSE = 0.2
# A SuperNode that ends is started again, later every time.
FIRST_WAIT, LONGEST_WAIT, LIVED_LONG = 1.0, 30.0, 60.0


class _Node:
    """A SuperNode that leaves its work to this process."""

    def __init__(self, server: Address, home: Path, root: Path | None, key: Path | None, plain: bool) -> None:
        self.address = Address("127.0.0.1", free_port())
        secret = write_secret(home / "secret")
        arguments = ["--isolation", "process", "--superexec-auth-secret-file", str(home / "secret")]
        arguments += ["--superlink", str(server), "--host", self.address.host, "--port", str(self.address.port)]
        if plain:
            arguments += ["--insecure"]
        if root is not None:
            arguments += ["--root-certificates", str(root)]
        if key is not None:
            arguments += ["--auth-supernode-private-key", str(key)]
        self.process: subprocess.Popen[bytes] = start("supernode", arguments, home)
        self.started = time.monotonic()
        try:
            wait_until_open(self.address, self.process, home / "supernode.log")
        except BaseException:
            end(self.process)
            raise
        self._client = runtime_client(self.address, None, secret=secret)

    def work(self, answer: Callable[[Message], Message]) -> bool:
        """Answer a message, if there is one."""
        token = acquire(self._client, TaskType.CLIENT_APP)
        if not token:
            return False
        with contextlib.closing(runtime_client(self.address, None, token=token)) as client, heartbeat(client):
            message, context, _, _ = pull_task_input(client)
            push_message(client, answer(message), context)
            push_task_output(client, None, SubStatus.COMPLETED, "")
        return True

    def close(self) -> None:
        self._client.close()
        end(self.process)


def _last_words(log: Path) -> str:
    """Why a SuperNode has ended, as far as it says so."""
    codes = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("[code:")]
    return f"the server refuses this client: {codes[-1]}" if codes else f"the SuperNode has ended (see {log})"


def join(
    own: Own,
    server: Address,
    folder: Path,
    *,
    root_certificates: Path | None = None,
    key: Path | None = None,
    insecure: bool = False,
    faults: Iterable[Fault] = (),
    say: Say | None = None,
) -> None:
    """Take part as a client until stopped by SIGINT or SIGTERM; a server that goes away is waited for.

    Args:
        own: number, data and device of the client.
        server: where its SuperLink listens.
        folder: for what the client stores; belongs to it alone.
        root_certificates: PEM file of who signed the server's certificate; None for those of the system.
        key: the client's private key.
        insecure: connect in plain text; on the loopback interface that is so without a word.
        faults: planned mishaps, for tests.
        say: called with every line to tell.

    Raises:
        UserError: files that are not there, or a folder in use.
        RunError: the SuperNode does not start.
    """
    for path in (root_certificates, key):
        if path is not None and not path.is_file():
            raise UserError(f"{path}: no such file")
    plain = root_certificates is None and (insecure or server.loopback)
    if plain and key is not None:
        raise UserError("a key needs TLS: give --root-certificates too")
    say = say or (lambda line: None)
    home = private_folder(private_folder(folder) / "flower")
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder} is in use by another process") from None
    client = FlowerClient(own, folder, faults=faults, say=say)
    node: _Node | None = None
    wait = FIRST_WAIT
    try:
        with StopRequest().listen() as stop:
            while not stop.requested:
                if node is None:
                    node = _Node(server, home, root_certificates, key, plain)
                    say(f"client {own.client} looks for {server}")
                idle = ended = False
                try:
                    idle = not node.work(client)
                except httpx.TransportError:
                    ended = True
                except (httpx.HTTPError, RuntimeError) as error:
                    # The run is over, or the server has forgotten the message.
                    say(f"a message was lost ({error})")
                if ended or node.process.poll() is not None:
                    wait = FIRST_WAIT if time.monotonic() - node.started > LIVED_LONG else min(2 * wait, LONGEST_WAIT)
                    node.close()
                    node = None
                    say(f"{_last_words(home / 'supernode.log')}; again in {wait:g} s")
                    until = time.monotonic() + wait
                    while not stop.requested and time.monotonic() < until:
                        time.sleep(PAUSE)
                elif idle:
                    time.sleep(PAUSE)
    finally:
        client.close()
        if node is not None:
            node.close()
        lock.release()
