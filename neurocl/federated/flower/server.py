"""A server on several machines: a SuperLink beside this process, which is itself the ServerApp that drives the run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SubStatus
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from neurocl.errors import RunError, UserError
from neurocl.federated.driver import REMOTE, Connect
from neurocl.federated.exchange import Exchange, Outcome, Stores
from neurocl.federated.flower.child import HEADER, SECRET
from neurocl.federated.flower.exchange import FlowerExchange
from neurocl.federated.flower.processes import (
    START_SECONDS,
    Address,
    acquire,
    end,
    heartbeat,
    private_folder,
    read_certificates,
    runtime_client,
    start,
    wait_until_open,
    write_secret,
)
from neurocl.federated.method import FederatedMethod, Place
from neurocl.federated.payload import Payload
from neurocl.federated.problem import Problem
from neurocl.runs import RunFolder, write_atomically

# Flower wants an application to go with a run. Ours is empty: clients run what they have installed themselves.
APPLICATION: dict[str, bytes | Path] = {
    "pyproject.toml": b"""
[project]
name = "neurocl-federated"
version = "1.0.0"
description = "A federated run of neurocl"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "neurocl"

[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"
""",
    "app.py": b"raise SystemExit('clients of neurocl run their own code: neurocl federated client')\n",
}


@dataclass(frozen=True)
class Security:
    """Certificates and keys of a server.

    Attributes:
        ca, certificate, key: PEM files for TLS; all or none.
        clients: a folder with the public key of every client that may take part, ``client-NUMBER.pub``.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    clients: Path | None = None

    def check(self, address: Address, insecure: bool) -> None:
        """Refuse half a configuration, and plain text over a network.

        Raises:
            UserError: which option is missing.
        """
        files = {"--ca": self.ca, "--cert": self.certificate, "--key": self.key}
        missing = [name for name, path in files.items() if path is None]
        if 0 < len(missing) < len(files):
            raise UserError(f"TLS needs --ca, --cert and --key; not given: {', '.join(missing)}")
        for path in files.values():
            if path is not None and not path.is_file():
                raise UserError(f"{path}: no such file")
        if missing and self.clients is not None:
            raise UserError("--auth needs TLS: give --ca, --cert and --key too")
        if missing and not insecure and not address.loopback:
            raise UserError(
                f"{address} can be reached from other machines: give --ca, --cert and --key, or --insecure if the "
                "network is your own"
            )

    def keys(self) -> dict[int, bytes]:
        """The public key of every client.

        Raises:
            UserError: none, or a file that holds no key.
        """
        assert self.clients is not None
        found: dict[int, bytes] = {}
        for path in sorted(self.clients.glob("client-*.pub")):
            number = path.stem.removeprefix("client-")
            try:
                key = load_ssh_public_key(path.read_bytes())
            except (ValueError, UnsupportedAlgorithm, OSError):
                key = None
            if not number.isdigit() or not isinstance(key, ec.EllipticCurvePublicKey):
                raise UserError(f"{path}: not the public key of a client (elliptic curve, as `federated keys` makes)")
            found[int(number)] = public_key_to_bytes(key)
        if not found:
            raise UserError(f"{self.clients}: no public keys named client-NUMBER.pub")
        if len(set(found.values())) < len(found):
            raise UserError(f"{self.clients}: two clients have the same key")
        return found


class _WithSecret:
    """Opens the guarded paths of the SuperLink."""

    def __init__(self, secret: str) -> None:
        self.secret = secret

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers[HEADER] = self.secret
        response: httpx.Response = call_next(context)
        return response


class FlowerServer:
    """A SuperLink with one run, and the exchange over its Grid.

    Args:
        problem: with the configuration.
        stores: see :class:`FlowerExchange`.
        home: a private folder.
        address: where clients connect.
        security: certificates and keys.
        patience: seconds to wait for clients.

    Raises:
        UserError: files that are not there.
        RunError: the address is taken.
    """

    def __init__(
        self, problem: Problem, stores: Stores, home: Path, address: Address, security: Security, patience: float
    ) -> None:
        self._exits = contextlib.ExitStack()
        with contextlib.ExitStack() as exits:
            grid, numbers = self._begin(exits, private_folder(home), address, security)
            self._exchange = FlowerExchange(
                grid, problem, stores, run=run_number(home), patience=patience, numbers=numbers
            )
            self._exits = exits.pop_all()

    def _begin(
        self, exits: contextlib.ExitStack, home: Path, address: Address, security: Security
    ) -> tuple[HttpGrid, Mapping[int, int] | None]:
        """Start the SuperLink and a run, and take the part of its ServerApp."""
        keys = security.keys() if security.clients else None
        root = read_certificates(security.ca) if security.ca else None
        secret, control_secret = write_secret(home / "secret"), secrets.token_hex(32)
        arguments = ["--isolation", "process", "--superexec-auth-secret-file", str(home / "secret")]
        arguments += ["--host", address.host, "--port", str(address.port), "--disable-runtime-dependency-installation"]
        if root is None:
            arguments += ["--insecure"]
        else:
            files = (security.ca, security.certificate, security.key)
            for option, path in zip(("--ssl-ca-certfile", "--ssl-certfile", "--ssl-keyfile"), files, strict=True):
                arguments += [option, str(path)]
        if keys is not None:
            arguments += ["--enable-supernode-auth"]
        exits.callback((home / "secret").unlink, missing_ok=True)
        link = start("superlink", arguments, home, **{SECRET: control_secret})
        exits.callback(end, link)
        here = address.here
        wait_until_open(here, link, home / "superlink.log")
        try:
            numbers = self._start_run(here, root, control_secret, keys)
            token = self._token(here, root, secret)
            client = exits.enter_context(contextlib.closing(runtime_client(here, root, token=token)))
            found = client.PullTaskInput(PullTaskInputRequest())
        except httpx.HTTPError as error:
            raise RunError(
                f"the SuperLink on {here} does not answer its own server ({error}); "
                f"does its certificate name {here.host} too? See {home / 'superlink.log'}"
            ) from None
        TaskIdentity.task_id, TaskIdentity.run_id = found.task_id, found.run.run_id
        TaskIdentity.node_id = found.context.node_id
        exits.enter_context(heartbeat(client))
        grid = HttpGrid(str(here), root is None, root, token=token)
        # It would wait for ever for a SuperLink that has ended.
        grid._retry_invoker.max_time = 30.0
        grid.set_run(run_from_proto(found.run))
        exits.callback(grid.close)

        def finish() -> None:
            # The SuperLink may be what has ended.
            with contextlib.suppress(httpx.HTTPError):
                client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details=""))

        exits.callback(finish)
        return grid, numbers

    def _start_run(
        self, here: Address, root: bytes | None, secret: str, keys: Mapping[int, bytes] | None
    ) -> dict[int, int] | None:
        """Register keys and start a run; returns client numbers by node, if keys tell them."""
        control = ControlHttpClient.from_server_address(
            str(here),
            root is None,
            root,
            [RuntimeVersionHttpInterceptor(component_name="neurocl"), _WithSecret(secret)],
        )
        with contextlib.closing(control):
            numbers = None
            if keys is not None:
                numbers = {
                    int(control.RegisterNode(RegisterNodeRequest(public_key=key)).node_id): number
                    for number, key in keys.items()
                }
            content, _ = build_fab_from_files(APPLICATION)
            fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
            control.StartRun(StartRunRequest(fab=fab_to_proto(fab)))
        return numbers

    def _token(self, here: Address, root: bytes | None, secret: bytes) -> str:
        deadline = time.monotonic() + START_SECONDS
        with contextlib.closing(runtime_client(here, root, secret=secret)) as client:
            while time.monotonic() < deadline:
                token = acquire(client, TaskType.SERVER_APP)
                if token:
                    return token
                time.sleep(0.1)
        raise RunError("the SuperLink has not started the run")

    def __call__(self, place: Place, messages: Mapping[int, Payload], attempt: int) -> Outcome:
        """One round."""
        return self._exchange(place, messages, attempt)

    def close(self) -> None:
        """End the run and the SuperLink."""
        self._exits.close()


def serving(
    address: Address,
    security: Security,
    *,
    insecure: bool = False,
    patience: float = 600.0,
    say: Callable[[str], None] | None = None,
) -> Connect:
    """What :func:`~neurocl.federated.driver.run_federated` takes to run on the clients that connect to ``address``.

    Args:
        address: where to listen.
        security: certificates and keys.
        insecure: allow plain text on an address that others can reach.
        patience: seconds to wait for clients.
        say: told where the server listens.

    Raises:
        UserError: options that do not fit together.
    """
    security.check(address, insecure)

    def connect(problem: Problem, method: FederatedMethod, stores: Stores, folder: RunFolder) -> Exchange:
        server = FlowerServer(problem, stores, folder.path / REMOTE, address, security, patience)
        if say is not None:
            say(f"listening on {address}, waiting up to {patience:g} s for {problem.num_clients} clients")
        return server

    return connect


def run_number(folder: Path) -> str:
    """The name of a run to its clients, made once and kept in its folder."""
    path = folder / "run"
    if not path.is_file():
        write_atomically(path, json.dumps(os.urandom(8).hex()))
    return str(json.loads(path.read_text(encoding="utf-8")))
