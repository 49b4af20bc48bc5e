"""What a server and a client share: Flower's processes beside this one, addresses, secrets, certificates."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient

from neurocl.errors import RunError, UserError
from neurocl.federated.flower import QUIET
from neurocl.federated.flower.child import PARENT
from neurocl.runs import make_folder

START_SECONDS, END_SECONDS = 120.0, 5.0
# Its log would stand between our own lines; what matters is told by us.
logging.getLogger("flwr").setLevel(logging.ERROR)
logging.getLogger("httpx").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Address:
    """Host and port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """``HOST:PORT``, ``[V6]:PORT``.

        Raises:
            UserError: anything else.
        """
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise UserError(f"an address is HOST:PORT such as 127.0.0.1:8443, got {text!r}")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether nobody outside this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def here(self) -> Address:
        """Where this machine itself reaches a server that listens on it."""
        return Address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host), self.port)


def free_port() -> int:
    """A port of the loopback interface that nobody uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def private_folder(path: Path) -> Path:
    """A folder that nobody else can read; made if need be."""
    make_folder(path)
    path.chmod(0o700)
    return path


def write_secret(path: Path) -> bytes:
    """A fresh secret in a file that nobody else can read, from its first moment on."""
    secret = secrets.token_hex(32).encode()
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(secret)
    return secret


def start(name: str, arguments: list[str], home: Path, **extra: str) -> subprocess.Popen[bytes]:
    """Start a SuperLink or SuperNode in a group of its own; what it says goes to a file in ``home``."""
    environment = {**os.environ, **QUIET, "FLWR_HOME": str(home.resolve()), PARENT: str(os.getpid()), **extra}
    with open(home / f"{name}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "neurocl.federated.flower.child", name, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process of :func:`start` and everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until_open(address: Address, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a process listens.

    Raises:
        RunError: it ended, or does not listen in time.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((address.host, address.port), timeout=1.0):
            # Somebody else's server may be the one that listens; then ours ends at once.
            time.sleep(0.2)
            if process.poll() is None:
                return
        time.sleep(0.05)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise RunError(f"cannot listen on {address}: {lines[-1] if lines else 'no word why'} (see {log})")


def runtime_client(
    address: Address, certificates: bytes | None, *, token: str = "", secret: bytes = b""
) -> RuntimeHttpClient:
    """A client of Flower's Runtime API: with the secret it asks for work, with a token it does it."""
    own = (
        RuntimeTokenHttpInterceptor(token)
        if token
        else SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"})
    )
    return RuntimeHttpClient.from_server_address(
        server_address=str(address),
        insecure=certificates is None,
        root_certificates=certificates,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="neurocl"), own],
    )


def acquire(client: RuntimeHttpClient, kind: TaskType) -> str:
    """The token of a task that waits to be done, or nothing."""
    found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
    return str(found.token) if found.HasField("task") else ""


@contextlib.contextmanager
def heartbeat(client: RuntimeHttpClient) -> Iterator[None]:
    """Tell Flower every few seconds that the task is being worked on."""

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True

    sender = HeartbeatSender(beat)
    sender.start()
    try:
        yield
    finally:
        sender.stop()


def read_certificates(path: Path) -> bytes:
    """PEM certificates.

    Raises:
        UserError: no such file, or none in it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if b"-----BEGIN CERTIFICATE-----" not in data:
        raise UserError(f"{path}: no certificate in PEM form")
    return data
