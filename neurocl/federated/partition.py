"""Who owns which sample of a task: the splits of federated papers, each a pure function of labels and a generator.

Dimension letters: K clients, C classes of the task, N training samples, M test samples. A split is ``owner`` [N]: the
client (0..K-1) of every sample, -1 for a sample that nobody gets. The laws are those of the public code; the draws are
not, as that depends on two global generators.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from neurocl.config import Config
from neurocl.errors import UserError
from neurocl.federated.randomness import stream

Labels = NDArray[np.integer[Any]]
Owner = NDArray[np.int64]
Shares = NDArray[np.float64]

# Shares below this are zero in the published code.
_SMALLEST_SHARE = 1e-20
# Tries are drawn together, as long as their [tries, C, K] numbers stay small.
_NUMBERS_PER_BLOCK = 1 << 16


class PartitionConfig(Config):
    """How the samples of every task are dealt to the clients."""

    kind: Literal["dirichlet", "quantity", "per-client", "iid"] = Field(
        "dirichlet",
        description="per class over clients, so many classes per client, per client over classes, or all alike",
    )
    num_clients: int = Field(10, ge=1)
    beta: float = Field(
        0.5, gt=0, allow_inf_nan=False, description="dirichlet, per-client: concentration, less is more uneven"
    )
    classes_per_client: int = Field(2, ge=1, description="quantity: distinct classes of a task that each client holds")
    min_per_client: int = Field(6, ge=0, description="dirichlet: draw again until every client holds so many samples")
    seed: int = Field(0, ge=0, lt=2**32)


def split_task(config: PartitionConfig, labels: Labels, task: int) -> Owner:
    """The owner of every training sample of one task; the same in every process for the same arguments.

    Args:
        labels: [N] classes of the task's training samples.
        task: its number; each task has a stream of its own.

    Returns: [N].

    Raises:
        UserError: the split is impossible or was not found; names the task.
    """
    rng = stream(config.seed, "split", task)
    try:
        if config.kind == "dirichlet":
            return dirichlet_split(labels, config.num_clients, config.beta, rng, min_per_client=config.min_per_client)
        if config.kind == "quantity":
            return quantity_split(labels, config.num_clients, config.classes_per_client, rng)
        if config.kind == "per-client":
            return per_client_split(labels, config.num_clients, config.beta, rng)
        return iid_split(labels, config.num_clients, rng)
    except UserError as error:
        raise UserError(f"task {task}: {error}") from None


def dirichlet_split(
    labels: Labels,
    num_clients: int,
    beta: float,
    rng: np.random.Generator,
    *,
    min_per_client: int = 6,
    max_tries: int = 10_000,
) -> Owner:
    """Deal each class by shares drawn from a symmetric Dirichlet over clients, sample by sample.

    Every sample of class c goes to client k with probability q_c[k], independently. All is drawn again until every
    client holds ``min_per_client`` samples. Independent draws are the same as multinomial counts dealt in random order,
    and only counts decide about drawing again, so samples are dealt once.

    Args:
        labels: [N].
        beta: concentration; less gives fewer classes per client.

    Returns: [N].

    Raises:
        UserError: no try gave every client enough; names beta, K and the best minimum reached.

    Reference: Hsu et al., "Measuring the effects of non-identical data distribution for federated visual
    classification", 2019, arXiv 1909.06335.
    """
    _check(num_clients, beta=beta)
    classes, sizes, order = _by_class(labels, rng)
    tell = f"beta {beta:g}, {num_clients} clients and {len(labels)} samples of {len(classes)} classes"
    if len(labels) < num_clients * min_per_client:
        raise UserError(
            f"{tell}: not enough to give every client {min_per_client} samples; use fewer clients or a smaller "
            "min_per_client"
        )
    best = 0
    tried = 0
    while tried < max_tries:
        block = max(1, min(64, max_tries - tried, _NUMBERS_PER_BLOCK // max(1, len(classes) * num_clients)))
        tried += block
        shares = rng.dirichlet(np.full(num_clients, beta), size=(block, len(classes)))
        shares, drawn = _safe(shares)
        counts = rng.multinomial(sizes, shares)  # [block, C, K]
        smallest = np.where(drawn.all(axis=1), counts.sum(axis=1).min(axis=1), -1)  # [block]
        best = max(best, int(smallest.max()))
        accepted = np.flatnonzero(smallest >= min_per_client)
        if len(accepted):
            return _deal(counts[accepted[0]], order)
    raise UserError(
        f"{tell}: no split in {max_tries} tries gave every client {min_per_client} samples, "
        f"the best minimum was {best}; use a larger beta, fewer clients or min_per_client 0"
    )


def quantity_split(
    labels: Labels, num_clients: int, classes_per_client: int, rng: np.random.Generator, *, max_tries: int = 1000
) -> Owner:
    """Every client picks so many distinct classes; a class is shared evenly, at random, by those who picked it.

    The picks are drawn again until somebody picked every class.

    Args:
        labels: [N].

    Returns: [N].

    Raises:
        UserError: more classes per client than there are, fewer picks than classes, or no covering picks were found.
    """
    _check(num_clients)
    classes, sizes, order = _by_class(labels, rng)
    num_classes = len(classes)
    if num_classes == 0:
        return np.empty(0, np.int64)
    tell = f"{num_clients} clients with {classes_per_client} of {num_classes} classes each"
    if not 1 <= classes_per_client <= num_classes:
        raise UserError(f"{tell}: classes_per_client must be between 1 and {num_classes}")
    if classes_per_client * num_clients < num_classes:
        raise UserError(f"{tell} can never hold all classes; use more clients or more classes per client")
    best = 0
    for _ in range(max_tries):
        picks = rng.random((num_clients, num_classes)).argsort(axis=1)[:, :classes_per_client]
        picked = np.zeros((num_clients, num_classes), bool)
        np.put_along_axis(picked, picks, True, axis=1)
        pickers = picked.sum(axis=0)  # [C]
        best = max(best, int((pickers > 0).sum()))
        if best == num_classes:
            return _deal(rng.multinomial(sizes, (picked / pickers).T), order)
    raise UserError(
        f"{tell}: in {max_tries} tries at most {best} of the classes were picked by someone; use more clients or more "
        "classes per client"
    )


def per_client_split(labels: Labels, num_clients: int, alpha: float, rng: np.random.Generator) -> Owner:
    """Clients of equal size, each with class shares of its own: the split of the class-mean methods (FedNCM, FedCOF).

    Client k draws q_k from a symmetric Dirichlet over classes, then takes floor(N / K) samples one by one: a class from
    q_k, an unused sample of it. A class that is used up gets probability 0 for everybody; a client left without any
    class chooses evenly among the classes left. The clients take turns in random order, so that none is always last.
    Up to K - 1 samples stay unused (-1).

    Args:
        labels: [N].
        alpha: concentration; less gives fewer classes per client.

    Returns: [N].

    Raises:
        UserError: fewer samples than clients.
    """
    _check(num_clients, alpha=alpha)
    classes, sizes, order = _by_class(labels, rng)
    per_client = len(labels) // num_clients
    if per_client == 0:
        raise UserError(f"{len(labels)} samples cannot be dealt to {num_clients} clients; use fewer clients")
    shares, drawn = _safe(rng.dirichlet(np.full(len(classes), alpha), size=num_clients))  # [K, C]
    while not drawn.all():
        again = np.flatnonzero(~drawn)
        shares[again], drawn[again] = _safe(rng.dirichlet(np.full(len(classes), alpha), size=len(again)))
    client = rng.permutation(np.repeat(np.arange(num_clients), per_client))  # [S] whose turn it is
    chosen = _draw(shares, client, rng).tolist()  # [S] class index
    # All turns have drawn from the first shares; one that finds its class used up draws again among the others, which
    # is the same law as removing the class from everybody's shares when its last sample goes.
    unused = sizes.tolist()
    available = np.ones(len(classes), bool)
    for turn, (k, c) in enumerate(zip(client.tolist(), chosen, strict=True)):
        if unused[c] == 0:
            rest = np.where(available, shares[k], 0.0)
            ladder = (rest if rest.any() else available).cumsum()
            c = int(np.searchsorted(ladder / ladder[-1], rng.random(), side="right"))
            chosen[turn] = c
        unused[c] -= 1
        available[c] = unused[c] > 0
    taken = np.array(chosen)
    by_class = np.argsort(taken, kind="stable")
    counts = np.bincount(taken, minlength=len(classes))
    within = np.arange(len(taken)) - np.repeat(counts.cumsum() - counts, counts)
    owner = np.full(len(labels), -1, np.int64)
    owner[order[np.repeat(sizes.cumsum() - sizes, counts) + within]] = client[by_class]
    return owner


def iid_split(labels: Labels, num_clients: int, rng: np.random.Generator) -> Owner:
    """Shuffle and deal: client sizes differ by one at most, classes are spread as chance has it."""
    _check(num_clients)
    return rng.permutation(np.arange(len(labels)) % num_clients).astype(np.int64, copy=False)


def test_shares(labels: Labels, owner: Owner, test_labels: Labels, num_clients: int, rng: np.random.Generator) -> Owner:
    """Deal a task's test samples for evaluation on clients, class by class in the proportions of the training split.

    A client's part of a class is its share of the training samples times the class's test samples, rounded down; the
    remainder is drawn with the shares as probabilities. A class without training samples goes by the shares of the
    whole task. A client left with nothing then takes one sample, of the class of which it holds the largest share, from
    the client that has most.

    Args:
        labels: [N] training classes.
        owner: [N] their owners; -1 is left out.
        test_labels: [M].

    Returns: [M] clients; every one has at least one sample.

    Raises:
        UserError: fewer test samples than clients.
    """
    _check(num_clients)
    if len(test_labels) < num_clients:
        raise UserError(f"{len(test_labels)} test samples cannot give each of {num_clients} clients one")
    classes, sizes, order = _by_class(test_labels, rng)
    mine = (owner >= 0) & np.isin(labels, classes)
    held = np.zeros((len(classes), num_clients))
    np.add.at(held, (np.searchsorted(classes, labels[mine]), owner[mine]), 1)
    whole = np.bincount(owner[owner >= 0], minlength=num_clients).astype(np.float64)
    held[~held.any(axis=1)] = whole if whole.any() else 1.0
    shares = held / held.sum(axis=1, keepdims=True)
    # Whole parts are exact quotients; 0.1 * 30 must not round down to 2.
    counts = (held * sizes[:, None] // held.sum(axis=1, keepdims=True)).astype(np.int64)
    counts += rng.multinomial(sizes - counts.sum(axis=1), shares)
    for client in np.flatnonzero(counts.sum(axis=0) == 0):
        spare = counts * (counts.sum(axis=0) > 1)
        wish = np.where(spare.any(axis=1), shares[:, client], -1.0).argmax()
        giver = np.where(spare[wish] > 0, counts.sum(axis=0), 0).argmax()
        counts[wish, giver] -= 1
        counts[wish, client] += 1
    return _deal(counts, order)


def _check(num_clients: int, **concentration: float) -> None:
    if num_clients < 1:
        raise UserError(f"num_clients must be at least 1, got {num_clients}")
    for name, value in concentration.items():
        if not 0 < value < np.inf:
            raise UserError(f"{name} must be a positive number, got {value}")


def _by_class(labels: Labels, rng: np.random.Generator) -> tuple[Labels, Owner, Owner]:
    """Classes [C], their sizes [C], and the samples [N] in order of class and in random order within a class."""
    shuffled = rng.permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    classes, sizes = np.unique(labels, return_counts=True)
    return classes, sizes.astype(np.int64, copy=False), order


def _deal(counts: NDArray[np.int64], order: Owner) -> Owner:
    """Owner [N] when each class's samples, in their random order, go to the clients by ``counts`` [C, K]."""
    num_classes, num_clients = counts.shape
    owner = np.empty(len(order), np.int64)
    owner[order] = np.repeat(np.tile(np.arange(num_clients), num_classes), counts.ravel())
    return owner


def _safe(shares: Shares) -> tuple[Shares, NDArray[np.bool_]]:
    """Shares [..., n] without tiny entries, summing to 1, and which rows [...] were a proper draw (even shares if not).

    Extreme concentrations make rows of NaN or zeros.
    """
    shares = np.where(shares >= _SMALLEST_SHARE, shares, 0.0)
    total = shares.sum(axis=-1, keepdims=True)
    drawn = (total > 0) & np.isfinite(total)
    shares = np.where(drawn, shares, 1.0)
    return shares / shares.sum(axis=-1, keepdims=True), drawn[..., 0]


def _draw(shares: Shares, rows: Owner, rng: np.random.Generator) -> Owner:
    """One column per entry of ``rows``, with the probabilities of that row of ``shares`` [R, C]."""
    # Row r's cumulative shares lie in (r, r + 1]: one sorted sequence serves all rows.
    ladder = shares.cumsum(axis=1)
    ladder /= ladder[:, -1:]
    ladder += np.arange(len(shares))[:, None]
    found = np.searchsorted(ladder.ravel(), rows + rng.random(len(rows)), side="right")
    # A draw next to 1 may be rounded to the following row: it belongs to the last column that has a share.
    last = shares.shape[1] - 1 - (shares[:, ::-1] > 0).argmax(axis=1)
    columns: Owner = np.minimum(found - rows * shares.shape[1], last[rows])
    return columns
