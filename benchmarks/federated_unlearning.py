"""Does a client that is subtracted leave the others as good as if it had never been there? Digits, expanded or not.

    python benchmarks/federated_unlearning.py                  # three seeds, about a minute on an idle core
    python benchmarks/federated_unlearning.py --weights equal  # clients count alike in the average

Five clients with very different classes (Dirichlet 0.1, at least 60 samples each), one task of ten digits, ten rounds
of two epochs with AdamW at 2e-3. The client that owns most classes leaves. Accuracies in per cent, means over seeds: on
its training samples, on those of the others, on all test samples, on those of the classes that it owns, on those of
other classes; how well its samples are told from unseen ones by their loss (0.5: not at all); and the mean
total-variation distance of the class probabilities from those of the model that was trained without it. ``sweep`` is
the largest alpha that keeps 95 % of the right answers of the remaining clients, ``share`` the default.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from neurocl.devices import cpu_name
from neurocl.federated import FederatedConfig, PartitionConfig, SequentialExchange, Stores, method_for, problem_for
from neurocl.federated.payload import Payload
from neurocl.federated.unlearning import Remaining, remove
from neurocl.federated.unlearning_judge import OWN_SHARE, Judge, compared

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
COLUMNS = {
    "forget": "forget",
    "retain": "retain",
    "test": "test",
    "test_own": "its classes",
    "test_others": "other classes",
    "membership": "membership",
}


def trained(seed: int, linear: bool, weights: str, removed: frozenset[int] = frozenset()) -> Remaining:
    """A run of the problem, over."""
    config = FederatedConfig(
        method="tangent",
        options={"linear": linear, "ledger": True, "weights": weights},
        classes_per_task=0,
        partition=PartitionConfig(num_clients=5, beta=0.1, min_per_client=60, seed=seed),
        rounds=10,
        local_epochs=2,
        lr=2e-3,
        seed=seed,
    )
    problem = problem_for(config)
    method, stores = method_for(problem), Stores(None)
    exchange = SequentialExchange(problem, method, stores)
    run = Remaining(problem, method, exchange, stores, removed=removed)
    run.run()
    return run


def owner_of_most(run: Remaining) -> int:
    """The client that owns most classes, of several the one with most samples."""
    task = run.problem.tasks[0]
    labels = [run.problem.train_samples(client, task).y for client in range(run.problem.num_clients)]
    counts = torch.stack([own.bincount(minlength=run.problem.num_classes) for own in labels])
    owned = (counts > OWN_SHARE * counts.sum(dim=0)).sum(dim=1)
    return max(range(len(labels)), key=lambda client: (int(owned[client]), len(labels[client])))


def states_of(run: Remaining, leaving: int) -> dict[str, Payload]:
    """The server before, after every kind of removal, after a repair, and never having known the client."""
    found = {"before": run.state}
    share = remove(run, [leaving])
    found["negation, share"] = share.state
    for alpha in ALPHAS:
        found[f"negation, {alpha}"] = remove(run, [leaving], alpha=alpha).state
    found["negation, sweep"] = remove(run, [leaving], sweep=True).state
    for alpha in ALPHAS:
        found[f"global-negation, {alpha}"] = remove(run, [leaving], mode="global-negation", alpha=alpha).state
    found["ledger"] = remove(run, [leaving], mode="ledger").state
    repaired = Remaining(run.problem, run.method, run.exchange, run.stores, removed=frozenset([leaving]))
    repaired.state = share.state
    repaired.repair()
    found["negation, share, repaired"] = repaired.state
    return found


def measured(seed: int, linear: bool, weights: str) -> dict[str, Mapping[str, Any]]:
    """Numbers of every state of one seed."""
    run = trained(seed, linear, weights)
    leaving = owner_of_most(run)
    gold = trained(seed, linear, weights, frozenset([leaving]))
    states = {**states_of(run, leaving), "gold": gold.state}
    found = compared(run.problem, run.method, states, Judge(run.problem, frozenset([leaving])))
    return {name: row | {"distance": found["distance"].get(name, 0.0)} for name, row in found["accuracy"].items()}


def table(seeds: Sequence[int], linear: bool, weights: str) -> list[str]:
    """Lines of markdown."""
    rows = [measured(seed, linear, weights) for seed in seeds]
    lines = ["| " + " | ".join(["model", *COLUMNS.values(), "distance to gold"]) + " |", "|---|" + "---:|" * 7]
    for name in rows[0]:
        means = [statistics.fmean(row[name][column] for row in rows) for column in (*COLUMNS, "distance")]
        cells = [f"{value:.1f}" for value in means[:5]] + [f"{value:.2f}" for value in means[5:]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weights", choices=["samples", "equal"], default="samples")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for linear in (True, False):
        began = time.perf_counter()
        lines = table(range(arguments.seeds), linear, arguments.weights)
        kind = "first-order expansion" if linear else "the network itself"
        seconds = time.perf_counter() - began
        print(f"\n{kind}, weights {arguments.weights} ({seconds:.0f} s on one thread of {cpu_name()})\n")
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
