"""Client-level differential privacy: bounded changes, Gaussian noise, and what they add up to.

``K`` clients of whom each takes part in a round with probability q, ``C`` the clipping norm, ``z`` the noise
multiplier, ``m = q K``.

Every client's change (all its trained arrays as one vector) is scaled to a norm of at most C; the server takes the sum
over the replies, adds noise of standard deviation z C and divides by m, whoever answered. Counts of samples are not
sent: all clients weigh the same.

Reference: McMahan et al., "Learning differentially private recurrent language models", ICLR 2018, arXiv 1710.06963;
accounted with the Rényi accountant of Opacus (Mironov et al., "Rényi differential privacy of the sampled Gaussian
mechanism", 2019, arXiv 1908.10530).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np

from neurocl.errors import UserError
from neurocl.federated.config import PrivacyConfig
from neurocl.federated.fedavg import FedAvg
from neurocl.federated.method import Client, FederatedMethod, Phase, Place, Predictor, Reply, Store, Task
from neurocl.federated.payload import Payload
from neurocl.federated.randomness import stream

RELEASES = "privacy.releases"  # rounds in which noisy sums were taken, in the server's state


class PrivateMethod(FederatedMethod):
    """A method that averages what clients trained, with bounded changes and noise.

    Args:
        inner: the method.
        config: of the privacy.

    Raises:
        UserError: a method that needs more of its clients than an average, or no accountant.
    """

    def __init__(self, inner: FederatedMethod, config: PrivacyConfig) -> None:
        super().__init__(inner.problem, inner.config)
        if not averages_only(type(inner)):
            raise UserError(
                f"privacy covers methods that only average what clients trained, such as fedavg, fedprox and lora; "
                f"{self.problem.config.method} needs more of them"
            )
        epsilon(1, config.noise, 1.0, config.delta)  # without an accountant nothing begins
        self.inner = inner
        self.privacy = config

    def phases(self, task: Task) -> Sequence[Phase]:
        return self.inner.phases(task)

    def initial_state(self) -> Payload:
        state = self.inner.initial_state()
        return Payload(state.arrays, {**state.meta, RELEASES: 0})

    def begin_task(self, state: Payload, task: Task) -> Payload:
        return _counted(self.inner.begin_task(state, task), state, 0)

    def message(self, state: Payload, place: Place) -> Payload:
        return self.inner.message(state, place)

    def client(self, client: Client, place: Place, message: Payload) -> Payload:
        reply = self.inner.client(client, place, message)
        # Who has no samples changes nothing, and must look like everybody else.
        trained = reply.arrays or {name: message.arrays[name] for name in self.inner.expected(message, place)}
        changes = clipped(_changes(trained, message), self.privacy.clip)
        if self.privacy.where == "client":
            rng = stream(client.seed, f"privacy {place.phase.name}", place.task.index, place.round, client.number)
            changes = noisy(changes, self.privacy.noise * self.privacy.clip, rng)
        return Payload(_applied(message, changes, 1.0), {"n": 1})

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        """The inner method's mean of the replies, which is made to be (sum of changes + noise) / m."""
        message = self.inner.message(state, place)
        config = self.problem.config
        expected = config.participation * self.problem.num_clients if place.phase.train else self.problem.num_clients
        count = len(replies)
        rng = stream(config.seed, f"server privacy {place.phase.name}", place.task.index, place.round)
        changed = []
        for reply in replies:
            # A client that does not keep to the norm is not believed; noise that it added itself stays.
            changes = _changes(reply.payload.arrays, message)
            if self.privacy.where == "server":
                changes = clipped(changes, self.privacy.clip)
                changes = noisy(changes, self.privacy.noise * self.privacy.clip / math.sqrt(count), rng)
            payload = Payload(_applied(message, changes, count / expected), {"n": 1})
            changed.append(Reply(reply.client, payload))
        return _counted(self.inner.aggregate(state, place, changed), state, 1)

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        return self.inner.objection(state, place, reply)

    def end_task(self, state: Payload, task: Task) -> Payload:
        return _counted(self.inner.end_task(state, task), state, 0)

    def predictor(self, state: Payload, task: Task) -> Predictor:
        return self.inner.predictor(state, task)


def averages_only(kind: type[FederatedMethod]) -> bool:
    """Whether clients of a method send nothing but trained arrays, and the server only averages them."""
    return (
        issubclass(kind, FedAvg)
        and kind.aggregate is FedAvg.aggregate
        and kind.client is FedAvg.client
        and kind.reply is FedAvg.reply
        and kind.weights is FedAvg.weights
    )


def clipped(changes: Store, norm: float) -> Store:
    """The same arrays, all together scaled to a Euclidean norm of at most ``norm``."""
    length = math.sqrt(sum(float(np.square(change, dtype=np.float64).sum()) for change in changes.values()))
    return changes if length <= norm else {name: change * (norm / length) for name, change in changes.items()}


def noisy(changes: Store, deviation: float, rng: np.random.Generator) -> Store:
    """The same arrays with independent Gaussian noise."""
    return {name: change + deviation * rng.standard_normal(change.shape) for name, change in changes.items()}


def epsilon(releases: int, noise: float, rate: float, delta: float) -> float:
    """What has been given away of a client after so many rounds.

    Args:
        releases: rounds.
        noise: z.
        rate: q, with which a client takes part in a round, independently of the others.
        delta: of the guarantee.

    Raises:
        UserError: Opacus is not installed.
    """
    if releases == 0:
        return 0.0
    try:
        from opacus.accountants import RDPAccountant
    except ImportError:
        raise UserError("privacy is accounted with Opacus: pip install 'neurocl[privacy]'") from None
    accountant = RDPAccountant()
    accountant.history = [(noise, rate, releases)]
    with warnings.catch_warnings():
        # With much budget spent the best order is the smallest one: the bound holds, only not tightly.
        warnings.simplefilter("ignore", UserWarning)
        return float(accountant.get_epsilon(delta))


def spent(state: Payload, config: PrivacyConfig, participation: float) -> dict[str, float | int | str]:
    """The guarantee of a run so far, for its result.

    With noise on every reply, the server's view of a round is that of a single client without sampling; what is stated
    is the guarantee towards whoever sees the replies.
    """
    releases = int(state.meta[RELEASES])  # type: ignore[arg-type]
    rate = participation if config.where == "server" else 1.0
    return {
        "epsilon": epsilon(releases, config.noise, rate, config.delta),
        "delta": config.delta,
        "releases": releases,
        "clip": config.clip,
        "noise": config.noise,
        "where": config.where,
    }


def _changes(arrays: Store, message: Payload) -> Store:
    return {name: np.subtract(array, message.arrays[name], dtype=np.float64) for name, array in arrays.items()}


def _applied(message: Payload, changes: Store, factor: float) -> Store:
    return {
        name: (message.arrays[name] + factor * change).astype(message.arrays[name].dtype)
        for name, change in changes.items()
    }


def _counted(state: Payload, before: Payload, more: int) -> Payload:
    return Payload(state.arrays, {**state.meta, RELEASES: int(before.meta[RELEASES]) + more})  # type: ignore[arg-type]
