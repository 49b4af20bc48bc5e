"""Cost and memory of class statistics from up to a thousand clients, in one process.

    python benchmarks/federated_clients.py --threads 1          # 50, 200 and 1,000 clients
    python benchmarks/federated_clients.py --quick              # 20 and 100

FedCOF over ready-made features of 512 numbers and 100 classes, 60 samples per client, clients over classes by
Dirichlet 0.1 as its authors deal them. Each number of clients runs in a process of its own; memory is the peak of the
run (Linux tells it) less what was taken before. The data themselves grow with the clients and are counted apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from neurocl.federated.catalog import method_for
from neurocl.federated.config import FederatedConfig
from neurocl.federated.driver import FederatedRun
from neurocl.federated.exchange import SequentialExchange, Stores
from neurocl.federated.method import Samples
from neurocl.federated.network import Classifier
from neurocl.federated.problem import Problem, Source

FEATURES, CLASSES, SAMPLES = 512, 100, 60
FLAT_BOUND, MEMORY_BOUND_MB = 1.5, 600.0


def federation(num_clients: int) -> Problem:
    """Normal features around class means, dealt to so many clients."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_clients * SAMPLES) % CLASSES
    means = torch.randn(CLASSES, FEATURES, generator=generator)
    features = means[labels] + 3 * torch.randn(len(labels), FEATURES, generator=generator)
    test_labels = torch.arange(10 * CLASSES) % CLASSES
    test = means[test_labels] + 3 * torch.randn(len(test_labels), FEATURES, generator=generator)
    config = FederatedConfig(
        dataset="features",
        method="fedcof",
        classes_per_task=0,
        partition={"kind": "per-client", "num_clients": num_clients, "beta": 0.1},
    )
    source = Source(
        "features",
        Samples(features, labels),
        Samples(test, test_labels),
        tuple(str(number) for number in range(CLASSES)),
        lambda: Classifier(nn.Identity(), FEATURES, CLASSES),
    )
    return Problem(config, source)


def memory_mb(name: str) -> float:
    """A line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def measure(num_clients: int) -> dict[str, float]:
    """Seconds of the round, peak MB above the start, MB sent, accuracy."""
    problem = federation(num_clients)
    method = method_for(problem)
    stores = Stores(None, 0)
    assert problem.owners
    records: list[float] = []
    run = FederatedRun(
        problem,
        method,
        SequentialExchange(problem, method, stores, ()),
        stores,
        say=lambda record: records.append(record["seconds"]) if record["event"] == "round" else None,
    )
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the data
    before = memory_mb("VmRSS")
    started = time.perf_counter()
    result = run.run()
    total = time.perf_counter() - started
    return {
        "seconds": records[0],
        "total": total,
        "memory_mb": memory_mb("VmHWM") - before,
        "data_mb": 4 * FEATURES * len(problem.source.train) / 1e6,
        "sent_mb": result["bytes"]["up"] / 1e6,
        "accuracy": result["metrics"]["class_il"]["final_average_accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only:
        print(json.dumps(measure(options.only)))
        return
    counts = (20, 100) if options.quick else (50, 200, 1000)
    found = {}
    print(f"{'clients':>8} {'ms/client':>10} {'MB above':>9} {'MB of data':>11} {'MB sent':>8} {'accuracy %':>11}")
    for count in counts:
        command = [sys.executable, __file__, "--threads", str(options.threads), "--only", str(count)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[count] = row = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{count:8d} {1000 * row['seconds'] / count:10.2f} {row['memory_mb']:9.0f} {row['data_mb']:11.0f} "
            f"{row['sent_mb']:8.1f} {row['accuracy']:11.2f}",
            flush=True,
        )
    few, many = counts[0], counts[-1]
    ratio = (found[many]["seconds"] / many) / (found[few]["seconds"] / few)
    print(f"cost per client, {many} over {few} clients: {ratio:.2f} (bound {FLAT_BOUND})")
    print(f"memory at {many} clients: {found[many]['memory_mb']:.0f} MB (bound {MEMORY_BOUND_MB:.0f})")


if __name__ == "__main__":
    main()
