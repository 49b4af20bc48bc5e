"""Secure summation: the server learns the sum of what its clients contribute, and nothing else of them.

Every round of a method takes four exchanges. ``a < b`` are clients, ``n`` of whom are asked, ``t`` the threshold.

1. ``keys``: everybody draws two secrets and sends their public keys, one for masks, one for boxes.
2. ``shares``: everybody draws a third secret, its seed, splits seed and mask secret into shares of which t tell them,
   and sends each client its shares in a box that the server cannot open.
3. ``masked``: everybody does what the method asks, and sends its contribution with the mask of its own seed, plus the
   masks that it agrees on with clients after it, minus those with clients before it. In the sum over all, these cancel.
4. ``unmask``: those who are left send their shares of the seeds of all who sent a contribution, and of the mask secrets
   of those who did not, never both of one client. With t of each the server takes off the masks that did not cancel.

The masks fill the whole range of 64-bit integers and all sums are exact, so that the result does not depend on them.
Secrets come from the operating system and serve in one round; a client drops them when it has told its shares.

Reference: Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning", CCS 2017, against
a server that keeps to the protocol.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurocl.errors import UserError
from neurocl.federated import masking
from neurocl.federated.config import SecureSumConfig
from neurocl.federated.lora import misfit
from neurocl.federated.masking import KEY_BYTES, NONCE_BYTES, SECRET_BYTES, TAG_BYTES, MaskingError, Words
from neurocl.federated.method import (
    Client,
    FederatedMethod,
    Phase,
    Place,
    Predictor,
    Reply,
    RoundLost,
    Store,
    Task,
)
from neurocl.federated.network import Classifier
from neurocl.federated.payload import Payload, check_bounded, check_finite

KEYS, SHARES, MASKED, UNMASK = STEPS = ("keys", "shares", "masked", "unmask")
#: of everything of ours in states, messages and stores
OWN = "secure."
DONE, THRESHOLD = OWN + "done", OWN + "threshold"
# Of the server and its messages: who sent keys, with public keys [n, 2, 32]; who sent shares, with boxes [n, n, 60] by
# sender and receiver and hashes of the seeds [n, 32]; who sent contributions, with their masked sum.
MEMBERS, PUBLIC = OWN + "members", OWN + "public"
SHARERS, BOXES, HASHES = OWN + "sharers", OWN + "boxes", OWN + "hashes"
SURVIVORS, TOTAL = OWN + "survivors", OWN + "total"
# Of a client: its secrets and seed, the digest of the round, the shares that it holds [n, 2, 16].
SECRETS, SEED, CONTEXT, HELD = OWN + "secrets", OWN + "seed", OWN + "context", OWN + "held"
ANSWERED = OWN + "answered"
#: number of whom the one reply is that the method is given
NOBODY = -1

ELSEWHERE = "the server is in another round than this client"
SHARE_BYTES = 2 * SECRET_BYTES
BOX_BYTES = NONCE_BYTES + SHARE_BYTES + TAG_BYTES

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]


class SecureSum(FederatedMethod):
    """A method of which the server needs nothing but sums, and gets nothing else.

    Args:
        inner: the method.
        config: of the summation.

    Raises:
        UserError: a method that needs more of its clients, too few clients, or libraries that are not installed.
    """

    def __init__(self, inner: FederatedMethod, config: SecureSumConfig) -> None:
        super().__init__(inner.problem, inner.config)
        run = self.problem.config
        if not inner.sum_only:
            raise UserError(
                f"secure summation covers methods whose server needs nothing but sums, such as fedavg, lora and fed3r; "
                f"{run.method} needs more"
            )
        if run.options.get("forgettable"):
            raise UserError("secure summation knows no client by itself, so it cannot forget one: drop forgettable")
        if min(self.problem.num_clients, round(run.participation * self.problem.num_clients)) < 2:
            raise UserError("secure summation needs two clients or more in every round: the sum of one is its reply")
        self.inner = inner
        self.secure = config

    def phases(self, task: Task) -> Sequence[Phase]:
        return [
            Phase(f"{phase.name}.{number}.{step}", 1, phase.train)
            for phase in self.inner.phases(task)
            for number in range(phase.rounds)
            for step in STEPS
        ]

    def _inside(self, place: Place) -> tuple[Place, str]:
        """The place in the method's own phases, and the step."""
        name, number, step = place.phase.name.rsplit(".", 2)
        phase = next(phase for phase in self.inner.phases(place.task) if phase.name == name)
        return Place(place.task, phase, int(number)), step

    def _ready(self, state: Payload, place: Place) -> bool:
        """Whether the steps before this one went well in this very round."""
        inside, step = self._inside(place)
        return step == KEYS or state.meta.get(DONE) == _name(inside, STEPS[STEPS.index(step) - 1])

    def coming(self, state: Payload, place: Place) -> list[int]:
        """Who is asked: the method's own choice, then those of them who have answered so far."""
        inside, step = self._inside(place)
        if step == KEYS:
            return self.inner.coming(_without(state), inside)
        if not self._ready(state, place):
            return []
        return [int(client) for client in state.arrays[{SHARES: MEMBERS, MASKED: SHARERS, UNMASK: SURVIVORS}[step]]]

    def quorum(self, state: Payload, place: Place) -> int:
        inside, step = self._inside(place)
        if step == KEYS:
            threshold = self._least(len(self.inner.coming(_without(state), inside)))
        else:
            threshold = int(state.meta.get(THRESHOLD, 2))  # type: ignore[arg-type]
        return threshold if step == UNMASK else max(threshold, self.inner.quorum(_without(state), inside))

    def _least(self, asked: int) -> int:
        """t of so many clients."""
        return max(2, math.ceil(self.secure.threshold * asked - 1e-9))

    def closes(self, place: Place) -> bool:
        return self._inside(place)[1] == UNMASK

    def initial_state(self) -> Payload:
        return self.inner.initial_state()

    def begin_task(self, state: Payload, task: Task) -> Payload:
        return self.inner.begin_task(_without(state), task)

    def end_task(self, state: Payload, task: Task) -> Payload:
        return self.inner.end_task(_without(state), task)

    def predictor(self, state: Payload, task: Task) -> Predictor:
        return self.inner.predictor(_without(state), task)

    def folded(self, state: Payload, task: Task) -> Classifier | None:
        return self.inner.folded(_without(state), task)

    def for_prediction(self, state: Payload) -> Payload:
        return self.inner.for_prediction(_without(state))

    def forget(self, state: Payload, client: int) -> Payload:
        raise UserError("with secure summation the server knows only sums over clients and cannot take one out")

    def message(self, state: Payload, place: Place) -> Payload:
        """What has to be known for a step; that of the method is in ``masked`` alone."""
        inside, step = self._inside(place)
        if step == KEYS or not self._ready(state, place):
            return Payload()
        if step == SHARES:
            return Payload(_taken(state, MEMBERS, PUBLIC), {THRESHOLD: state.meta[THRESHOLD]})
        if step == MASKED:
            message = self.inner.message(_without(state), inside)
            return Payload({**message.arrays, **_taken(state, SHARERS, BOXES)}, message.meta)
        return Payload(_taken(state, SURVIVORS))

    def client(self, client: Client, place: Place, message: Payload) -> Payload:
        """The client's part in a step.

        Raises:
            MaskingError: what the server sends does not fit what it sent before, or asks for more than it may know.
        """
        inside, step = self._inside(place)
        if step == KEYS:
            return self._keys(client, inside)
        if client.store.get(ANSWERED) is not None or CONTEXT not in client.store:
            raise MaskingError("this client has told its shares of this round, or has no part in it")
        if step == SHARES:
            return self._shares(client, inside, message)
        if step == MASKED:
            return self._masked(client, inside, message)
        return self._unmask(client, inside, message)

    def _keys(self, client: Client, inside: Place) -> Payload:
        _forget(client.store)
        secrets = [masking.fresh_secret(), masking.fresh_secret()]
        client.store[SECRETS] = _bytes(*secrets)
        client.store[CONTEXT] = _bytes(_digest(inside))
        return Payload({PUBLIC: _bytes(*map(masking.public_key, secrets))}, {"n": 1})

    def _shares(self, client: Client, inside: Place, message: Payload) -> Payload:
        members, public = message.arrays[MEMBERS], message.arrays[PUBLIC]
        threshold = int(message.meta[THRESHOLD])  # type: ignore[arg-type]
        own = _position(members, client.number)
        if client.store[CONTEXT].tobytes() != _digest(inside):
            raise MaskingError(ELSEWHERE)
        secrets = [row.tobytes() for row in client.store[SECRETS]]
        if [row.tobytes() for row in public[own]] != list(map(masking.public_key, secrets)):
            raise MaskingError("the server sends other keys of this client than it has")
        if len({row.tobytes() for row in public.reshape(-1, KEY_BYTES)}) < 2 * len(members):
            raise MaskingError("the server sends one key for two")
        if not self._least(len(members)) <= threshold <= len(members):
            raise MaskingError(f"{threshold} of {len(members)} clients are not what was agreed on")
        context = _digest(inside, members, public, threshold)
        seed = masking.fresh_secret()
        parts = [masking.split(secret, threshold, len(members)) for secret in (seed, secrets[0])]
        boxes = np.zeros((len(members), BOX_BYTES), dtype=np.uint8)
        for receiver, shares in enumerate(zip(*parts, strict=True)):
            if receiver == own:
                client.store[HELD] = _bytes(*shares)
                continue
            key, about = _box(secrets[1], public[receiver], context, own, receiver)
            boxes[receiver] = np.frombuffer(masking.seal(key, b"".join(shares), about), dtype=np.uint8)
        client.store.update(
            {
                SEED: _bytes(seed),
                CONTEXT: _bytes(context),
                MEMBERS: members.copy(),
                PUBLIC: public.copy(),
                THRESHOLD: np.array(threshold),
            }
        )
        return Payload({BOXES: boxes, HASHES: _bytes(hashlib.sha256(seed).digest())}, {"n": 1})

    def _masked(self, client: Client, inside: Place, message: Payload) -> Payload:
        store, sharers, boxes = client.store, message.arrays[SHARERS], message.arrays[BOXES]
        members, public, threshold, context = _known(store, inside)
        if SHARERS in store:
            raise MaskingError("this client has sent its contribution of this round")
        own = _position(sharers, client.number)
        places = [_position(members, int(sharer)) for sharer in sharers]
        if len(sharers) < threshold:
            raise MaskingError(f"{len(sharers)} clients are too few, {threshold} must take part")
        secrets = [row.tobytes() for row in store[SECRETS]]
        held = np.zeros((len(sharers), 2, SECRET_BYTES), dtype=np.uint8)
        for index, place in enumerate(places):
            if index == own:
                held[index] = store[HELD]
                continue
            key, about = _box(secrets[1], public[place], context, place, places[own])
            try:
                text = masking.opened(key, boxes[index, own].tobytes(), about)
            except MaskingError as error:
                raise MaskingError(f"from client {int(sharers[index])}: {error}") from None
            held[index] = np.frombuffer(text, dtype=np.uint8).reshape(2, SECRET_BYTES)
        plain = _without(message)
        values = self._contribution(client, inside, plain)
        vector = masking.fixed_point(values, self.secure.bits, len(sharers))
        vector += masking.mask(_seed_key(store[SEED].tobytes(), context), len(vector))
        for index, place in enumerate(places):
            if index != own:
                common = _common_mask(secrets[0], public[place, 0].tobytes(), context, len(vector))
                vector += common if index > own else -common
        store.update({SHARERS: sharers.copy(), HELD: held})
        return Payload({MASKED: _to_bytes(vector)}, {"n": 1})

    def _contribution(self, client: Client, inside: Place, message: Payload) -> NDArray[np.float64]:
        """What the client adds to the sum, [L]; the method sees nothing of our own in the client's store."""
        mine = {name: array for name, array in client.store.items() if name.startswith(OWN)}
        known = replace(client, store={name: array for name, array in client.store.items() if name not in mine})
        reply = self.inner.client(known, inside, message)
        client.store.clear()
        client.store.update({**known.store, **mine})
        shapes = self.inner.summed(message, inside)
        parts: Store = {name: np.zeros(shape) for name, shape in shapes.items()}
        if float(reply.meta["n"]) > 0:  # type: ignore[arg-type]
            parts = self.inner.summand(inside, reply)
        return np.concatenate([np.asarray(parts[name], dtype=np.float64).reshape(-1) for name in sorted(shapes)])

    def _unmask(self, client: Client, inside: Place, message: Payload) -> Payload:
        store, survivors = client.store, message.arrays[SURVIVORS]
        _, _, threshold, _ = _known(store, inside)
        if SHARERS not in store:
            raise MaskingError("this client has sent no contribution in this round")
        sharers = store[SHARERS]
        _position(survivors, client.number)
        chosen = [_position(sharers, int(survivor)) for survivor in survivors]
        if len(survivors) < threshold:
            raise MaskingError(f"{len(survivors)} clients are too few, {threshold} must be left")
        # Of a survivor its seed, of the others their mask secret: with both there is nothing left that masks.
        kind = np.ones(len(sharers), dtype=np.int64)
        kind[chosen] = 0
        told = store[HELD][np.arange(len(sharers)), kind]
        _forget(store)
        store[ANSWERED] = np.array(True)
        return Payload({SHARES: told}, {"n": 1})

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        inside, step = self._inside(place)
        if step == KEYS:
            reason = misfit(reply, {PUBLIC: ((2, KEY_BYTES), "uint8")})
            return reason or self._weak(reply.arrays[PUBLIC])
        if step == SHARES:
            size = len(state.arrays[MEMBERS])
            return misfit(reply, {BOXES: ((size, BOX_BYTES), "uint8"), HASHES: ((1, 32), "uint8")})
        if step == MASKED:
            length = sum(math.prod(shape) for shape in self.inner.summed(_without(state), inside).values())
            return misfit(reply, {MASKED: ((8 * length,), "uint8")})
        return misfit(reply, {SHARES: ((len(state.arrays[SHARERS]), SECRET_BYTES), "uint8")})

    def _weak(self, public: Bytes) -> str:
        """Why public keys are of no use to the others, or nothing."""
        if public[0].tobytes() == public[1].tobytes():
            return "the keys for masks and for boxes are the same"
        try:
            for row in public:
                masking.agreed(masking.fresh_secret(), row.tobytes())
        except MaskingError as error:
            return str(error)
        return ""

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        """The server after a step; the last one gives the method one reply, made of the sum.

        Raises:
            RoundLost: shares that do not belong to what was sent before, a sum of no samples, or one that the method
                has an objection to.
        """
        inside, step = self._inside(place)
        clients = np.array([reply.client for reply in replies], dtype=np.int64)
        if step == UNMASK:
            return self._unmasked(state, inside, replies)
        own = {name: array for name, array in state.arrays.items() if name.startswith(OWN)}
        threshold = state.meta.get(THRESHOLD, 0)
        if step == KEYS:
            threshold = self._least(len(self.inner.coming(_without(state), inside)))
            public = np.stack([reply.payload.arrays[PUBLIC] for reply in replies])
            # A key that two have sent is of use to neither.
            rows = [[row.tobytes() for row in keys] for keys in public]
            times = Counter(key for keys in rows for key in keys)
            kept = [index for index, keys in enumerate(rows) if all(times[key] == 1 for key in keys)]
            if len(kept) < threshold:
                raise RoundLost("too many clients have sent the same keys")
            own = {MEMBERS: clients[kept], PUBLIC: public[kept]}
        elif step == SHARES:
            places = [_position(own[MEMBERS], int(client)) for client in clients]
            own |= {
                SHARERS: clients,
                BOXES: np.stack([reply.payload.arrays[BOXES][places] for reply in replies]),
                HASHES: np.concatenate([reply.payload.arrays[HASHES] for reply in replies]),
            }
        else:
            del own[BOXES]
            total = sum((_words(reply.payload.arrays[MASKED]) for reply in replies), start=np.uint64(0))
            own |= {SURVIVORS: clients, TOTAL: np.asarray(total).view(np.int64)}
        plain = _without(state)
        meta = {**plain.meta, DONE: _name(inside, step), THRESHOLD: threshold}
        return Payload({**plain.arrays, **own}, meta)

    def _unmasked(self, state: Payload, inside: Place, replies: Sequence[Reply]) -> Payload:
        plain = _without(state)
        words = self._sum(state, inside, replies)
        total, start = Store(), 0
        values = masking.real_numbers(words, self.secure.bits)
        for name, shape in sorted(self.inner.summed(plain, inside).items()):
            stop = start + math.prod(shape)
            total[name], start = values[start:stop].reshape(shape), stop
        if total["n"] < 1:
            raise RoundLost("no samples stand behind the sum")
        reply = self.inner.of_sum(plain, inside, total)
        reason = check_finite(reply) or check_bounded(reply)
        reason = f"{reason} is too large" if reason else self.inner.objection(plain, inside, reply)
        if reason:
            raise RoundLost(f"the sum is of no use, so a client contributed nonsense: {reason}")
        return self.inner.aggregate(plain, inside, [Reply(NOBODY, reply)])

    def _sum(self, state: Payload, inside: Place, replies: Sequence[Reply]) -> Words:
        """The sum of the survivors' contributions, [L]: what is left when all masks are taken off that did not cancel.

        Raises:
            RoundLost: shares that do not give what was promised.
        """
        members, public, sharers = state.arrays[MEMBERS], state.arrays[PUBLIC], state.arrays[SHARERS]
        survivors, threshold = set(state.arrays[SURVIVORS].tolist()), int(state.meta[THRESHOLD])  # type: ignore[arg-type]
        context = _digest(inside, members, public, threshold)
        total = np.array(state.arrays[TOTAL]).view(np.uint64)
        tellers = replies[:threshold]
        places = [_position(members, reply.client) for reply in tellers]
        for index, client in enumerate(sharers.tolist()):
            told = {
                place: reply.payload.arrays[SHARES][index].tobytes()
                for place, reply in zip(places, tellers, strict=True)
            }
            secret = masking.joined(told)
            if client in survivors:
                if hashlib.sha256(secret).digest() != state.arrays[HASHES][index].tobytes():
                    raise RoundLost(f"the shares of client {client}'s seed do not belong together")
                total -= masking.mask(_seed_key(secret, context), len(total))
                continue
            if masking.public_key(secret) != public[_position(members, client), 0].tobytes():
                raise RoundLost(f"the shares of client {client}'s mask secret do not belong together")
            for survivor in sorted(survivors):
                key = public[_position(members, survivor), 0].tobytes()
                common = _common_mask(secret, key, context, len(total))
                total -= common if client > survivor else -common
        return total


def _name(inside: Place, step: str) -> str:
    return f"{inside.task.index}.{inside.phase.name}.{inside.round}.{step}"


def _without(payload: Payload) -> Payload:
    """A state or message as the method knows it."""
    arrays = {name: array for name, array in payload.arrays.items() if not name.startswith(OWN)}
    return Payload(arrays, {name: value for name, value in payload.meta.items() if not name.startswith(OWN)})


def _taken(state: Payload, *names: str) -> Store:
    return {name: state.arrays[name] for name in names}


def _forget(store: Store) -> None:
    for name in [name for name in store if name.startswith(OWN)]:
        del store[name]


def _bytes(*rows: bytes) -> Bytes:
    """Rows of bytes, [rows, bytes]."""
    return np.stack([np.frombuffer(row, dtype=np.uint8) for row in rows])


def _to_bytes(words: Words) -> Bytes:
    # As integers they would be taken for an attack: masks leave no number small.
    return words.astype("<u8").view(np.uint8)


def _words(array: Bytes) -> Words:
    return np.frombuffer(array.tobytes(), dtype="<u8").astype(np.uint64)


def _position(clients: Numbers, client: int) -> int:
    """Where a client stands in a list, from 0.

    Raises:
        MaskingError: the list is not sorted, or the client is not in it.
    """
    found = int(np.searchsorted(clients, client))
    if (np.diff(clients) <= 0).any() or found == len(clients) or clients[found] != client:
        raise MaskingError(f"client {client} is not in the server's list")
    return found


def _known(store: Store, inside: Place) -> tuple[Numbers, Bytes, int, bytes]:
    """Members, public keys, threshold and digest of the round in which a client has sent its shares.

    Raises:
        MaskingError: that was another round, or none.
    """
    if SEED not in store:
        raise MaskingError("this client has sent no shares in this round")
    members, public, threshold = store[MEMBERS], store[PUBLIC], int(store[THRESHOLD])
    context = store[CONTEXT].tobytes()
    if context != _digest(inside, members, public, threshold):
        raise MaskingError(ELSEWHERE)
    return members, public, threshold, context


def _box(secret: bytes, other: Bytes, context: bytes, sender: int, receiver: int) -> tuple[bytes, bytes]:
    """Key and purpose of a box, by the secret of one end and the public keys of the other; places in the list."""
    about = context + json.dumps([sender, receiver]).encode()
    return masking.derived(masking.agreed(secret, other[1].tobytes()), "box", about), about


def _digest(inside: Place, *known: Any) -> bytes:
    """32 bytes that stand for a round and, once they are known, its members, public keys and threshold.

    Keys are new in every round, so no two rounds of any run have the same.
    """
    where = [inside.task.index, inside.phase.name, inside.round, *(np.asarray(item).tolist() for item in known)]
    return hashlib.sha256(json.dumps(where).encode()).digest()


def _seed_key(seed: bytes, context: bytes) -> bytes:
    return masking.derived(seed, "own mask", context)


def _common_mask(secret: bytes, public: bytes, context: bytes, length: int) -> Words:
    """The mask of two clients, by the secret of one and the public key of the other."""
    return masking.mask(masking.derived(masking.agreed(secret, public), "common mask", context), length)
