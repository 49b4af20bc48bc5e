"""Runs in Flower's simulation: all nodes on this machine, their work in Ray's processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from neurocl.errors import RunError, UserError
from neurocl.federated.driver import REMOTE
from neurocl.federated.exchange import Exchange, Outcome, Stores
from neurocl.federated.flower.client import FlowerClient, Own
from neurocl.federated.flower.exchange import FlowerExchange
from neurocl.federated.flower.processes import private_folder
from neurocl.federated.flower.server import run_number
from neurocl.federated.method import FederatedMethod, Place
from neurocl.federated.payload import Payload
from neurocl.federated.problem import Problem
from neurocl.runs import RunFolder

START_SECONDS, END_SECONDS = 120.0, 60.0


@cache
def _client(own: Own, folder: Path) -> FlowerClient:
    """A client, kept in the process of an actor from one message to the next."""
    return FlowerClient(own, folder, apart=False)


def client_app(folder: Path, own: Own) -> ClientApp:
    """A ClientApp whose nodes are the clients of their partition numbers.

    Args:
        folder: for what clients store.
        own: what they decide themselves, all but their number.
    """
    app = ClientApp()

    def reply(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        return _client(own.model_copy(update={"client": number}), folder)(message)

    app.query("hello")(reply)
    app.train("phase")(reply)
    return app


class Simulation:
    """An exchange over the Grid of a simulation, which runs in a thread beside.

    Args:
        problem: with the configuration; one node for every client.
        stores: see :class:`FlowerExchange`.
        home: for what Flower and the clients keep.

    Raises:
        RunError: the simulation does not begin.
    """

    def __init__(self, problem: Problem, stores: Stores, home: Path) -> None:
        from flwr.simulation import run_simulation

        # Ray's processes give way to all others by default: on a busy machine no client would ever answer.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # A run's own folder, not one in the user's home.
        os.environ["FLWR_HOME"] = str(private_folder(home).resolve())
        config = problem.config
        own = Own(
            client=0,
            dataset=config.dataset,
            data_dir=config.data_dir.resolve() if config.data_dir else None,
            device=config.device,
            threads=config.threads,
        )
        grids: Queue[Grid] = Queue()
        self._over = threading.Event()
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            grids.put(grid)
            self._over.wait()

        def run() -> None:
            resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": float(config.device.startswith("cuda"))}
            run_simulation(
                server,
                client_app((home / "clients").resolve(), own),
                problem.num_clients,
                backend_config={"client_resources": resources},
            )

        self._thread = threading.Thread(target=run, name="flower simulation", daemon=True)
        self._thread.start()
        try:
            grid = grids.get(timeout=START_SECONDS)
        except Empty:
            raise RunError(f"Flower's simulation has not begun within {START_SECONDS:g} s") from None
        self._exchange = FlowerExchange(grid, problem, stores, run=run_number(home), pause=0.01)

    def __call__(self, place: Place, messages: Mapping[int, Payload], attempt: int) -> Outcome:
        """One round."""
        return self._exchange(place, messages, attempt)

    def close(self) -> None:
        """End the simulation."""
        self._over.set()
        self._thread.join(END_SECONDS)


def check_ray() -> None:
    """Say what to install before anything begins.

    Raises:
        UserError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise UserError("Flower's simulation needs ray: pip install 'flwr[simulation]>=1.41,<1.42'")


def simulating(problem: Problem, method: FederatedMethod, stores: Stores, folder: RunFolder) -> Exchange:
    """What :func:`~neurocl.federated.driver.run_federated` takes to run in Flower's simulation.

    Raises:
        UserError: Ray is not installed.
        RunError: the simulation does not begin.
    """
    check_ray()
    return Simulation(problem, stores, folder.path / REMOTE)
