"""Take clients out of a finished run: by negated displacements, by the server's ledger, or exactly.

``K`` clients, ``C`` classes, ``A`` scales. tau' = tau - sum_u alpha_u v_u, where v_u is what client u learns alone from
tau = 0 (negation), what it adds to tau (global negation) or what it contributed by the ledger. Methods whose
state is made of sums over clients forget exactly instead.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from neurocl.errors import RunError, UserError
from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.driver import (
    REMOTE,
    Connect,
    FederatedRun,
    Progress,
    Say,
    count_correct,
    load_federated_config,
)
from neurocl.federated.exchange import Exchange, ProcessExchange, SequentialExchange, Stores
from neurocl.federated.method import FederatedMethod, Place, Reply, Store
from neurocl.federated.payload import Payload, num_bytes
from neurocl.federated.problem import Problem
from neurocl.federated.tangent import ALPHAS, CONTROL, REMOVAL, RIGHT, SCALES, VECTOR, Tangent
from neurocl.federated.unlearning_judge import Judge, compared
from neurocl.runs import RunFolder, write_atomically

Mode = Literal["negation", "global-negation", "ledger", "exact"]
MODES: tuple[Mode, ...] = ("negation", "global-negation", "ledger", "exact")

SMALLEST_ALPHA, LARGEST_ALPHA = 0.1, 0.5
#: the whole vector is 1; twice of it answers a client's data worse than any model that never saw them
MOST_ALPHA = 2.0
KEPT_CONTROL = 0.95


class Remaining(FederatedRun):
    """A run without some of the clients, kept in memory.

    Args:
        problem, method, exchange, stores, say: as of any run.
        removed: who is not asked.
    """

    def __init__(
        self,
        problem: Problem,
        method: FederatedMethod,
        exchange: Exchange,
        stores: Stores,
        *,
        removed: frozenset[int] = frozenset(),
        say: Say | None = None,
    ) -> None:
        super().__init__(problem, method, exchange, stores, say=say)
        self.removed = removed

    def repair(self) -> None:
        """One more round of the last task, with those who remain."""
        task = self.problem.tasks[-1]
        phase = [phase for phase in self.method.phases(task) if phase.train][-1]
        self._round(Place(task, phase, phase.rounds))

    def judged(self) -> dict[str, Any]:
        """The result document of the state as it is."""
        tasks = self.problem.tasks
        predict = self.method.predictor(self.state, tasks[-1])
        seen = tasks[-1].classes.stop
        self.progress.correct[-1] = [count_correct(predict, self.problem.test_samples(task), seen) for task in tasks]
        return self._result()


@dataclass
class Removal:
    """What a removal did.

    Attributes:
        mode: how.
        state: of the server afterwards.
        alphas: scale of each client's vector; empty if exact.
        bytes_up, bytes_down: that it took.
        seconds: that it took.
    """

    mode: Mode
    state: Payload = field(default_factory=Payload)
    alphas: dict[int, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0


def possible_modes(method: FederatedMethod, state: Payload, client: int) -> list[Mode]:
    """The ways in which a client can be taken out of a state, the recommended one first."""
    if isinstance(method, Tangent):
        return ["negation", "global-negation", *(["ledger"] if method.config.ledger else [])]  # type: ignore[list-item]
    try:
        method.forget(state, client)
    except UserError:
        return []
    return ["exact"]


def chosen_mode(method: FederatedMethod, state: Payload, client: int, mode: Mode | None) -> Mode:
    """The mode asked for, or the recommended one.

    Raises:
        UserError: impossible for this method and state; says what is possible.
    """
    name, possible = method.problem.config.method, possible_modes(method, state, client)
    if not possible:
        try:
            method.forget(state, client)
        except UserError as error:
            raise UserError(f"no client can be removed from this run: {error}") from None
    if mode is None or mode in possible:
        return mode or possible[0]
    if mode == "ledger" and isinstance(method, Tangent):
        raise UserError(
            f"this run kept no ledger; train with options.ledger=true, or use --mode {' or '.join(possible)}"
        )
    raise UserError(f"--mode {mode} is impossible with {name}; possible: {', '.join(possible)}")


def default_alpha(share: float) -> float:
    """The share with which a client entered the average, at least 0.1 and at most 0.5; 0 if it never did."""
    return min(max(share, SMALLEST_ALPHA), LARGEST_ALPHA) if share > 0 else 0.0


def largest_scale(right: NDArray[Any], scales: Sequence[float] = SCALES, keep: float = KEPT_CONTROL) -> float:
    """The largest scale at which at least ``keep`` of the right answers at scale 0 are left.

    Args:
        right: right answers on a control set at every scale, [A]; the first scale is 0.
        scales: [A].
        keep: share of the accuracy that must be left.
    """
    return max(scale for scale, found in zip(scales, right, strict=True) if found >= keep * right[0])


def remove(
    run: FederatedRun,
    clients: Sequence[int],
    *,
    mode: Mode | None = None,
    alpha: float | None = None,
    sweep: bool = False,
    epochs: int | None = None,
) -> Removal:
    """Take clients out of a run's state; the run itself is not changed.

    Args:
        run: with the state, and an exchange that reaches the clients that have to help: in the negating modes those
            that leave, with ``sweep`` those that remain.
        clients: who leaves; their order does not matter.
        mode: None for the one that suits the method.
        alpha: scale of the vectors, 0 to 2; None takes each client's share, between 0.1 and 0.5, or 1 for the ledger.
        sweep: take the largest alpha among 0, 0.05 ... 1 that keeps 95 % of the right answers of the remaining clients.
        epochs: that a leaving client trains; None takes half of what it trained in the run.

    Raises:
        UserError: a mode that is impossible for the method, or an alpha that makes no sense.
        RunError: a client did not answer.
    """
    started = time.perf_counter()
    clients = sorted(set(clients))
    mode = chosen_mode(run.method, run.state, clients[0], mode)
    if alpha is not None and not (math.isfinite(alpha) and 0 <= alpha <= MOST_ALPHA):
        raise UserError(f"alpha must be a number from 0 to {MOST_ALPHA:g}, where 1 is the whole vector, got {alpha:g}")
    if alpha is not None and sweep:
        raise UserError("either alpha is given or a sweep looks for it, not both")
    if epochs is not None and epochs < 1:
        raise UserError(f"epochs must be at least 1, got {epochs}")
    removal = Removal(mode)
    if mode == "exact":
        if alpha is not None or sweep or epochs is not None:
            raise UserError("exact removal has no alpha and no epochs")
        removal.state = run.state
        for client in clients:
            removal.state = run.method.forget(removal.state, client)
    else:
        assert isinstance(run.method, Tangent)
        _subtract(run, run.method, clients, removal, alpha=alpha, sweep=sweep, epochs=epochs)
    removal.seconds = time.perf_counter() - started
    return removal


def _subtract(
    run: FederatedRun,
    method: Tangent,
    clients: Sequence[int],
    removal: Removal,
    *,
    alpha: float | None,
    sweep: bool,
    epochs: int | None,
) -> None:
    vectors = {client: _vector(run, method, client, removal, epochs) for client in clients}
    shares = {client: method.share(run.state, client) for client in clients}
    if sweep:
        whole = _summed(method, run.state, vectors, dict.fromkeys(clients, 1.0))
        alpha = largest_scale(_votes(run, method, clients, whole, removal))
    elif alpha is None and removal.mode == "ledger":
        alpha = 1.0
    removal.alphas = {client: default_alpha(shares[client]) if alpha is None else alpha for client in clients}
    removal.state = method.without(run.state, clients, _summed(method, run.state, vectors, removal.alphas))


def _summed(method: Tangent, state: Payload, vectors: dict[int, Store], alphas: dict[int, float]) -> Store:
    """sum_u alpha_u v_u in float64: the order in which clients are named is none of the sum."""
    total: Store = {name: np.zeros(array.shape) for name, array in method.tau(state).items()}
    for client, vector in sorted(vectors.items()):
        for name, array in vector.items():
            total[name] = total[name] + alphas[client] * array.astype(np.float64)
    return total


def _vector(run: FederatedRun, method: Tangent, client: int, removal: Removal, epochs: int | None) -> Store:
    """v_u of the mode."""
    state = run.state
    zero = {name: np.zeros_like(array) for name, array in method.tau(state).items()}
    if removal.mode == "ledger":
        return method.contribution(state, client)
    if method.share(state, client) == 0:
        # Whoever never entered tau has nothing in it.
        return zero
    config = run.problem.config
    own = max(1, config.rounds * config.local_epochs // 2) if epochs is None else epochs
    start = zero if removal.mode == "negation" else method.tau(state)
    found = start
    for task in run.problem.tasks:
        # Everybody knows zero.
        sent = {} if found is zero else found
        for reply in _ask(run, Place(task, REMOVAL, 0), {client: Payload(sent, {"epochs": own})}, removal):
            if reply.payload.arrays:
                found = {name: reply.payload.arrays[name] for name in zero}
    return {name: array.astype(np.float64) - start[name] for name, array in found.items()}


def _votes(
    run: FederatedRun, method: Tangent, clients: Sequence[int], vector: Store, removal: Removal
) -> NDArray[np.int64]:
    """Right answers of the remaining clients at every scale, [A]."""
    gone = {*clients, *run.removed}
    arrays = {VECTOR + name: array.astype(np.float32) for name, array in vector.items()}
    message = Payload({**method.tau(run.state), **arrays, ALPHAS: np.array(SCALES)})
    asked = [client for client in range(run.problem.num_clients) if client not in gone]
    total = np.zeros(len(SCALES), dtype=np.int64)
    for task in run.problem.tasks:
        for reply in _ask(run, Place(task, CONTROL, 0), dict.fromkeys(asked, message), removal):
            if RIGHT in reply.payload.arrays:
                total += reply.payload.arrays[RIGHT]
    return total


def _ask(run: FederatedRun, place: Place, messages: dict[int, Payload], removal: Removal) -> list[Reply]:
    """Replies of all clients that are asked.

    Raises:
        RunError: one of them did not answer, or nonsense.
    """
    outcome = run.exchange(place, messages, 0)
    # What clients keep belongs to training.
    run.stores.discard(messages)
    removal.bytes_down += sum(num_bytes(message) for message in messages.values())
    removal.bytes_up += sum(num_bytes(reply.payload) for reply in outcome.replies)
    told = [f"client {item.client} {item.kind}: {item.text}" for item in outcome.failures]
    for reply in outcome.replies:
        # Who has no samples need not send anything.
        said = reply.payload.meta["n"] or reply.payload.arrays
        reason = run.method.objection(run.state, place, reply.payload) if said else ""
        told += [f"client {reply.client} malformed: {reason}"] if reason else []
    if told:
        raise RunError(f"nothing was removed, {told[0]}; --mode ledger needs no help of the client")
    return outcome.replies


def unlearn(
    path: Path,
    clients: Sequence[int],
    *,
    mode: Mode | None = None,
    alpha: float | None = None,
    sweep: bool = False,
    epochs: int | None = None,
    gold: bool = False,
    repair: bool = False,
    out: Path | None = None,
    in_place: bool = False,
    say: Say | None = None,
    connect: Connect | None = None,
) -> tuple[dict[str, Any], Path]:
    """Take clients out of a finished run; returns the report and the folder of the model without them.

    Args:
        path: the run. It is not touched unless ``in_place``.
        clients: who leaves.
        mode, alpha, sweep, epochs: see :func:`remove`.
        gold: train again without them, to compare.
        repair: one round of the remaining clients afterwards.
        out: folder of the new run; None for ``runs/<stem>-<time>``.
        in_place: change the run itself.
        say: called with every record of the log.
        connect: makes another runtime than those of this machine, which then reaches the clients that have to help.

    Raises:
        UserError: not a finished run, unknown clients, or a mode that is impossible.
        RunError: a client did not answer, or the disk is full.
        Interrupted: while training again; nothing is kept.
    """
    if in_place and out is not None:
        raise UserError("--in-place changes the run itself: it takes no --out")
    folder = RunFolder.open(path)
    config = load_federated_config(folder)
    if not folder.has_result() or not folder.has_checkpoint():
        raise UserError(f"{path} is not finished; finish it with neurocl federated run --resume {path}")
    if connect is None and (path / REMOTE).exists():
        raise UserError(f"{path} ran on Flower: the samples of its clients, to judge by, are not in this process")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    checkpoint = folder.load_checkpoint()
    gone = frozenset(int(client) for client in checkpoint.state.get("removed", []))
    problem = problem_for(config)
    leaving = _leaving(clients, problem.num_clients, gone)
    method = method_for(problem)
    state = Payload({name: value.numpy() for name, value in checkpoint.tensors.items()}, checkpoint.state["meta"])
    chosen_mode(method, state, min(leaving), mode)
    if repair and not any(phase.train for phase in method.phases(problem.tasks[-1])):
        raise UserError(f"{config.method} trains nothing that a round could repair")
    target = folder if in_place else RunFolder.create(out, stem=f"federated-unlearned-{config.method}-{config.dataset}")
    target.acquire()
    try:
        log: list[dict[str, Any]] = []
        stores = _copied_stores(folder, problem.num_clients)
        exchange = connect(problem, method, stores, target) if connect else _exchange(problem, method, stores)
        try:
            run = Remaining(problem, method, exchange, stores, removed=gone, say=log.append)
            run.state, run.progress = state, Progress(**checkpoint.state["progress"])
            removal = remove(run, sorted(leaving), mode=mode, alpha=alpha, sweep=sweep, epochs=epochs)
            states = {"before": state, "after": removal.state}
            run.state, run.removed = removal.state, gone | leaving
            spent = (run.progress.bytes_up, run.progress.bytes_down)
            if repair:
                run.repair()
                states["repaired"] = run.state
        finally:
            exchange.close()
        report: dict[str, Any] = {
            "clients": sorted(leaving),
            "mode": removal.mode,
            "alpha": {str(client): value for client, value in removal.alphas.items()},
            "bytes": {"up": removal.bytes_up, "down": removal.bytes_down},
            "seconds": removal.seconds,
        }
        if repair:
            report["repair_bytes"] = {
                "up": run.progress.bytes_up - spent[0],
                "down": run.progress.bytes_down - spent[1],
            }
        run.progress.bytes_up += removal.bytes_up
        run.progress.bytes_down += removal.bytes_down
        if gold:
            states["gold"] = _trained_again(problem, method, gone | leaving, say)
        report |= compared(problem, method, states, Judge(problem, leaving, gone))
        if gold:
            accuracy = report["accuracy"]
            reached, aim = (accuracy[name]["forget"] for name in ("repaired" if repair else "after", "gold"))
            # Data that are answered worse than by a model that never saw them can be told from others, too.
            report["over_removed"] = reached is not None and reached < aim
        _save(run, folder, target, report, log)
        return report, target.path
    except BaseException:
        # The folder is ours and holds no finished model.
        if not in_place:
            shutil.rmtree(target.path, ignore_errors=True)
        raise
    finally:
        target.release()


def _leaving(clients: Sequence[int], num_clients: int, gone: frozenset[int]) -> frozenset[int]:
    """Who leaves.

    Raises:
        UserError: nobody, somebody unknown, somebody who left before, or everybody.
    """
    if not clients:
        raise UserError("no client is named; use --client NUMBER")
    for client in clients:
        if not 0 <= client < num_clients:
            raise UserError(f"there is no client {client}; the run has clients 0 to {num_clients - 1}")
        if client in gone:
            raise UserError(f"client {client} was removed from this run before")
    leaving = frozenset(clients)
    if len(leaving | gone) == num_clients:
        raise UserError("somebody must remain; all clients would be removed")
    return leaving


def _copied_stores(folder: RunFolder, num_clients: int) -> Stores:
    """What clients keep, in memory: the files of the run are not touched."""
    stores = Stores(None)
    for client in range(num_clients):
        path = folder.path / "clients" / f"client-{client}.safetensors"
        if path.is_file():
            stores.write(client, {name: value.numpy() for name, value in load_file(path).items()})
    stores.commit()
    return stores


def _exchange(problem: Problem, method: FederatedMethod, stores: Stores) -> Exchange:
    if problem.config.workers:
        return ProcessExchange(problem, stores)
    return SequentialExchange(problem, method, stores)


def _trained_again(problem: Problem, method: FederatedMethod, removed: frozenset[int], say: Say | None) -> Payload:
    """The server of a run of the same configuration in which these clients were never asked."""
    if say is not None:
        say({"event": "run", "text": f"training again without {_named(removed)}"})
    stores = Stores(None)
    exchange = _exchange(problem, method, stores)
    try:
        run = Remaining(problem, method, exchange, stores, removed=removed, say=say)
        run.run()
    finally:
        exchange.close()
    return run.state


def _named(clients: frozenset[int]) -> str:
    return f"client{'s' if len(clients) > 1 else ''} {', '.join(str(client) for client in sorted(clients))}"


def _save(
    run: Remaining, folder: RunFolder, target: RunFolder, report: dict[str, Any], log: Sequence[dict[str, Any]]
) -> None:
    """Write the run without the clients; the checkpoint, which makes it so, after everything that must be gone."""
    run.unlearning = report
    document = run.judged()
    records = [*(_without(record, run.removed) for record in folder.read_metrics()), *log]
    records.append({"event": "unlearning", **report})
    if target is not folder:
        target.write_config((folder.path / "config.yaml").read_text(encoding="utf-8"))
    write_atomically(target.metrics_path, "".join(json.dumps(record) + "\n" for record in records))
    stores = Stores(target.path / "clients", run.progress.step)
    for client in range(run.problem.num_clients):
        if client in run.removed:
            for path in (target.path / "clients").glob(f"client-{client}.*"):
                path.unlink()
        else:
            stores.write(client, run.stores.latest(client))
    stores.commit()
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in run.state.arrays.items()}
    target.save_checkpoint(tensors, run.saved())
    target.write_result(document)


def _without(record: dict[str, Any], removed: frozenset[int]) -> dict[str, Any]:
    """A record of the log that does not mention these clients."""
    if record["event"] != "round":
        return record
    clients = [client for client in record["clients"] if client not in removed]
    failures = [failure for failure in record["failures"] if failure[0] not in removed]
    return {**record, "clients": clients, "failures": failures}
