"""Cost of a round of messages: the in-process runner against Flower's simulation, on the same clients.

    python benchmarks/federated_rounds.py --threads 1       # 4 clients, 50 rounds each
    python benchmarks/federated_rounds.py --quick           # 10 rounds

The clients do nothing: they get 8 x 64 numbers and answer with those and 64 x 64 more, so that what is measured is the
handling of messages. The method joins like one of another package, so that the simulation's processes find it too. Both
runtimes must answer the same bits. The simulation needs Ray: pip install 'flwr[simulation]>=1.41,<1.42'.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from neurocl.errors import UserError
from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.config import FederatedConfig
from neurocl.federated.exchange import Exchange, SequentialExchange, Stores
from neurocl.federated.method import Client, FederatedMethod, Place, Predictor, Reply, Task
from neurocl.federated.partition import PartitionConfig
from neurocl.federated.payload import Payload, encode, num_bytes

BOUND = 20.0
NUM_CLIENTS = 4


class Echo(FederatedMethod):
    """Sends back what it gets, and a Gram matrix of zeros."""

    reveals = "nothing"

    def initial_state(self) -> Payload:
        return Payload({"w": np.arange(8 * 64, dtype=np.float32).reshape(8, 64)})

    def message(self, state: Payload, place: Place) -> Payload:
        return state

    def client(self, client: Client, place: Place, message: Payload) -> Payload:
        return Payload({"w": message.arrays["w"], "gram": np.zeros((64, 64), dtype=np.float32)}, {"n": 1})

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        return state

    def predictor(self, state: Payload, task: Task) -> Predictor:
        return lambda x: x


def install(folder: Path) -> None:
    """Make ``echo`` a method of a package, here and in every process that is started from here."""
    package = folder / "federated_rounds-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: federated-rounds\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[neurocl.aggregators]\necho = federated_rounds:Echo\n")
    paths = [str(folder), str(Path(__file__).parent.resolve())]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def rounds(exchange: Exchange, place: Place, message: Payload, count: int) -> tuple[float, float, list[bytes]]:
    """Seconds of the first round and of a typical later one, and the replies of the last."""
    seconds = []
    for attempt in range(count + 1):
        start = time.perf_counter()
        outcome = exchange(place, dict.fromkeys(range(NUM_CLIENTS), message), attempt)
        seconds.append(time.perf_counter() - start)
        if len(outcome.replies) < NUM_CLIENTS:
            raise SystemExit(f"lost replies: {outcome.failures}")
    return seconds[0], statistics.median(seconds[1:]), [encode(reply.payload) for reply in outcome.replies]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="10 rounds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder))
        compare(10 if options.quick else options.rounds, options.threads, Path(folder))


def compare(count: int, threads: int, folder: Path) -> None:
    """Measure both and print them."""
    partition = PartitionConfig(num_clients=NUM_CLIENTS, beta=100.0)
    problem = problem_for(FederatedConfig(method="echo", partition=partition, threads=threads))
    method = method_for(problem)
    task = problem.tasks[0]
    place = Place(task, method.phases(task)[0], 0)
    message = method.initial_state()
    first, ours, expected = rounds(SequentialExchange(problem, method, Stores(None)), place, message, count)
    down, up = num_bytes(message) / 1e3, len(expected[0]) / 1e3
    print(f"{NUM_CLIENTS} clients, {down:.1f} kB down and {up:.1f} kB up each, {count} rounds")
    print(f"  in this process      first round {first:7.3f} s, then {ours * 1e3:8.2f} ms")
    try:
        from neurocl.federated.flower.simulation import Simulation, check_ray

        check_ray()
    except UserError as error:
        print(f"  Flower's simulation  not measured: {error}")
        return
    start = time.perf_counter()
    simulation = Simulation(problem, Stores(None), folder / "flower")
    try:
        begun = time.perf_counter() - start
        first, theirs, found = rounds(simulation, place, message, count)
    finally:
        simulation.close()
    print(f"  Flower's simulation  first round {begun + first:7.3f} s, then {theirs * 1e3:8.2f} ms")
    ratio = theirs / ours
    verdict = "met" if ratio >= BOUND else "MISSED"
    print(f"  {ratio:.0f} x less in this process; at least {BOUND:g} x: {verdict};", end=" ")
    print(f"same replies: {'yes' if found == expected else 'NO'}")


if __name__ == "__main__":
    main()
