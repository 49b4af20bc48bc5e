"""Bounded changes and noise: what the server computes, what is left of a client, and what the accountant says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from neurocl.errors import UserError
from neurocl.federated.catalog import FEDERATED, method_for, problem_for
from neurocl.federated.config import FederatedConfig
from neurocl.federated.driver import FederatedRun
from neurocl.federated.exchange import Fault, SequentialExchange, Stores
from neurocl.federated.method import Client, FederatedMethod, Phase, Place, Reply
from neurocl.federated.payload import Payload
from neurocl.federated.privacy import KEY, RELEASES, PrivateMethod, averages_only, clipped, epsilon, noisy
from tests.federated.small_problem import config as small_config
from tests.federated.small_problem import in_memory

pytest.importorskip("opacus")


def private(method: str = "fedavg", clients: int = 4, **privacy: Any) -> PrivateMethod:
    config = FederatedConfig(
        method=method,
        privacy={"clip": 0.5, "noise": 1.0, **privacy},
        rounds=1,
        local_epochs=1,
        classes_per_task=5,
        partition={"num_clients": clients},
    )
    made = method_for(problem_for(config))
    assert isinstance(made, PrivateMethod)
    return made


def place(method: FederatedMethod) -> Place:
    return Place(method.problem.tasks[0], Phase("round"), 0)


def answers(method: PrivateMethod, state: Payload, lengths: list[float]) -> tuple[Payload, list[Reply], np.ndarray]:
    """Replies whose changes point along one direction, and that direction (in all arrays together)."""
    message = method.message(state, place(method))
    rng = np.random.default_rng(0)
    direction = {name: rng.standard_normal(array.shape) for name, array in message.arrays.items()}
    norm = math.sqrt(sum(float((array**2).sum()) for array in direction.values()))
    replies = [
        Reply(
            client,
            Payload(
                {
                    name: (array + length * direction[name] / norm).astype(array.dtype)
                    for name, array in message.arrays.items()
                },
                {"n": 1},
            ),
        )
        for client, length in enumerate(lengths)
    ]
    return message, replies, flat(direction) / norm


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(arrays[name], dtype=np.float64).ravel() for name in sorted(arrays)])


def test_the_sum_is_of_changes_no_longer_than_the_norm_over_the_expected_number_of_clients() -> None:
    method = private(noise=1e-9)
    state = method.initial_state()
    message, replies, direction = answers(method, state, [0.1, 0.4, 7.0])
    after = method.aggregate(state, place(method), replies)
    change = flat(dict(after.arrays)) - flat(dict(message.arrays))
    # three of four answered; the third was longer than 0.5
    assert np.allclose(change, direction * (0.1 + 0.4 + 0.5) / 4, atol=1e-6)
    assert after.meta[RELEASES] == 1


def test_one_client_can_move_the_result_by_the_norm_over_the_expected_number_at_most() -> None:
    method = private(noise=1e-9)
    state = method.initial_state()
    _, replies, _ = answers(method, state, [0.2, 0.3, 1e6])
    with_it = flat(dict(method.aggregate(state, place(method), replies).arrays))
    without = flat(dict(method.aggregate(state, place(method), replies[:2]).arrays))
    assert np.linalg.norm(with_it - without) <= 0.5 / 4 * (1 + 1e-4)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_noise_on_the_sum_has_the_deviation_that_is_accounted_whoever_answers(count: int) -> None:
    method = private(noise=2.0)
    state = method.initial_state()
    message, replies, _ = answers(method, state, [0.0] * count)
    change = flat(dict(method.aggregate(state, place(method), replies).arrays)) - flat(dict(message.arrays))
    assert change.std() == pytest.approx(2.0 * 0.5 / 4, rel=0.03)
    assert abs(change.mean()) < 5 * 2.0 * 0.5 / 4 / math.sqrt(len(change))


def test_noise_of_clients_is_on_every_reply_and_not_clipped_away() -> None:
    method = private(noise=2.0, where="client")
    state = method.initial_state()
    message = method.message(state, place(method))
    data = method.problem.train_samples(0, method.problem.tasks[0])
    reply = method.client(Client(0, data, 0), place(method), message)
    noise = flat(dict(reply.arrays)) - flat(dict(message.arrays))
    # a change of norm 0.5 in 25,000 numbers is hardly seen beside noise of deviation 1
    assert noise.std() == pytest.approx(1.0, rel=0.03)
    assert reply.meta == {"n": 1}
    after = flat(dict(method.aggregate(state, place(method), [Reply(0, reply)]).arrays))
    assert np.allclose(after - flat(dict(message.arrays)), noise / 4, atol=1e-5)


def test_a_client_without_samples_answers_like_the_others() -> None:
    method = private(where="client", noise=1.0)
    state = method.initial_state()
    message = method.message(state, place(method))
    samples = method.problem.train_samples(0, method.problem.tasks[0])
    empty = type(samples)(samples.x[:0], samples.y[:0])
    reply = method.client(Client(1, empty, 0), place(method), message)
    full = method.client(Client(1, samples, 0), place(method), message)
    assert reply.meta == full.meta
    assert {name: a.shape for name, a in reply.arrays.items()} == {name: a.shape for name, a in full.arrays.items()}


def test_clipping_keeps_directions_and_short_changes() -> None:
    changes = {"a": np.array([3.0]), "b": np.array([[4.0]])}
    assert clipped(changes, 6.0) is changes
    short = clipped(changes, 1.0)
    assert short["a"][0] == pytest.approx(0.6)
    assert short["b"][0, 0] == pytest.approx(0.8)
    zero = {"a": np.zeros(3)}
    assert np.array_equal(clipped(zero, 1.0)["a"], zero["a"])
    assert np.array_equal(noisy(zero, 0.0, np.random.default_rng(0))["a"], zero["a"])


def test_epsilon_is_at_least_the_exact_one_of_the_gaussian_mechanism_and_not_far_above() -> None:
    from scipy.optimize import brentq
    from scipy.stats import norm

    def excess(eps: float, z: float) -> float:
        return float(norm.cdf(1 / (2 * z) - eps * z) - math.exp(eps) * norm.cdf(-1 / (2 * z) - eps * z)) - 1e-5

    for z, rounds in [(1.0, 1), (4.0, 10), (8.0, 100)]:
        # rounds of noise z are one round of noise z / sqrt(rounds)
        exact = brentq(excess, 0.0, 100.0, args=(z / math.sqrt(rounds),))
        found = epsilon(rounds, z, 1.0, 1e-5)
        assert exact <= found <= 1.25 * exact


def test_epsilon_grows_with_rounds_and_participation_and_falls_with_noise() -> None:
    assert epsilon(0, 1.0, 1.0, 1e-5) == 0.0
    assert epsilon(10, 1.0, 0.1, 1e-5) < epsilon(20, 1.0, 0.1, 1e-5) < epsilon(20, 1.0, 0.5, 1e-5)
    assert epsilon(20, 2.0, 0.5, 1e-5) < epsilon(20, 1.0, 0.5, 1e-5)


def test_only_methods_whose_clients_are_averaged_can_be_private() -> None:
    able = {entry.name for entry in FEDERATED.entries() if averages_only(FEDERATED.load(entry.name))}
    assert {"fedavg", "fedprox", "lora", "ffa-lora", "prompt"} <= able
    assert not able & {"scaffold", "lorm", "fedcof", "hgp", "median", "dolfin", "livar", "fedproto", "ccvr", "fed3r"}
    with pytest.raises(UserError, match="hgp needs more"):
        private("hgp")


def test_a_private_run_reports_what_it_spent_and_resumes_the_count() -> None:
    config = FederatedConfig(
        privacy={"noise": 0.8},
        rounds=2,
        local_epochs=1,
        participation=0.5,
        classes_per_task=5,
        partition={"num_clients": 4},
    )
    problem = problem_for(config)
    method = method_for(problem)
    stores = Stores(None, 0)
    run = FederatedRun(problem, method, SequentialExchange(problem, method, stores, ()), stores)
    result = run.run()
    # Rounds for which nobody threw heads count too: the accountant reckons with them.
    assert result["privacy"]["releases"] == 4
    assert result["privacy"]["epsilon"] == pytest.approx(epsilon(4, 0.8, 0.5, 1e-5))


def test_with_privacy_every_client_throws_a_coin_of_its_own_that_the_seed_does_not_tell() -> None:
    config = FederatedConfig(
        privacy={}, participation=0.3, partition={"num_clients": 50}, classes_per_task=0, rounds=400
    )
    problem = problem_for(config)
    drawn = []
    for _ in range(2):
        method = method_for(problem)
        assert isinstance(method, PrivateMethod)
        state = method.initial_state()
        places = [Place(problem.tasks[0], Phase("round"), number) for number in range(400)]
        drawn.append([method.coming(state, where) for where in places])
        assert drawn[-1] == [method.coming(state, where) for where in places]
    assert drawn[0] != drawn[1]
    sizes = [len(clients) for clients in drawn[0]]
    assert np.mean(sizes) == pytest.approx(15.0, abs=5 * math.sqrt(10.5 / 400))
    assert np.var(sizes) == pytest.approx(10.5, rel=0.45)  # a fixed number would have none


def test_without_noise_worth_the_name_a_private_run_is_fedavg_of_equal_clients() -> None:
    # one round: Adam makes much of the smallest difference in the next
    common: dict[str, Any] = {"rounds": 1, "local_epochs": 1, "classes_per_task": 0, "partition": {"num_clients": 3}}
    states = []
    for extra in ({"privacy": {"noise": 1e-12, "clip": 1e4}}, {"options": {"weights": "equal"}}):
        config = FederatedConfig(**common, **extra)
        problem = problem_for(config)
        method = method_for(problem)
        stores = Stores(None, 0)
        run = FederatedRun(problem, method, SequentialExchange(problem, method, stores, ()), stores)
        run.run()
        states.append(run.state)
    for name, array in states[1].arrays.items():
        assert np.allclose(states[0].arrays[name], array, atol=1e-6)


def moved(method: PrivateMethod, replies: list[Reply] | None = None) -> np.ndarray:
    """What a round changes, by default one to which nobody came."""
    state = method.initial_state()
    after = method.aggregate(state, place(method), replies or [])
    return flat(dict(after.arrays)) - flat(dict(method.message(state, place(method)).arrays))


def test_a_round_to_which_nobody_came_cannot_be_told_from_others() -> None:
    method = private(noise=2.0)
    assert moved(method).std() == pytest.approx(2.0 * 0.5 / 4, rel=0.03)
    run, _ = in_memory(small_config(privacy={"noise": 1.0}, participation=1e-9, rounds=1))
    before = run.method.initial_state()
    assert run.run()["privacy"]["releases"] == 2
    assert not np.array_equal(run.state.arrays["head.weight"], before.arrays["head.weight"])


def test_who_knows_the_seed_cannot_take_the_noise_away() -> None:
    assert not np.allclose(moved(private()), moved(private()))
    assert np.array_equal(moved(private(seeded=True)), moved(private(seeded=True)))
    method = private()
    state = method.initial_state()
    assert KEY in state.meta
    assert KEY not in method.message(state, place(method)).meta
    # A round that is done again after a crash, from the same state, has the same noise.
    first, second = (method.aggregate(state, place(method), []) for _ in range(2))
    assert np.array_equal(flat(dict(first.arrays)), flat(dict(second.arrays)))
    assert method.end_task(first, place(method).task).meta[KEY] == state.meta[KEY]


def test_noise_of_a_client_comes_from_a_key_in_its_store() -> None:
    method = private(where="client")
    state = method.initial_state()
    message = method.message(state, place(method))
    data = method.problem.train_samples(0, method.problem.tasks[0])
    one, other = Client(0, data, 0), Client(0, data, 0)
    replies = [flat(dict(method.client(client, place(method), message).arrays)) for client in (one, one, other)]
    assert np.array_equal(replies[0], replies[1])
    assert not np.allclose(replies[0], replies[2])
    assert one.store[KEY].nbytes == 32


def test_with_noise_of_clients_lost_rounds_count_for_their_replies_were_seen() -> None:
    own = small_config(privacy={"where": "client"}, min_clients=3, max_repeats=0)
    run, _ = in_memory(own, Fault("drop", client=1, task=0, round=0))
    assert run.run()["privacy"]["releases"] == 4


@pytest.mark.parametrize("where", ["server", "client"])
def test_arrays_that_nobody_asked_for_are_not_looked_at(where: str) -> None:
    method = private(where=where)
    state = method.initial_state()
    _, replies, _ = answers(method, state, [0.1, 0.2])
    more = Payload({**replies[0].payload.arrays, "other": np.ones(3)}, {"n": 1})
    assert method.objection(state, place(method), more) == ""
    after = method.aggregate(state, place(method), [Reply(0, more), replies[1]])
    assert np.array_equal(flat(dict(after.arrays)), flat(dict(method.aggregate(state, place(method), replies).arrays)))


@pytest.mark.parametrize(
    ("changes", "text"), [({"participation_per": "task"}, "participation_per"), ({"min_clients": 2}, "min_clients")]
)
def test_what_the_accountant_does_not_cover_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        method_for(problem_for(small_config(privacy={}, participation=0.5, **changes)))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["server", "client"])
@pytest.mark.parametrize(
    "name",
    [
        entry.name
        for entry in FEDERATED.entries()
        if entry.name != "joint" and averages_only(FEDERATED.load(entry.name))
    ],
)
def test_clients_of_a_private_run_send_clipped_changes_and_nothing_else(name: str, where: str) -> None:
    steps = {"steps": 2, "inner_steps": 2, "warm_up": 1, "student_steps": 1}
    options = {"synthesis": steps} if name == "target" else {}
    own = small_config(method=name, options=options, rounds=1, privacy={"noise": 1e-9, "clip": 0.01, "where": where})
    run, _ = in_memory(own)
    inner, seen = run.exchange, []

    def watched(place: Place, messages: Any, attempt: int) -> Any:
        outcome = inner(place, messages, attempt)
        for reply in outcome.replies:
            message, arrays = messages[reply.client], reply.payload.arrays
            assert reply.payload.meta == {"n": 1}
            assert set(arrays) == set(run.method.inner.expected(run.state, place))  # type: ignore[attr-defined]
            seen.append(np.linalg.norm(flat(dict(arrays)) - flat({key: message.arrays[key] for key in arrays})))
        return outcome

    run.exchange = watched  # type: ignore[assignment]
    run.run()
    assert len(seen) == 6
    assert max(seen) <= 0.01 * 1.001
