"""Client-level differential privacy: bounded changes, Gaussian noise, and what they add up to.

``K`` clients of whom each takes part in a round with probability q, ``C`` the clipping norm, ``z`` the noise
multiplier, ``m = q K``.

Every client's change (all its trained arrays as one vector) is scaled to a norm of at most C; the server takes the sum
over the replies, adds noise of standard deviation z C and divides by m, whoever answered, also if nobody was to. Counts
of samples are not sent: all clients weigh the same.

The noise, and who takes part, must be secrets: they are drawn from a key that the server keeps in its state, and never
sends, or the client in its store.

Reference: McMahan et al., "Learning differentially private recurrent language models", ICLR 2018, arXiv 1710.06963;
accounted with the Rényi accountant of Opacus (Mironov et al., "Rényi differential privacy of the sampled Gaussian
mechanism", 2019, arXiv 1908.10530).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from zlib import crc32

import numpy as np

from neurocl.errors import UserError
from neurocl.federated.config import PrivacyConfig
from neurocl.federated.fedavg import FedAvg
from neurocl.federated.method import Client, FederatedMethod, Phase, Place, Predictor, Reply, Store, Task
from neurocl.federated.network import Classifier
from neurocl.federated.payload import Payload
from neurocl.federated.randomness import stream

RELEASES = "privacy.releases"  # rounds in which noisy sums were taken, in the server's state
KEY = "privacy.key"  # of the noise: hexadecimal in the server's state, 32 bytes in a client's store
KEY_BYTES = 32
OWN = (RELEASES, KEY)


class PrivateMethod(FederatedMethod):
    """A method that averages what clients trained, with bounded changes and noise.

    Args:
        inner: the method.
        config: of the privacy.

    Raises:
        UserError: a method that needs more of its clients than an average, clients that do not come independently of
            each other, or no accountant.
    """

    def __init__(self, inner: FederatedMethod, config: PrivacyConfig) -> None:
        super().__init__(inner.problem, inner.config)
        if not averages_only(type(inner)):
            raise UserError(
                f"privacy covers methods that only average what clients trained, such as fedavg, fedprox and lora; "
                f"{self.problem.config.method} needs more of them"
            )
        run = self.problem.config
        if run.participation < 1 and run.participation_per == "task":
            raise UserError("privacy counts on clients drawn anew in every round: set participation_per to round")
        if run.participation < 1 and run.min_clients > 1:
            raise UserError("with privacy a round of few clients must not be told from others: set min_clients to 1")
        epsilon(1, config.noise, 1.0, config.delta)  # without an accountant nothing begins
        self.inner = inner
        self.privacy = config

    def phases(self, task: Task) -> Sequence[Phase]:
        return self.inner.phases(task)

    def initial_state(self) -> Payload:
        state = self.inner.initial_state()
        key = {} if self.privacy.seeded else {KEY: os.urandom(KEY_BYTES).hex()}
        return Payload(state.arrays, {**state.meta, RELEASES: 0, **key})

    def begin_task(self, state: Payload, task: Task) -> Payload:
        return _counted(self.inner.begin_task(state, task), state, 0)

    def message(self, state: Payload, place: Place) -> Payload:
        message = self.inner.message(state, place)
        return Payload(message.arrays, {name: value for name, value in message.meta.items() if name not in OWN})

    def client(self, client: Client, place: Place, message: Payload) -> Payload:
        reply = self.inner.client(client, place, message)
        # Who has no samples changes nothing, and must look like everybody else.
        trained = reply.arrays or {name: message.arrays[name] for name in self.inner.expected(message, place)}
        changes = clipped(_changes(trained, message), self.privacy.clip)
        if self.privacy.where == "client":
            rng = self._client_noise(client, place)
            changes = noisy(changes, self.privacy.noise * self.privacy.clip, rng)
        return Payload(_applied(message, changes, 1.0), {"n": 1})

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        """The inner method's mean of one reply, which is made to hold (sum of changes + noise) / m."""
        message = self.inner.message(state, place)
        config, server = self.problem.config, self.privacy.where == "server"
        expected = config.participation * self.problem.num_clients if place.phase.train else self.problem.num_clients
        total = {name: np.zeros(message.arrays[name].shape) for name in self.inner.expected(state, place)}
        for reply in replies:
            changes = _changes({name: reply.payload.arrays[name] for name in total}, message)
            # A client that does not keep to the norm is not believed; noise that it added itself stays.
            changes = clipped(changes, self.privacy.clip) if server else changes
            total = {name: value + changes[name] for name, value in total.items()}
        if server:
            total = noisy(total, self.privacy.noise * self.privacy.clip, self._server_stream(state, place, "privacy"))
        mean = Reply(0, Payload(_applied(message, total, 1 / expected), {"n": 1}))
        # Replies with noise of their own have been seen also if their round is lost: see end_task.
        return _counted(self.inner.aggregate(state, place, [mean]), state, int(server))

    def coming(self, state: Payload, place: Place) -> list[int]:
        """The clients of a round, sorted, which may be nobody.

        Everybody throws a coin of their own, as the accountant reckons. Who comes is as secret as the noise.
        """
        config = self.problem.config
        if not place.phase.train or config.participation >= 1:
            return super().coming(state, place)
        thrown = self._server_stream(state, place, "participation").random(self.problem.num_clients)
        return [int(client) for client in np.flatnonzero(thrown < config.participation)]

    def _server_stream(self, state: Payload, place: Place, label: str) -> np.random.Generator:
        phase, task, number = place.key
        if self.privacy.seeded:
            return stream(self.problem.config.seed, f"server {label} {phase}", task, number)
        return secret_stream(bytes.fromhex(str(state.meta[KEY])), f"{label} {phase}", task, number)

    def _client_noise(self, client: Client, place: Place) -> np.random.Generator:
        phase, task, number = place.key
        if self.privacy.seeded:
            return stream(client.seed, f"privacy {phase}", task, number, client.number)
        key = client.store.setdefault(KEY, np.frombuffer(os.urandom(KEY_BYTES), dtype=np.uint8).copy())
        return secret_stream(key.tobytes(), phase, task, number)

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        return self.inner.objection(state, place, reply)

    def end_task(self, state: Payload, task: Task) -> Payload:
        seen = sum(phase.rounds for phase in self.phases(task)) if self.privacy.where == "client" else 0
        return _counted(self.inner.end_task(state, task), state, seen)

    def predictor(self, state: Payload, task: Task) -> Predictor:
        return self.inner.predictor(state, task)

    def folded(self, state: Payload, task: Task) -> Classifier | None:
        return self.inner.folded(state, task)

    def for_prediction(self, state: Payload) -> Payload:
        return self.inner.for_prediction(state)


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


def secret_stream(key: bytes, label: str, task: int, number: int) -> np.random.Generator:
    """Random numbers of one round that only the owner of the key can draw."""
    words = [int.from_bytes(key, "little"), crc32(label.encode()), task, number]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


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
    own = {name: before.meta[name] for name in OWN if name in before.meta}
    return Payload(state.arrays, {**state.meta, **own, RELEASES: int(before.meta[RELEASES]) + more})  # type: ignore[arg-type]
