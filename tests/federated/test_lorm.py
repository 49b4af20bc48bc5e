"""LoRM: rounds and task merges against the published aggregation and least squares, and what must never change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neurocl.federated.exchange import Failure, Fault, client_of, sorted_outcome
from neurocl.federated.lora import FACTOR_A, FACTOR_B, HEAD, layers_of
from neurocl.federated.lorm import TASK_GRAM, Lorm, solved, system, times
from neurocl.federated.method import Reply
from neurocl.federated.payload import Payload
from neurocl.merging.lorm import merge_a, merge_b
from tests.conftest import reference
from tests.federated.adapter_runs import (
    CLIENTS,
    FEATURES,
    HEAD_FLOATS,
    LAYERS,
    at_task,
    by_hand,
    digits_method,
    floats,
    place,
    replies_of,
    run_of,
)

SMALL = {"rounds": 2, "local_epochs": 1}
FULL = {"gram": "full"}
ORACLES = [(factor, alpha) for factor in "AB" for alpha in ("0.0", "0.5", "1.0")]


def lorm(options: dict[str, Any] | None = None, **config: Any) -> Lorm:
    found = digits_method("lorm", options, **(SMALL | config))
    assert isinstance(found, Lorm)
    return found


def toy_state(A: np.ndarray, B: np.ndarray, *, head: tuple[int, int] = (6, 10), factor: str = "b", diag: bool = False):
    """The server of one layer called ``layer`` before its first task, with these factors and a head of zeros."""
    (r, i), o = A.shape, len(B)
    assert B.shape == (o, r)
    gram = np.zeros(i if diag else (i, i))
    arrays = {
        "layer" + FACTOR_A: A.astype(np.float32),
        "layer" + FACTOR_B: B.astype(np.float32),
        "head.weight": np.zeros(head, dtype=np.float32),
        "head.bias": np.zeros(head[0], dtype=np.float32),
        "tasks.numerator.layer": np.zeros((o, i)),
        "tasks.gram.layer": gram,
        "tasks.total.layer": np.zeros((o, i)),
        "gram.layer": gram,
    }
    return Payload(arrays, {"factor": factor, "num_tasks": 0})


class Toy:
    """A random problem: clients with correlated inputs X_k and factors that differ in one of A and B."""

    def __init__(self, seed: int, factor: str = "b", *, K: int = 5, o: int = 15, i: int = 20, r: int = 3) -> None:
        rng = np.random.default_rng(seed)
        self.factor = factor
        mixing = rng.standard_normal((i, i))
        self.inputs = [
            rng.standard_normal((int(rng.integers(30, 60)), i)) @ mixing * rng.uniform(0.3, 3) for _ in range(K)
        ]
        self.grams = np.stack([x.T @ x for x in self.inputs]).astype(np.float32)
        self.A, self.B = rng.standard_normal((r, i)).astype(np.float32), rng.standard_normal((o, r)).astype(np.float32)
        shape = (K, o, r) if factor == "b" else (K, r, i)
        self.factors = rng.standard_normal(shape).astype(np.float32)
        head = rng.standard_normal((K, 40, 10)) @ rng.standard_normal((10, 10))
        self.head_grams = np.einsum("kni,knj->kij", head, head).astype(np.float32)
        self.head = rng.standard_normal((K, 6, 10)).astype(np.float32)
        self.bias = rng.standard_normal((K, 6)).astype(np.float32)
        self.counts = rng.integers(1, 90, K)

    def state(self, *, diag: bool = False) -> Payload:
        return toy_state(self.A, self.B, factor=self.factor, diag=diag)

    def replies(self, *, diag: bool = False) -> list[Reply]:
        suffix = FACTOR_B if self.factor == "b" else FACTOR_A
        return by_hand(
            [
                {
                    "layer" + suffix: self.factors[k],
                    "gram.layer": self.grams[k].diagonal() if diag else self.grams[k],
                    "gram.head": self.head_grams[k],
                    "head.weight": self.head[k],
                    "head.bias": self.bias[k],
                }
                for k in range(len(self.factors))
            ],
            self.counts,
        )

    def merged(self, *, diag: bool = False) -> Payload:
        method = lorm({"gram": "diag" if diag else "full"})
        return method.aggregate(self.state(diag=diag), at_task(6), self.replies(diag=diag))

    def product(self, factor: np.ndarray) -> np.ndarray:
        factor = factor.astype(np.float64)
        return factor @ self.A if self.factor == "b" else self.B @ factor

    def objective(self, factor: np.ndarray) -> float:
        """J = sum_k ||(W - W_k) X_k^T||^2."""
        W = self.product(factor)
        pairs = zip(self.factors, self.inputs, strict=True)
        return sum(float(np.square((W - self.product(own)) @ x.T).sum()) for own, x in pairs)


def trained(payload: Payload, factor: str) -> np.ndarray:
    return payload.arrays["layer" + (FACTOR_B if factor == "b" else FACTOR_A)]


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(("letter", "alpha"), ORACLES)
def test_a_round_is_the_published_one(letter, alpha):
    case = reference(f"federated-lorm/round_{letter}_alpha{alpha}")
    factor = letter.lower()
    state = toy_state(case["A_shared"], case["B_shared"], factor=factor)
    replies = by_hand(
        [
            {
                "layer" + (FACTOR_B if factor == "b" else FACTOR_A): case[f"{letter}_clients"][k],
                "gram.layer": case["grams"][k],
                "gram.head": case["head_grams"][k],
                "head.weight": case["head_W"][k],
                "head.bias": case["head_b"][k],
            }
            for k in range(len(case["num_samples"]))
        ],
        case["num_samples"],
    )
    method, where = lorm(FULL), at_task(6)
    assert all(method.objection(state, where, reply.payload) == "" for reply in replies)
    merged = method.aggregate(state, where, replies)
    for other in "ab":
        close(trained(merged, other), case[f"{other.upper()}_merged"], 1e-5)
    close(trained(merged, factor), case["merged_ref64"], 1e-5)
    close(merged.arrays["head.weight"], case["head_W_merged"], 1e-5)
    close(merged.arrays["head.bias"], case["head_b_merged"], 1e-5)


@pytest.mark.parametrize(("letter", "alpha"), ORACLES)
def test_the_mathematics_of_a_round_is_exact_in_float64(letter, alpha):
    case = reference(f"federated-lorm/round_{letter}_alpha{alpha}")
    grams, A = torch.from_numpy(case["grams"]).double(), torch.from_numpy(case["A_shared"]).double()
    factors = torch.from_numpy(case[f"{letter}_clients"]).double()
    shared = A if letter == "B" else None
    start = torch.from_numpy(case[f"{letter}_shared"]).double()
    product = sum(times(own - start, system(gram, shared)) for own, gram in zip(factors, grams, strict=True))
    assert isinstance(product, Tensor)
    found = start + solved(product, system(grams.sum(0), shared))
    close(found.numpy(), case["merged_ref64"], 1e-8)
    again = merge_b(A, factors, grams) if letter == "B" else merge_a(factors, grams)
    close(found.numpy(), again.numpy(), 1e-8)


@pytest.mark.parametrize("diag", [False, True])
def test_the_merge_of_tasks_is_the_published_one(diag):
    case = reference("federated-lorm/task_merge")
    method, W0 = lorm({"gram": "diag" if diag else "full"}), case["W0"].astype(np.float64)
    state = toy_state(case["A"][0], case["B"][0], diag=diag)
    for index, after in enumerate(case["W_after_each_task"]):
        where = at_task(6, index)
        own = {"layer" + FACTOR_A: case["A"][index], "layer" + FACTOR_B: case["B"][index]}
        grams = [gram.diagonal() if diag else gram for gram in case["grams"][index]]
        asked = type(where)(where.task, method.phases(where.task)[1], 0)
        state = method.aggregate(
            Payload({**state.arrays, **own}, state.meta), asked, by_hand([{"gram.layer": g} for g in grams])
        )
        state = method.end_task(state, where.task)
        merged = W0 + method.change(state, index)["layer"].numpy()
        close(merged, after, 2e-5)
        close(merged, case["W_ref64"][index], 2e-5)


@pytest.mark.parametrize("factor", ["a", "b"])
@pytest.mark.parametrize("seed", range(20))
def test_no_average_answers_more_like_the_clients_than_the_merge(factor, seed):
    toy = Toy(seed, factor)
    best = toy.objective(trained(toy.merged(), factor))
    weights = toy.counts / toy.counts.sum()
    assert best <= toy.objective(toy.factors.mean(0)) * (1 + 1e-9)
    assert best <= toy.objective(np.tensordot(weights, toy.factors, 1)) * (1 + 1e-9)
    rng = np.random.default_rng(seed)
    for scale in (1e-2, 1.0):
        found = trained(toy.merged(), factor)
        assert best <= toy.objective(found + scale * rng.standard_normal(found.shape))


@pytest.mark.parametrize("factor", ["a", "b"])
def test_the_merge_is_the_least_squares_fit_of_all_responses(factor):
    toy = Toy(0, factor)
    # B is fitted to the inputs that A lets through; which B is shared does not matter in a round of A.
    seen = [x @ toy.A.T.astype(np.float64) for x in toy.inputs] if factor == "b" else toy.inputs
    targets = [x @ own.T.astype(np.float64) for x, own in zip(seen, toy.factors, strict=True)]
    fit = np.linalg.lstsq(np.concatenate(seen), np.concatenate(targets), rcond=None)[0].T
    close(trained(toy.merged(), factor), fit, 1e-4)  # the Gram matrices are stored in float32


@pytest.mark.parametrize("diag", [False, True])
def test_the_first_order_condition_holds(diag):
    toy = Toy(1)
    grams = torch.from_numpy(toy.grams).double()
    grams = grams.diagonal(dim1=1, dim2=2) if diag else grams
    A, factors = torch.from_numpy(toy.A).double(), torch.from_numpy(toy.factors).double()
    pairs = list(zip(factors, (system(gram, A) for gram in grams), strict=True))
    B = solved(sum(times(own, H) for own, H in pairs), system(grams.sum(0), A))
    residual = sum(times(B - own, H) for own, H in pairs)
    scale = sum(times(B - own, H).abs() for own, H in pairs)
    assert float((residual.abs() / scale).max()) < 1e-8


@pytest.mark.parametrize("diag", [False, True])
@pytest.mark.parametrize("factor", ["a", "b"])
def test_one_client_is_returned(factor, diag):
    toy = Toy(2, factor, i=12)
    method = lorm({"gram": "diag" if diag else "full"})
    merged = method.aggregate(toy.state(diag=diag), at_task(6), toy.replies(diag=diag)[:1])
    close(trained(merged, factor), toy.factors[0], 1e-6)
    close(merged.arrays["head.weight"], toy.head[0], 1e-6)
    close(merged.arrays["head.bias"], toy.bias[0], 1e-6)


@pytest.mark.parametrize("diag", [False, True])
@pytest.mark.parametrize("factor", ["a", "b"])
def test_equal_grams_give_the_plain_mean(factor, diag):
    toy = Toy(3, factor)
    toy.grams[:], toy.head_grams[:] = toy.grams[0], toy.head_grams[0]
    merged = toy.merged(diag=diag)
    close(trained(merged, factor), toy.factors.mean(0), 1e-5)
    close(merged.arrays["head.weight"], toy.head.mean(0), 1e-5)


@pytest.mark.parametrize("factor", ["a", "b"])
def test_proportional_grams_give_the_mean_weighted_by_their_size(factor):
    toy = Toy(3, factor)
    sizes = np.array([1, 2, 4, 8, 1], dtype=np.float32)
    toy.grams[:] = toy.grams[0] * sizes[:, None, None]
    close(trained(toy.merged(), factor), np.tensordot(sizes / sizes.sum(), toy.factors, 1), 1e-5)


@pytest.mark.parametrize("factor", ["a", "b"])
def test_scaling_all_grams_changes_nothing(factor):
    toy = Toy(4, factor)
    once = trained(toy.merged(), factor)
    toy.grams *= 1024
    np.testing.assert_array_equal(trained(toy.merged(), factor), once)


def test_a_rotation_between_the_factors_changes_no_product():
    toy = Toy(5)
    product = toy.product(trained(toy.merged(), "b"))
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0].astype(np.float32)
    toy.A, toy.B, toy.factors = Q @ toy.A, toy.B @ Q.T, toy.factors @ Q.T
    close(toy.product(trained(toy.merged(), "b")), product, 1e-5)


@pytest.mark.parametrize("diag", [False, True])
@pytest.mark.parametrize("factor", ["a", "b"])
def test_the_order_in_which_replies_arrive_changes_no_bit(factor, diag):
    toy = Toy(6, factor)
    method, once = lorm({"gram": "diag" if diag else "full"}), toy.merged(diag=diag)
    mixed: list[Reply | Failure] = [toy.replies(diag=diag)[index] for index in (3, 0, 4, 2, 1)]
    again = method.aggregate(toy.state(diag=diag), at_task(6), sorted_outcome(mixed).replies)
    for name, array in once.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])


def test_with_diagonals_every_column_of_a_is_a_weighted_mean():
    toy = Toy(7, "a")
    g = np.stack([gram.diagonal() for gram in toy.grams]).astype(np.float64)
    expected = (toy.factors * g[:, None]).sum(0) / g.sum(0)
    close(trained(toy.merged(diag=True), "a"), expected, 1e-6)


@pytest.mark.parametrize("diag", [False, True])
def test_columns_of_inputs_that_nobody_has_stay_as_they_were(diag):
    toy = Toy(8, "a")
    toy.grams[:, 4], toy.grams[:, :, 4] = 0, 0
    np.testing.assert_array_equal(trained(toy.merged(diag=diag), "a")[:, 4], toy.A[:, 4])


def test_the_head_keeps_what_no_feature_reaches():
    toy = Toy(9)
    toy.head_grams[:, 2], toy.head_grams[:, :, 2] = 0, 0
    state = toy.state()
    weight = np.random.default_rng(0).standard_normal((6, 10)).astype(np.float32)
    merged = lorm(FULL).aggregate(
        Payload({**state.arrays, "head.weight": weight}, state.meta), at_task(6), toy.replies()
    )
    np.testing.assert_allclose(merged.arrays["head.weight"][:, 2], weight[:, 2], rtol=1e-6)


@pytest.mark.parametrize("diag", [False, True])
def test_dependent_rows_of_a_and_grams_of_low_rank_are_no_obstacle(diag):
    toy = Toy(10)
    toy.A[2] = toy.A[0]
    merged = trained(toy.merged(diag=diag), "b")
    assert np.isfinite(merged).all()
    assert np.abs(merged).max() < 1e3
    if not diag:
        assert toy.objective(merged) <= toy.objective(toy.factors.mean(0)) * (1 + 1e-6)
    toy = Toy(10, "a")
    toy.inputs = [x[:3] for x in toy.inputs]
    toy.grams = np.stack([x.T @ x for x in toy.inputs]).astype(np.float32)
    merged = trained(toy.merged(), "a")
    assert toy.objective(merged) <= toy.objective(toy.factors.mean(0)) * (1 + 1e-6)


def test_grams_of_nothing_change_nothing():
    for factor in "ab":
        toy = Toy(11, factor)
        toy.grams[:] = 0
        np.testing.assert_array_equal(trained(toy.merged(), factor), toy.A if factor == "a" else toy.B)


def test_rows_of_other_classes_are_masked_out():
    toy = Toy(12)
    where = at_task(6)
    where = type(where)(type(where.task)(1, range(2, 4)), where.phase, 0)
    merged = lorm(FULL).aggregate(toy.state(), where, toy.replies())
    for name in HEAD:
        np.testing.assert_array_equal(merged.arrays[name][[0, 1, 4, 5]], toy.state().arrays[name][[0, 1, 4, 5]])
        assert merged.arrays[name][2:4].any()


def test_the_first_task_alone_is_its_own_module_even_where_nothing_was_seen():
    toy = Toy(13)
    method, state = lorm(FULL), toy.state()
    seen = np.zeros((20, 20))
    seen[3, 3] = 1
    ended = method.end_task(Payload({**state.arrays, "gram.layer": seen}, state.meta), at_task(6).task)
    close(method.change(ended, 0)["layer"].numpy(), toy.B.astype(np.float64) @ toy.A, 1e-12)


def tasks_merged(method: Lorm, modules: list[tuple[np.ndarray, np.ndarray]], grams: list[np.ndarray]) -> np.ndarray:
    state = toy_state(*modules[0], diag=grams[0].ndim == 1)
    for index, ((A, B), gram) in enumerate(zip(modules, grams, strict=True)):
        own = {"layer" + FACTOR_A: A, "layer" + FACTOR_B: B, "gram.layer": gram}
        state = method.end_task(Payload({**state.arrays, **own}, state.meta), at_task(6, index).task)
    return method.change(state, len(modules) - 1)["layer"].numpy()


def test_running_sums_over_tasks_equal_the_formula_for_all_at_once():
    toys = [Toy(seed) for seed in range(4)]
    modules = [(toy.A, toy.B) for toy in toys]
    grams = [toy.grams.astype(np.float64).sum(0) for toy in toys]
    residuals = [B.astype(np.float64) @ A for A, B in modules]
    expected = sum(d @ g for d, g in zip(residuals, grams, strict=True)) @ np.linalg.inv(sum(grams))
    close(tasks_merged(lorm(FULL), modules, grams), expected, 1e-8)
    diagonals = [gram.diagonal() for gram in grams]
    expected = sum(d * g for d, g in zip(residuals, diagonals, strict=True)) / sum(diagonals)
    close(tasks_merged(lorm(), modules, diagonals), expected, 1e-12)


def test_tasks_with_equal_grams_are_averaged():
    toys = [Toy(seed) for seed in range(3)]
    modules = [(toy.A, toy.B) for toy in toys]
    mean = np.mean([B.astype(np.float64) @ A for A, B in modules], axis=0)
    gram = toys[0].grams.astype(np.float64).sum(0)
    close(tasks_merged(lorm(FULL), modules, [gram] * 3), mean, 1e-8)
    close(tasks_merged(lorm(), modules, [gram.diagonal()] * 3), mean, 1e-12)


def test_in_the_middle_of_a_task_the_plain_mean_of_all_modules_is_tested():
    toy = Toy(0)
    method, state = lorm(FULL), toy.state()
    ended = method.end_task(
        Payload({**state.arrays, "gram.layer": toy.grams[0].astype(np.float64)}, state.meta), at_task(6).task
    )
    B = 2 * toy.B
    begun = Payload({**ended.arrays, "layer" + FACTOR_B: B}, ended.meta)
    close(method.change(begun, 1)["layer"].numpy(), 1.5 * toy.B.astype(np.float64) @ toy.A, 1e-6)


def test_uploads_are_as_large_as_the_protocol_says():
    method = lorm({"rank": 4})
    state, both = method.initial_state(), {"b": 0, "a": 1}
    grams = sum(i for _, i in LAYERS.values())
    for factor, axis in both.items():
        state = Payload(state.arrays, {**state.meta, "factor": factor})
        (reply,) = replies_of(method, state, place(method), [0])
        assert (
            floats(reply.payload)
            == 4 * sum(shape[axis] for shape in LAYERS.values()) + grams + FEATURES**2 + HEAD_FLOATS
        )
    (reply,) = replies_of(method, state, place(method, phase=TASK_GRAM), [0])
    assert floats(reply.payload) == grams
    assert floats(method.message(state, place(method))) == 4 * sum(o + i for o, i in LAYERS.values()) + HEAD_FLOATS
    assert floats(method.message(state, place(method, phase=TASK_GRAM))) == 4 * sum(o + i for o, i in LAYERS.values())
    (full,) = replies_of(
        lorm({"gram": "full"}), lorm({"gram": "full"}).initial_state(), place(method, phase=TASK_GRAM), [0]
    )
    assert floats(full.payload) == sum(i * i for _, i in LAYERS.values())


@pytest.mark.parametrize("options", [{}, {"gram": "full", "alpha": 0.5}, {"head_alpha": 0.0, "weights": "equal"}])
def test_products_and_factors_give_the_same_merge_bit_for_bit(options):
    config = {"rounds": 3, "classes_per_task": (2, 2)}
    found = [run_of(lorm({**options, "message": message}, **config)) for message in ("factors", "sums")]
    results = [run.run() for run in found]
    assert results[0]["failures"] == results[1]["failures"] == {}
    first, second = (run.state.arrays for run in found)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_adding_up_the_products_first_gives_the_same_merge():
    method = lorm({"message": "sums"})
    where, state = place(method), method.initial_state()
    replies = replies_of(method, state, where)
    merged = method.aggregate(state, where, replies)
    names = replies[0].payload.arrays
    total = {name: sum(reply.payload.arrays[name].astype(np.float64) for reply in replies) for name in names}
    n = sum(reply.payload.meta["n"] for reply in replies)
    again = method.aggregate(state, where, by_hand([total], [n]))
    for name, array in merged.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])


def test_alpha_zero_sends_diagonals():
    method = lorm({"gram": "full", "alpha": 0.0})
    (reply,) = replies_of(method, method.initial_state(), place(method), [0])
    assert {reply.payload.arrays["gram." + layer].ndim for layer in LAYERS} == {1}


def test_alpha_shrinks_only_what_is_off_the_diagonal():
    found = {}
    for alpha in (1.0, 0.25):
        method = lorm({"gram": "full", "alpha": alpha, "head_alpha": alpha})
        (reply,) = replies_of(method, method.initial_state(), place(method), [0])
        found[alpha] = reply.payload.arrays
    for name in ("gram.backbone.fc1", "gram.head"):
        full, less = found[1.0][name], found[0.25][name]
        np.testing.assert_array_equal(less.diagonal(), full.diagonal())
        off = ~np.eye(len(full), dtype=bool)
        np.testing.assert_allclose(less[off], 0.25 * full[off], rtol=1e-6)


def test_grams_are_sums_over_the_inputs_of_the_adapted_network():
    method = lorm(FULL)
    state = method.initial_state()
    where = place(method, phase=TASK_GRAM)
    (reply,) = replies_of(method, state, where, [1])
    x = method.problem.train_samples(1, where.task).x.double().numpy()
    np.testing.assert_allclose(reply.payload.arrays["gram.backbone.fc1"], x.T @ x, rtol=1e-5)
    assert reply.payload.meta["n"] == len(x)


def test_rounds_alternate_beginning_with_b_and_the_other_factor_is_the_same_for_everybody():
    method = lorm(rounds=4, classes_per_task=(2, 2))
    run = run_of(method)
    seen: list[tuple[int, str]] = []
    original = method.aggregate

    def watched(state: Payload, where: Any, replies: Any) -> Payload:
        after = original(state, where, replies)
        if where.phase.name == "round":
            changed = [
                f
                for f, suffix in (("a", FACTOR_A), ("b", FACTOR_B))
                if (state.arrays["backbone.fc1" + suffix] != after.arrays["backbone.fc1" + suffix]).any()
            ]
            seen.append((where.task.index, "".join(changed)))
        return after

    method.aggregate = watched  # type: ignore[method-assign]
    run.run()
    assert seen == [(task, factor) for task in (0, 1) for factor in "baba"]


@pytest.mark.parametrize("factor", ["a", "b"])
def test_one_factor_may_be_trained_alone(factor):
    method = lorm({"train_matrix": factor}, rounds=3, classes_per_task=(2,))
    start = method.begin_task(method.initial_state(), method.problem.tasks[0])
    run = run_of(method)
    run.run()
    frozen, trained_ = (FACTOR_A, FACTOR_B) if factor == "b" else (FACTOR_B, FACTOR_A)
    for layer in LAYERS:
        assert not start.arrays[layer + trained_].any()
        assert run.state.arrays[layer + trained_].any()
        np.testing.assert_array_equal(run.state.arrays[layer + frozen], start.arrays[layer + frozen])


def test_a_lost_round_does_not_change_whose_turn_it_is():
    method = lorm(rounds=2, classes_per_task=(2,), max_repeats=0)
    run = run_of(method, [Fault("drop", client, 0, 0) for client in range(CLIENTS)])
    run.run()
    assert run.progress.failures == {"dropped": CLIENTS}
    assert run.state.meta["factor"] == "a"
    start = method.initial_state()
    np.testing.assert_array_equal(run.state.arrays["backbone.fc1.lora_A"], start.arrays["backbone.fc1.lora_A"])


def test_lost_task_grams_are_replaced_by_those_of_the_last_round():
    method = lorm(classes_per_task=(2,), max_repeats=0)
    lost = run_of(method, [Fault("drop", client, 0, 0, TASK_GRAM) for client in range(CLIENTS)])
    whole = run_of(method)
    lost.run()
    whole.run()
    for layer in LAYERS:
        close(lost.state.arrays["tasks.gram." + layer], whole.state.arrays["tasks.gram." + layer], 0.5)
        assert lost.state.arrays["tasks.gram." + layer].any()


def test_clients_that_drop_out_leave_no_trace():
    method = lorm(rounds=1, classes_per_task=(2,))
    run = run_of(method, [Fault("drop", 1, 0, 0), Fault("nan", 3, 0, 0), Fault("drop", 0, 0, 0, TASK_GRAM)])
    run.run()
    assert run.progress.failures == {"dropped": 2, "not-finite": 1}
    state = method.begin_task(method.initial_state(), method.problem.tasks[0])
    where, last = place(method), place(method, phase=TASK_GRAM)
    state = method.aggregate(state, where, replies_of(method, state, where, [0, 2, 4]))
    state = method.aggregate(state, last, replies_of(method, state, last, [1, 2, 3, 4]))
    state = method.end_task(state, where.task)
    for name, array in state.arrays.items():
        np.testing.assert_array_equal(array, run.state.arrays[name])


def test_a_client_without_samples_says_so():
    method = lorm()
    for phase in ("round", TASK_GRAM):
        where = place(method, phase=phase)
        message = method.message(method.initial_state(), where)
        client = client_of(method.problem, 0, where, {})
        empty = type(client)(0, type(client.data)(client.data.x[:0], client.data.y[:0]), 0)
        assert method.client(empty, where, message).meta == {"n": 0}


def test_replies_that_cannot_be_merged_are_refused_by_name():
    method = lorm()
    where, state = place(method), method.initial_state()
    good = replies_of(method, state, where, [0])[0].payload
    assert method.objection(state, where, good) == ""
    name = "gram.backbone.fc1"
    for bad, text in (
        (good.arrays[name][:3], f"{name} has shape [3], expected [64]"),
        (good.arrays[name].astype(np.float64), f"{name} is float64, expected float32"),
        (-good.arrays[name] - 1, f"{name} is no Gram matrix: its diagonal has negative entries"),
    ):
        assert method.objection(state, where, Payload({**good.arrays, name: bad}, good.meta)) == text
    without = {key: array for key, array in good.arrays.items() if key != "head.bias"}
    assert method.objection(state, where, Payload(without, good.meta)) == "head.bias is missing"


def test_hostile_grams_do_not_stop_the_server():
    method = lorm(FULL)
    where, state = place(method), method.initial_state()
    good = replies_of(method, state, where, [0])[0]
    rng = np.random.default_rng(0)
    wild = {
        name: (1e18 * rng.standard_normal(array.shape)).astype(np.float32) if name.startswith("gram.") else array
        for name, array in good.payload.arrays.items()
    }
    for name, array in wild.items():
        if name.startswith("gram."):
            np.fill_diagonal(array, 0)
    bad = Reply(1, Payload(wild, {"n": 10**15}))
    assert method.objection(state, where, bad.payload) == ""
    assert all(np.isfinite(array).all() for array in method.aggregate(state, where, [good, bad]).arrays.values())


def test_learning_rates_of_the_factors_may_differ():
    method = lorm({"lr_a": 0.25, "lr_b": 0.5, "backbone_lr": 0.1}, lr=0.01)
    assert [method.learning_rate(name) for name in ("x.lora_A", "x.lora_B", "head.bias")] == [0.25, 0.5, 0.01]
    method = lorm({"lr_a": 0.25, "backbone_lr": 0.5}, lr=0.01)
    assert [method.learning_rate(name) for name in ("x.lora_A", "x.lora_B", "head.bias")] == [0.25, 0.005, 0.01]


def test_on_digits_every_merge_answers_more_like_the_clients_than_their_average():
    method = lorm({"gram": "full", "head_alpha": 1.0}, rounds=4, local_epochs=2, classes_per_task=(2, 2), beta=0.1)
    original, ratios = method.aggregate, []

    def watched(state: Payload, where: Any, replies: Any) -> Payload:
        after = original(state, where, replies)
        if where.phase.name == "round":
            for layer in layers_of(state):
                ratios.append(ratio(state, after, replies, layer))
        return after

    def ratio(state: Payload, after: Payload, replies: list[Reply], layer: str) -> float:
        """J of the merge over J of the average weighted by samples."""
        factor = FACTOR_B if state.meta["factor"] == "b" else FACTOR_A
        fixed = state.arrays[layer + (FACTOR_A if factor == FACTOR_B else FACTOR_B)].astype(np.float64)

        def product(own: np.ndarray) -> np.ndarray:
            return own @ fixed if factor == FACTOR_B else fixed @ own

        each = np.stack([reply.payload.arrays[layer + factor] for reply in replies]).astype(np.float64)
        grams = [reply.payload.arrays["gram." + layer].astype(np.float64) for reply in replies]
        n = np.array([reply.payload.meta["n"] for reply in replies])

        def J(own: np.ndarray) -> float:
            changes = [product(own - other) for other in each]
            return sum(float(np.sum((d @ g) * d)) for d, g in zip(changes, grams, strict=True))

        return J(after.arrays[layer + factor].astype(np.float64)) / J(np.tensordot(n / n.sum(), each, 1))

    method.aggregate = watched  # type: ignore[method-assign]
    run_of(method).run()
    assert len(ratios) == 4 * 2 * len(LAYERS)
    assert max(ratios) <= 1 + 1e-6
    assert np.median(ratios) < 0.99


def test_the_first_task_is_learnt_and_its_rows_of_the_head_are_never_touched_again():
    method = lorm(rounds=3, local_epochs=3, classes_per_task=(2, 2), weight_decay=0.1)
    run = run_of(method)
    heads: list[dict[str, np.ndarray]] = []
    original = method.end_task

    def watched(state: Payload, task: Any) -> Payload:
        heads.append({name: state.arrays[name][:2].copy() for name in HEAD})
        return original(state, task)

    method.end_task = watched  # type: ignore[method-assign]
    result = run.run()
    assert result["accuracy"]["class_il"][0][0] >= 90
    for name in HEAD:
        np.testing.assert_array_equal(heads[0][name], heads[1][name])
