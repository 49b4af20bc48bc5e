"""The server learns the sum and nothing else: the model is that of a plain run, whoever drops out, and masks hold."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from neurocl.cli.federated import config_of
from neurocl.errors import RunError, UserError
from neurocl.federated.catalog import FEDERATED, method_for, problem_for
from neurocl.federated.config import FederatedConfig, PrivacyConfig, SecureSumConfig
from neurocl.federated.driver import FederatedRun
from neurocl.federated.exchange import Fault, client_of
from neurocl.federated.fedavg import FedAvg
from neurocl.federated.method import Place, Reply, RoundLost
from neurocl.federated.partition import PartitionConfig
from neurocl.federated.payload import Payload, check_finite, encode
from neurocl.federated.privacy import averages_only
from tests.federated.broken_runs import assert_a_broken_run_ends_like_an_unbroken_one
from tests.federated.small_problem import config as small_config
from tests.federated.small_problem import in_memory
from tests.federated.test_hostile_replies import OPTIONS, SPOILT, Hostile

pytest.importorskip("cryptography")
pytest.importorskip("Crypto")

from neurocl.federated import masking
from neurocl.federated.masking import MaskingError
from neurocl.federated.secure_sum import (
    BOXES,
    HELD,
    MASKED,
    MEMBERS,
    OWN,
    PUBLIC,
    SECRETS,
    SEED,
    SHARES,
    STEPS,
    SURVIVORS,
    THRESHOLD,
    SecureSum,
    _common_mask,
    _digest,
    _seed_key,
    _words,
)

NUM = 5
SUMMED = sorted(entry.name for entry in FEDERATED.entries() if FEDERATED.load(entry.name).sum_only)
Store = dict[str, NDArray[Any]]


def config(method: str = "fedavg", **changes: Any) -> FederatedConfig:
    """Five clients, two tasks of one round, batches so large that training takes no time."""
    usual: dict[str, Any] = {
        "method": method,
        "options": OPTIONS.get(method, {}),
        "partition": PartitionConfig(num_clients=NUM, beta=1.0),
        "rounds": 1,
        "batch_size": 64,
    }
    return small_config(**(usual | changes))


def summed(own: FederatedConfig, **secure: Any) -> FederatedConfig:
    """The same run with secure summation."""
    return own.model_copy(update={"secure_sum": SecureSumConfig(**secure)})


def assert_same(found: FederatedRun, wanted: FederatedRun, tolerance: float = 1e-6) -> None:
    """Equal states, each array relative to its largest number."""
    assert list(found.state.arrays) == list(wanted.state.arrays)
    for name, array in wanted.state.arrays.items():
        largest = np.abs(array).max(initial=0)
        np.testing.assert_allclose(
            found.state.arrays[name].astype(float), array.astype(float), rtol=0, atol=tolerance * largest, err_msg=name
        )


class ByHand:
    """One round, step by step, with every client's store in sight."""

    def __init__(self, own: FederatedConfig) -> None:
        self.method = method_for(problem_for(summed(own)))
        assert isinstance(self.method, SecureSum)
        self.task = self.method.problem.tasks[0]
        self.places = {
            step: Place(self.task, phase, 0)
            for step, phase in zip(STEPS, self.method.phases(self.task)[: len(STEPS)], strict=True)
        }
        self.stores: dict[int, Store] = {client: {} for client in range(NUM)}
        self.state = self.method.begin_task(self.method.initial_state(), self.task)

    def asked(self, step: str) -> Payload:
        return self.method.message(self.state, self.places[step])

    def ask(self, client: int, step: str, message: Payload | None = None) -> Payload:
        place = self.places[step]
        known = client_of(self.method.problem, client, place, self.stores[client])
        reply = self.method.client(known, place, message or self.asked(step))
        assert not self.method.objection(self.state, place, reply)
        return reply

    def step(self, step: str, without: tuple[int, ...] = ()) -> dict[int, Payload]:
        """Everybody who comes and does not drop out; returns their replies."""
        place = self.places[step]
        replies = {
            client: self.ask(client, step) for client in self.method.coming(self.state, place) if client not in without
        }
        self.state = self.method.aggregate(
            self.state, place, [Reply(client, reply) for client, reply in replies.items()]
        )
        return replies

    def until(self, last: str) -> ByHand:
        for step in STEPS[: STEPS.index(last) + 1]:
            self.step(step)
        return self

    @property
    def context(self) -> bytes:
        inside, _ = self.method._inside(self.places["keys"])
        state = self.state
        return _digest(inside, state.arrays[MEMBERS], state.arrays[PUBLIC], state.meta[THRESHOLD])

    def contribution(self, client: int) -> NDArray[np.uint64]:
        inside, _ = self.method._inside(self.places["masked"])
        known = client_of(self.method.problem, client, inside, {})
        message = self.method.inner.message(self.method.inner.initial_state(), inside)
        values = self.method._contribution(known, inside, message)
        return masking.fixed_point(values, self.method.secure.bits, NUM)

    def common(self, owner: int, other: int, length: int) -> NDArray[np.uint64]:
        secret = self.stores[owner][SECRETS][0].tobytes()
        return _common_mask(secret, self.state.arrays[PUBLIC][other, 0].tobytes(), self.context, length)


def assert_looks_random(words: NDArray[np.uint64]) -> None:
    """Chi-square of every byte of the words against the uniform distribution, 255 degrees of freedom."""
    for byte in range(8):
        counts = np.bincount(words.view(np.uint8)[byte::8], minlength=256)
        expected = len(words) / 256
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert abs(statistic - 255) < 6 * np.sqrt(2 * 255), (byte, statistic)


def looks_random(words: NDArray[np.uint64]) -> bool:
    try:
        assert_looks_random(words)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", ["fedavg", "lora", "fed3r"])
def test_the_model_is_that_of_a_plain_run(name: str) -> None:
    own = config(name, participation=0.8)
    plain, secure = in_memory(own)[0], in_memory(summed(own))[0]
    wanted, found = plain.run(), secure.run()
    assert found["failures"] == {}
    assert_same(secure, plain)
    assert found["accuracy"] == wanted["accuracy"]
    # Numbers of four bytes become words of eight; the rest are keys, shares and boxes.
    steps = 4 * NUM * 2
    assert found["bytes"]["up"] < 2 * wanted["bytes"]["up"] + steps * (NUM * 60 + 100)
    assert found["bytes"]["down"] < wanted["bytes"]["down"] + steps * (NUM**2 * 60 + NUM * 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUMMED)
def test_every_method_that_says_so_works_with_sums_alone(name: str) -> None:
    own = config(name, classes_per_task=(2,))
    plain, secure = in_memory(own)[0], in_memory(summed(own))[0]
    plain.run()
    secure.run()
    if name == "fedncm" or name == "tangent-ridge":  # whose plain states know the clients
        wanted, found = (
            run.method.predictor(run.state, run.problem.tasks[0])(run.problem.test_samples(run.problem.tasks[0]).x)
            for run in (plain, secure)
        )
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    else:
        assert_same(secure, plain)


@pytest.mark.parametrize("name", ["fedavg", "fed3r"])
def test_who_drops_out_before_masking_is_missing_and_who_does_later_is_not(name: str) -> None:
    own = config(name, rounds=2, max_repeats=0)
    inner = "statistics" if name == "fed3r" else "round"
    drops = [("keys", 0, 0, 0), ("shares", 1, 1, 0), ("masked", 2, 0, 1), ("unmask", 3, 1, 1)]
    if name == "fed3r":  # one round per task
        drops = [("masked", 2, 0, 0), ("shares", 4, 1, 0), ("unmask", 3, 1, 0)]
    faults = [Fault("drop", client, task, 0, f"{inner}.{number}.{step}") for step, client, task, number in drops]
    missing = [Fault("drop", client, task, number, inner) for step, client, task, number in drops if step != "unmask"]
    secure, log = in_memory(summed(own, threshold=0.51), *faults)
    plain, _ = in_memory(own, *missing)
    assert secure.run()["failures"] == {"dropped": len(drops)}
    plain.run()
    assert_same(secure, plain)
    asked: dict[Any, set[int]] = {}
    for record in log:
        if record["event"] == "round":
            place = (record["task"], record["phase"].rpartition(".")[0])
            came = set(record["clients"])
            assert came <= asked.get(place, came), "who dropped out was asked again"
            asked[place] = came


@pytest.mark.parametrize("step", STEPS)
def test_below_the_threshold_a_round_is_lost_and_the_next_one_goes_on(step: str) -> None:
    own = config("fedncm", classes_per_task=(2, 2, 2), max_repeats=0)
    faults = [Fault("drop", client, 1, 0, f"statistics.0.{step}") for client in (0, 3)]
    secure, log = in_memory(summed(own), *faults)
    plain, _ = in_memory(own, *(Fault("drop", client, 1, 0, "statistics") for client in range(NUM)))
    secure.run()
    plain.run()
    for run in (secure, plain):
        table = run.state.arrays["told.classes"]
        assert set(table.tolist()) == {0, 1, 4, 5}
    later = STEPS[STEPS.index(step) + 1 :]
    for record in log:
        if record["event"] == "round" and record["task"] == 1 and record["phase"].endswith(later):
            assert record["clients"] == record["failures"] == []


def test_three_lost_rounds_in_a_row_end_the_run_although_their_first_steps_went_well() -> None:
    own = config("fedncm", classes_per_task=(2, 2, 2, 2), max_repeats=0)
    faults = [Fault("raise", client, task, 0, "statistics.0.masked") for client in (0, 1) for task in (1, 2, 3)]
    with pytest.raises(RunError, match=r"3 rounds in a row without enough replies \(client 0 raised"):
        in_memory(summed(own), *faults)[0].run()


def test_steps_that_are_repeated_give_the_same_model() -> None:
    own = config("fedncm")
    faults = [Fault("drop", client, 0, 0, f"statistics.0.{step}") for client in (0, 3) for step in STEPS]
    broken, _ = in_memory(summed(own), *faults)
    whole, _ = in_memory(summed(own))
    assert broken.run()["failures"] == {"dropped": 8}
    whole.run()
    assert encode(broken.state) == encode(whole.state)


def test_what_a_client_sends_has_no_relation_to_what_it_knows() -> None:
    hand = ByHand(config("fed3r")).until("shares")
    sent = {client: _words(reply.arrays[MASKED]) for client, reply in hand.step("masked").items()}
    inputs = {client: hand.contribution(client) for client in sent}
    assert not looks_random(inputs[0])
    for client, words in sent.items():
        assert_looks_random(words)
        assert_looks_random(words - inputs[client])
    # All clients but 0 and 1 tell the server everything, and 1 its seed, too.
    length = len(sent[0])
    known = sent[0] - masking.mask(_seed_key(hand.stores[0][SEED].tobytes(), hand.context), length)
    for other in (2, 3, 4):
        known -= hand.common(other, 0, length)
    assert_looks_random(known)
    assert_looks_random(known - inputs[0])
    # What is left is the mask that 0 has with 1.
    np.testing.assert_array_equal(known - hand.common(1, 0, length), inputs[0])


def test_a_single_contribution_needs_both_its_seed_and_its_mask_secret() -> None:
    hand = ByHand(config("fed3r")).until("shares")
    sent = _words(hand.step("masked")[2].arrays[MASKED])
    store, length = hand.stores[2], len(sent)
    own = masking.mask(_seed_key(store[SEED].tobytes(), hand.context), length)
    common = sum(
        (hand.common(2, other, length) if other > 2 else -hand.common(2, other, length) for other in (0, 1, 3, 4)),
        start=np.uint64(0),
    )
    assert looks_random(sent - own)
    assert looks_random(sent - common)
    np.testing.assert_array_equal(sent - own - common, hand.contribution(2))


def test_the_server_has_shares_of_either_secret_of_a_client_and_never_of_both() -> None:
    hand = ByHand(config("fed3r")).until("shares")
    before = {client: {name: array.copy() for name, array in store.items()} for client, store in hand.stores.items()}
    hand.step("masked", without=(1,))
    held = {client: hand.stores[client][HELD].copy() for client in (0, 2, 3, 4)}
    saved = hand.state
    replies = {client: hand.ask(client, "unmask").arrays[SHARES] for client in (0, 2, 3, 4)}
    for client, told in replies.items():
        for place in range(NUM):
            kind = 1 if place == 1 else 0
            np.testing.assert_array_equal(told[place], held[client][place, kind])
            assert told[place].tobytes() != held[client][place, 1 - kind].tobytes()
    # Nothing that the server has kept or sent holds a secret in the open.
    seen = encode(saved) + b"".join(encode(hand.method.message(saved, place)) for place in hand.places.values())
    for store in before.values():
        for secret in [*store[SECRETS], store[SEED][0]]:
            assert secret.tobytes() not in seen
    total = sum((hand.contribution(client) for client in replies), start=np.uint64(0))
    inside, _ = hand.method._inside(hand.places["unmask"])
    found = hand.method._sum(
        saved, inside, [Reply(client, Payload({SHARES: told})) for client, told in replies.items()]
    )
    np.testing.assert_array_equal(found, total)


def test_fewer_shares_than_the_threshold_tell_nothing() -> None:
    secret = masking.fresh_secret()
    shares = masking.split(secret, 3, 5)
    for places in ((0, 1, 2), (4, 2, 1), (0, 3, 4)):
        assert masking.joined({place: shares[place] for place in places}) == secret
    assert masking.joined({0: shares[0], 4: shares[4]}) != secret
    assert len(set(shares)) == 5


def test_a_client_answers_once() -> None:
    hand = ByHand(config("fedncm")).until("masked")
    first = hand.ask(0, "unmask")
    fewer = Payload({SURVIVORS: np.array([0, 1, 2, 3])})
    for message in (fewer, None):
        with pytest.raises(MaskingError, match="has told its shares of this round"):
            hand.ask(0, "unmask", message)
    assert {name for name in hand.stores[0] if name.startswith(OWN)} == {OWN + "answered"}
    assert first.arrays[SHARES].shape == (NUM, masking.SECRET_BYTES)
    # A new round is another matter.
    hand.ask(0, "keys")


@pytest.mark.parametrize(
    ("survivors", "words"),
    [
        ([0, 1, 2], "3 clients are too few, 4 must be left"),
        ([1, 2, 3, 4], "client 0 is not in the server's list"),
        ([0, 1, 2, 7], "client 7 is not in the server's list"),
        ([0, 1, 1, 2], "not in the server's list"),
        ([0, 3, 2, 1], "not in the server's list"),
    ],
)
def test_a_client_refuses_a_list_of_survivors_that_cannot_be(survivors: list[int], words: str) -> None:
    hand = ByHand(config("fedncm")).until("masked")
    with pytest.raises(MaskingError, match=words):
        hand.ask(0, "unmask", Payload({SURVIVORS: np.array(survivors)}))


def changed(message: Payload, name: str, place: tuple[int, ...], value: Any = None) -> Payload:
    array = np.array(message.arrays[name])
    array[place] = (array[place] ^ 1) if value is None else value
    return Payload({**message.arrays, name: array}, message.meta)


def test_a_box_that_was_changed_or_meant_for_somebody_else_is_refused() -> None:
    hand = ByHand(config("fedncm")).until("shares")
    message = hand.asked("masked")
    boxes = message.arrays[BOXES]
    for spoilt in (
        changed(message, BOXES, (3, 0, 20)),
        changed(message, BOXES, (3, 0), boxes[3, 1]),
        changed(message, BOXES, (3, 0), boxes[2, 0]),
        changed(message, BOXES, (3, 0), boxes[0, 3]),
    ):
        with pytest.raises(MaskingError, match="a sealed share was changed"):
            hand.ask(0, "masked", spoilt)
    hand.ask(0, "masked")
    with pytest.raises(MaskingError, match="has sent its contribution"):
        hand.ask(0, "masked")


def test_a_client_refuses_keys_and_thresholds_that_are_not_what_was_agreed_on() -> None:
    hand = ByHand(config("fedncm")).until("keys")
    message = hand.asked("shares")
    public = message.arrays[PUBLIC]
    for spoilt, words in (
        (changed(message, PUBLIC, (0, 0, 5)), "other keys of this client"),
        (changed(message, PUBLIC, (2,), public[1]), "one key for two"),
        (changed(message, PUBLIC, (2, 1), 0), "agree on the same key with everybody"),
        (Payload(message.arrays, {THRESHOLD: 2}), "2 of 5 clients are not what was agreed on"),
        (Payload({MEMBERS: message.arrays[MEMBERS][1:], PUBLIC: public[1:]}, message.meta), "client 0 is not in"),
    ):
        with pytest.raises(MaskingError, match=words):
            hand.ask(0, "shares", spoilt)
    hand.ask(0, "shares")
    hand = ByHand(config("fedncm")).until("keys")
    # Of another round.
    later = Place(hand.method.problem.tasks[1], hand.places["shares"].phase, 0)
    with pytest.raises(MaskingError, match="another round"):
        hand.method.client(client_of(hand.method.problem, 0, later, hand.stores[0]), later, message)


def test_secrets_do_not_come_from_the_seed_and_last_one_round() -> None:
    stores = [ByHand(config("fedncm")).until("shares").stores[0] for _ in range(2)]
    for name in (SECRETS, SEED):
        assert not np.array_equal(stores[0][name], stores[1][name])
    hand = ByHand(config("fedncm")).until("unmask")
    assert not any(name.startswith(OWN) for name in hand.state.arrays)
    assert all(set(store) == {OWN + "answered"} for store in hand.stores.values())


@pytest.mark.parametrize("step", STEPS)
def test_a_server_survives_what_a_client_sends_in_a_step(step: str) -> None:
    class InStep(Hostile):
        def __call__(self, place: Place, messages: Mapping[int, Payload], attempt: int) -> Any:
            if place.phase.name.endswith(step):
                return super().__call__(place, messages, attempt)
            return self.inner(place, messages, attempt)

    rng = np.random.default_rng(0)
    kinds: dict[str, Callable[[Payload], Payload]] = {
        **SPOILT,
        "random": lambda payload: Payload(
            {name: rng.integers(0, 256, array.shape).astype(np.uint8) for name, array in payload.arrays.items()},
            payload.meta,
        ),
    }
    own = summed(config("fedncm", classes_per_task=(2,), max_repeats=0))
    for kind, spoil in kinds.items():
        run, _ = in_memory(own)
        run.exchange = InStep(run.exchange, spoil)  # type: ignore[assignment]
        run.run()
        assert check_finite(run.state) is None, kind
        assert not any(np.abs(array).max(initial=0) > 1e18 for array in run.state.arrays.values()), kind


def test_shares_that_do_not_belong_together_lose_the_round_instead_of_spoiling_the_sum() -> None:
    for without, words in (((), "client 0's seed"), ((1,), "client 1's mask secret")):
        hand = ByHand(config("fedncm")).until("shares")
        hand.step("masked", without=without)
        lines = [Reply(client, hand.ask(client, "unmask")) for client in hand.state.arrays[SURVIVORS].tolist()]
        place = 1 if without else 0
        lines[2] = Reply(lines[2].client, changed(lines[2].payload, SHARES, (place, 3)))
        with pytest.raises(RoundLost, match=words):
            hand.method.aggregate(hand.state, hand.places["unmask"], lines)


def test_a_round_whose_shares_lie_is_told_in_the_log_and_leaves_the_server_as_it_was() -> None:
    class Lying(Hostile):
        def __call__(self, place: Place, messages: Mapping[int, Payload], attempt: int) -> Any:
            if place.task.index == 1 and place.phase.name.endswith("unmask"):
                return super().__call__(place, messages, attempt)
            return self.inner(place, messages, attempt)

    own = config("fedncm", classes_per_task=(2, 2, 2))
    run, log = in_memory(summed(own))
    run.exchange = Lying(run.exchange, lambda payload: changed(payload, SHARES, (2, 0)))  # type: ignore[assignment]
    run.run()
    told = [record["lost"] for record in log if "lost" in record]
    assert told == ["the shares of client 2's seed do not belong together"]
    assert set(run.state.arrays["told.classes"].tolist()) == {0, 1, 4, 5}


def test_numbers_that_do_not_fit_are_refused_and_all_others_come_back() -> None:
    values = np.array([0.0, 1.5, -2.25, 1e-9, 1e8, -1e8])
    words = masking.fixed_point(values, 32, 8)
    np.testing.assert_allclose(masking.real_numbers(words, 32), values, rtol=0, atol=2.0**-33)
    parts = [masking.fixed_point(np.array([sign * 0.999 * 2.0**30 / 4]), 32, 4) for sign in (1, 1, 1, 1)]
    assert masking.real_numbers(np.add.reduce(parts), 32)[0] == pytest.approx(4 * 0.999 * 2.0**28)
    for bad in (2.0**28, -(2.0**28), 1e300):
        with pytest.raises(MaskingError, match="over 4 clients takes numbers"):
            masking.fixed_point(np.array([bad]), 32, 4)
    for bad in (np.nan, np.inf):
        with pytest.raises(MaskingError, match="NaN and infinity"):
            masking.fixed_point(np.array([bad]), 32, 4)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_that_was_killed_in_any_step_ends_like_an_unbroken_one(tmp_path: Path, after: int) -> None:
    own = summed(config("fedncm"))
    assert_a_broken_run_ends_like_an_unbroken_one(own, tmp_path, after=after)


@pytest.mark.slow
def test_a_killed_run_in_two_processes_ends_like_an_unbroken_one_in_one(tmp_path: Path) -> None:
    own = summed(config("fedavg", workers=2))
    assert_a_broken_run_ends_like_an_unbroken_one(own, tmp_path, after=7)


def test_what_cannot_be_summed_is_one_line() -> None:
    mistakes: tuple[tuple[FederatedConfig, str], ...] = (
        (config("ties"), "ties needs more"),
        (config("scaffold", optimizer="sgd"), "scaffold needs more"),
        (config("local"), "local needs more"),
        (config("joint"), "joint needs more"),
        (config("fedavg", privacy=PrivacyConfig()), "privacy and secure_sum cannot be combined"),
        (config("fedavg", participation=0.2), "two clients or more"),
        (config("fed3r", options={"forgettable": True}), "drop forgettable"),
    )
    for own, words in mistakes:
        with pytest.raises(UserError, match=words):
            method_for(problem_for(summed(own)))
    with pytest.raises(UserError, match="threshold"):
        config_of(None, {}, ["secure_sum.threshold=0.5"], smoke=True)
    assert config_of(None, {"secure_sum": {}}, ["secure_sum.threshold=0.9"], smoke=True).secure_sum.threshold == 0.9
    with pytest.raises(UserError, match="knows only sums"):
        ByHand(config("fedncm")).method.forget(Payload(), 0)


def test_without_the_libraries_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "Crypto.Protocol.SecretSharing", None)
    monkeypatch.delitem(sys.modules, "neurocl.federated.masking")
    with pytest.raises(UserError, match=r"pip install 'neurocl\[secure\]'"):
        importlib.import_module("neurocl.federated.masking")


def test_only_methods_whose_server_adds_say_that_sums_are_enough() -> None:
    others = {"fed3r", "fedncm", "fedproto", "tangent-ridge"}
    able = {entry.name for entry in FEDERATED.entries() if averages_only(FEDERATED.load(entry.name))} - {"joint"}
    assert set(SUMMED) == able | others

    class Louder(FedAvg):
        def aggregate(self, state: Payload, place: Place, replies: Any) -> Payload:
            return super().aggregate(state, place, replies)

    class Farther(FedAvg):
        def epochs(self, place: Place, message: Payload) -> int:
            return 2

    assert not Louder.sum_only
    assert Farther.sum_only


def test_what_a_method_keeps_with_its_clients_is_kept_beside_the_secrets() -> None:
    own = config("derpp")
    plain, secure = in_memory(own)[0], in_memory(summed(own))[0]
    plain.run()
    secure.run()
    assert_same(secure, plain)
    for client in range(NUM):
        kept = {name: array for name, array in secure.stores.read(client).items() if not name.startswith(OWN)}
        wanted = plain.stores.read(client)
        assert kept.keys() == wanted.keys()
        assert all(np.array_equal(kept[name], array) for name, array in wanted.items() if array.dtype.kind != "f")


def test_keys_that_two_have_sent_and_one_key_for_both_uses_are_not_taken() -> None:
    hand = ByHand(config())
    place = hand.places["keys"]
    replies = {client: hand.ask(client, "keys") for client in range(NUM)}
    twice = Payload({PUBLIC: np.stack([replies[0].arrays[PUBLIC][0]] * 2)}, {"n": 1})
    assert "are the same" in hand.method.objection(hand.state, place, twice)
    copied = [Reply(client, replies[0 if client == 1 else client]) for client in range(NUM)]
    with pytest.raises(RoundLost, match="sent the same keys"):
        hand.method.aggregate(hand.state, place, copied)
