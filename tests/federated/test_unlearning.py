"""A client that leaves is gone from the server, the others are as if it had never been there, and the run is intact."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neurocl.errors import RunError, UserError
from neurocl.federated.config import FederatedConfig
from neurocl.federated.driver import REMOTE, resume_federated, run_federated
from neurocl.federated.exchange import Fault, Outcome, ProcessExchange, SequentialExchange, Stores
from neurocl.federated.fedavg import FedAvg
from neurocl.federated.method import Reply, Samples
from neurocl.federated.partition import PartitionConfig
from neurocl.federated.payload import Payload, encode
from neurocl.federated.tangent import ENTERED, LEDGER, SCALES, Tangent
from neurocl.federated.unlearning import Remaining, default_alpha, largest_scale, remove, unlearn
from neurocl.federated.unlearning_judge import Judge, function_distance, membership_auc
from neurocl.report import group, read_results
from neurocl.runs import RunFolder
from tests.federated.small_problem import config, in_memory

SMALL: dict[str, Any] = {"method": "tangent", "options": {"ledger": True}, "classes_per_task": (4,), "rounds": 2}


@cache
def finished() -> Remaining:
    """A small run with a ledger; nobody may change it."""
    return over(config(**SMALL))


def over(own: FederatedConfig, *faults: Fault, removed: Sequence[int] = ()) -> Remaining:
    plain, _ = in_memory(own, *faults)
    run = Remaining(plain.problem, plain.method, plain.exchange, plain.stores, removed=frozenset(removed))
    run.run()
    return run


def tau(run: Remaining, state: Payload) -> np.ndarray[Any, Any]:
    """The displacement as one vector."""
    assert isinstance(run.method, Tangent)
    return np.concatenate([array.ravel() for array in run.method.tau(state).values()])


def same(one: Payload, other: Payload) -> bool:
    return encode(one) == encode(other)


@pytest.mark.parametrize("mode", ["negation", "global-negation", "ledger"])
def test_with_alpha_zero_tau_stays_and_everything_kept_of_the_client_goes(mode: Any) -> None:
    run = finished()
    state = remove(run, [1], mode=mode, alpha=0.0).state
    np.testing.assert_array_equal(tau(run, state), tau(run, run.state))
    assert any(name.startswith(f"{LEDGER}1.") for name in run.state.arrays)
    assert not any(name.startswith(f"{LEDGER}1.") for name in state.arrays)
    assert state.arrays[ENTERED][1] == 0
    assert run.method.message(state, next(run._schedule())[1]).arrays.keys() == run.method.tau(state).keys()  # type: ignore[attr-defined]


def test_negation_subtracts_what_the_client_learns_alone_from_the_start() -> None:
    run = finished()
    alone = over(config(**SMALL, partition=PartitionConfig(num_clients=3, beta=1.0)), removed=[0, 2])
    assert isinstance(run.method, Tangent)
    removal = remove(run, [1], alpha=0.3)
    moved = (tau(run, run.state) - tau(run, removal.state)) / 0.3
    direction = tau(alone, alone.state)
    # One training of as many epochs, but one AdamW instead of one per round, and half the epochs: alike, not the same.
    assert np.dot(moved, direction) / (np.linalg.norm(moved) * np.linalg.norm(direction)) > 0.8
    assert removal.alphas == {1: 0.3}


def test_global_negation_with_alpha_one_goes_as_far_back_as_the_client_would_go_on() -> None:
    run = finished()
    half, whole = (remove(run, [1], mode="global-negation", alpha=alpha).state for alpha in (0.5, 1.0))
    before = tau(run, run.state)
    np.testing.assert_allclose(2 * (tau(run, half) - before), tau(run, whole) - before, atol=1e-6)


def test_the_ledger_leaves_the_sum_of_the_others() -> None:
    run = finished()
    assert isinstance(run.method, Tangent)
    left = remove(run, [1], mode="ledger")
    others = [run.method.contribution(run.state, client) for client in (0, 2)]
    for name, array in run.method.tau(left.state).items():
        np.testing.assert_allclose(array, others[0][name] + others[1][name], atol=1e-6)
    assert left.alphas == {1: 1.0}


@pytest.mark.parametrize("mode", ["negation", "global-negation", "ledger"])
def test_the_order_of_clients_does_not_matter_to_the_bit(mode: Any) -> None:
    run = finished()
    assert same(remove(run, [0, 2], mode=mode).state, remove(run, [2, 0, 2], mode=mode).state)


@pytest.mark.parametrize("mode", ["negation", "ledger"])
def test_one_after_the_other_is_both_at_once(mode: Any) -> None:
    run = finished()
    both = remove(run, [0, 2], mode=mode, alpha=0.4).state
    for order in ([0, 2], [2, 0]):
        step = Remaining(run.problem, run.method, run.exchange, run.stores)
        step.state = run.state
        for client in order:
            step.state = remove(step, [client], mode=mode, alpha=0.4).state
        np.testing.assert_allclose(tau(run, step.state), tau(run, both), atol=1e-6)
        assert set(step.state.arrays) == set(both.arrays)


def test_a_client_that_never_took_part_leaves_everything_as_it_was() -> None:
    faults = [Fault("drop", client=1, task=0, round=number) for number in (0, 1)]
    run = over(config(**SMALL, max_repeats=0), *faults)
    for mode in ("negation", "global-negation", "ledger"):
        removal = remove(run, [1], mode=mode, alpha=None if mode != "ledger" else 1.0)
        assert same(removal.state, run.state)
        assert (removal.bytes_up, removal.bytes_down) == (0, 0)


def test_a_client_without_samples_leaves_everything_as_it_was() -> None:
    few = PartitionConfig(num_clients=40, beta=0.05, min_per_client=0)
    run = over(config(**SMALL, partition=few))
    counts = [len(run.problem.train_samples(client, run.problem.tasks[0])) for client in range(40)]
    assert 0 in counts
    assert same(remove(run, [counts.index(0)]).state, run.state)


def test_negation_costs_one_displacement_up_and_the_ledger_nothing() -> None:
    run = finished()
    size = 4 * tau(run, run.state).size
    negation, globally, ledger = (remove(run, [1], mode=mode) for mode in ("negation", "global-negation", "ledger"))
    assert size <= negation.bytes_up < size + 40
    assert negation.bytes_down < 40
    assert size <= globally.bytes_up < size + 40
    assert size <= globally.bytes_down < size + 40
    assert (ledger.bytes_up, ledger.bytes_down) == (0, 0)


def test_the_client_works_the_same_in_a_process_of_its_own() -> None:
    run = finished()
    exchange = ProcessExchange(
        type(run.problem)(run.problem.config.model_copy(update={"workers": 1}), run.problem.source), Stores(None)
    )
    try:
        apart = Remaining(run.problem, run.method, exchange, Stores(None))
        apart.state = run.state
        for options in ({"mode": "negation"}, {"mode": "global-negation"}, {"sweep": True}):
            assert same(remove(apart, [1], **options).state, remove(run, [1], **options).state)
    finally:
        exchange.close()


def test_a_client_that_does_not_answer_is_one_line_and_nothing_happens() -> None:
    run = finished()
    before = encode(run.state)
    for kind in ("raise", "nan", "shape"):
        faults = [Fault(kind, client=1, task=0, round=0, phase="removal")]
        lost = Remaining(
            run.problem, run.method, SequentialExchange(run.problem, run.method, Stores(None), faults), Stores(None)
        )
        lost.state = run.state
        with pytest.raises(RunError, match="nothing was removed, client 1") as caught:
            remove(lost, [1])
        assert "\n" not in str(caught.value)
        assert not same(remove(lost, [1], mode="ledger").state, lost.state)
    assert encode(run.state) == before


def test_tasks_that_came_one_after_the_other_are_learnt_again_one_after_the_other() -> None:
    run = over(config(method="tangent"))
    removal = remove(run, [1], alpha=0.2)
    size = 4 * tau(run, run.state).size
    assert 2 * size <= removal.bytes_up < 2 * size + 80
    assert size <= removal.bytes_down < size + 80
    change = tau(run, removal.state) - tau(run, run.state)
    assert np.isfinite(change).all()
    assert change.any()


def test_the_default_alpha_is_the_share_within_bounds() -> None:
    assert [default_alpha(share) for share in (0.0, 0.01, 0.3, 0.9)] == [0.0, 0.1, 0.3, 0.5]
    run = finished()
    assert isinstance(run.method, Tangent)
    removal = remove(run, [0, 1])
    assert removal.alphas == {client: default_alpha(run.method.share(run.state, client)) for client in (0, 1)}


def test_the_sweep_keeps_the_largest_scale_that_the_control_set_allows() -> None:
    right = np.array([100, 101, 96, 94, 95, 80])
    assert largest_scale(right, scales=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0)) == 0.8
    assert largest_scale(np.zeros(3), scales=(0.0, 0.5, 1.0)) == 1.0
    assert SCALES[:3] + SCALES[-1:] == (0.0, 0.05, 0.1, 1.0)


def test_the_sweep_asks_those_who_remain() -> None:
    run = finished()
    removal = remove(run, [1], sweep=True)
    (alpha,) = set(removal.alphas.values())
    retained = []
    for scale in (0.0, alpha, *(larger for larger in SCALES if larger > alpha)):
        predict = run.method.predictor(remove(run, [1], alpha=scale).state, run.problem.tasks[0])
        accuracy = Judge(run.problem, frozenset([1]))(predict)["retain"]
        assert accuracy is not None
        retained.append(accuracy)
    assert retained[1] >= 0.95 * retained[0]
    assert all(accuracy < 0.95 * retained[0] for accuracy in retained[2:])


def test_the_judge_counts_everybody_where_they_belong() -> None:
    run = finished()
    problem, task = run.problem, run.problem.tasks[0]
    answers = {
        tuple(x.flatten().tolist()): int(y) for x, y in zip(*vars(problem.train_samples(1, task)).values(), strict=True)
    }

    def knows_only_client_1(x: torch.Tensor) -> torch.Tensor:
        labels = torch.tensor([answers.get(tuple(row.flatten().tolist()), -1) for row in x])
        return 50.0 * torch.nn.functional.one_hot(labels.clamp(min=0), 10) * (labels >= 0)[:, None]

    found = Judge(problem, frozenset([1]))(knows_only_client_1)
    assert found["forget"] == 100.0
    assert found["membership"] == 1.0
    zeros = [problem.train_samples(client, task).y == 0 for client in (0, 2)]
    # Who knows nothing says 0.
    assert found["retain"] == pytest.approx(100 * float(torch.cat(zeros).float().mean()), abs=1.0)
    gone = Judge(problem, frozenset([1]), frozenset([0]))
    assert len(gone._training(frozenset([2]))) == len(problem.train_samples(2, task))


def test_membership_is_one_half_when_losses_are_alike() -> None:
    losses = torch.tensor([0.1, 0.5, 0.9, math.inf])
    assert membership_auc(losses, losses) == 0.5
    assert membership_auc(torch.tensor([0.1, 0.2]), torch.tensor([0.3, math.inf])) == 1.0
    assert membership_auc(torch.tensor([0.3, 0.3]), torch.tensor([0.3, 0.1])) == 0.25


def test_the_distance_of_functions_is_that_of_probabilities() -> None:
    samples = Samples(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))

    def always(one: float) -> Any:
        return lambda x: torch.tensor([one, 0.0]).expand(len(x), 2)

    assert function_distance(always(1.0), always(1.0), samples, 2) == 0.0
    assert function_distance(always(60.0), always(-60.0), samples, 2) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "fedncm"},
        {"method": "fed3r", "options": {"forgettable": True}},
        {"method": "fedcof", "options": {"then": "none", "forgettable": True}},
        {"method": "tangent-ridge", "options": {"train": "head"}},
    ],
    ids=lambda options: options["method"],
)
def test_exact_removal_is_training_without_the_client(options: dict[str, Any]) -> None:
    run, gold = over(config(**options)), over(config(**options), removed=[1])
    left = remove(run, [1])
    assert left.mode == "exact"
    assert same(left.state, gold.state)
    assert not same(left.state, run.state)
    assert same(remove(run, [0, 1]).state, remove(run, [1, 0]).state)
    assert (left.bytes_up, left.bytes_down) == (0, 0)


def digests(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same small run in a folder."""
    return run_federated(config(**SMALL), out=tmp_path_factory.mktemp("unlearning") / "run")[1]


def test_a_run_is_not_touched_and_the_new_one_is_a_run(kept: Path, tmp_path: Path) -> None:
    before = digests(kept)
    report, path = unlearn(kept, [1], gold=True, repair=True, out=tmp_path / "new")
    assert digests(kept) == before
    assert set(report["accuracy"]) == {"before", "after", "repaired", "gold"}
    assert set(report["distance"]) == {"before", "after", "repaired"} == set(report["weight_distance"])
    assert report["repair_bytes"]["up"] > 0
    assert isinstance(report["over_removed"], bool)
    new = RunFolder.open(path)
    result = new.read_result()
    assert result["unlearning"] == report
    assert result["accuracy"]["class_il"][-1][-1] == pytest.approx(report["accuracy"]["repaired"]["test"])
    checkpoint = new.load_checkpoint()
    assert checkpoint.state["removed"] == [1]
    assert not any(name.startswith(f"{LEDGER}1.") for name in checkpoint.tensors)
    assert checkpoint.tensors[ENTERED][1] == 0
    assert json.loads(new.metrics_path.read_text().splitlines()[-1])["event"] == "unlearning"
    rounds = [record for record in new.read_metrics() if record["event"] == "round"]
    assert len(rounds) == 3
    assert all(1 not in record["clients"] for record in rounds)


def test_the_folder_holds_what_remove_gives(kept: Path, tmp_path: Path) -> None:
    _, path = unlearn(kept, [1], mode="ledger", out=tmp_path / "new")
    tensors = RunFolder.open(path).load_checkpoint().tensors
    wanted = remove(finished(), [1], mode="ledger").state
    assert same(Payload({name: value.numpy() for name, value in tensors.items()}), Payload(wanted.arrays))


def test_gold_is_a_run_that_never_asked_the_client(kept: Path, tmp_path: Path) -> None:
    report, _ = unlearn(kept, [1], mode="ledger", gold=True, out=tmp_path / "new")
    gold = over(config(**SMALL), removed=[1])
    assert isinstance(gold.method, Tangent)
    assert gold.method.share(gold.state, 1) == 0
    predict = gold.method.predictor(gold.state, gold.problem.tasks[0])
    assert report["accuracy"]["gold"] == Judge(gold.problem, frozenset([1]))(predict)


def test_a_second_client_leaves_the_new_run_and_the_first_counts_nowhere(kept: Path, tmp_path: Path) -> None:
    _, first = unlearn(kept, [1], out=tmp_path / "first")
    report, second = unlearn(first, [2], gold=True, sweep=True, out=tmp_path / "second")
    assert RunFolder.open(second).load_checkpoint().state["removed"] == [1, 2]
    alone = over(config(**SMALL), removed=[1, 2])
    predict = alone.method.predictor(alone.state, alone.problem.tasks[0])
    assert report["accuracy"]["gold"] == Judge(alone.problem, frozenset([2]), frozenset([1]))(predict)
    with pytest.raises(UserError, match="client 1 was removed from this run before"):
        unlearn(second, [1])
    with pytest.raises(UserError, match="somebody must remain"):
        unlearn(second, [0])


def test_in_place_changes_the_run_and_deletes_what_the_client_stored(tmp_path: Path) -> None:
    # Nothing in tangent is stored at clients; a file stands for a method that does.
    _, path = run_federated(config(**SMALL), out=tmp_path / "run")
    store = Stores(path / "clients", 2)
    for client in (0, 1):
        store.write(client, {"own": np.full(3, client, dtype=np.float32)})
    store.commit()
    _, where = unlearn(path, [1], mode="ledger", in_place=True)
    assert where == path
    assert [file.name for file in (path / "clients").iterdir()] == ["client-0.safetensors"]
    folder = RunFolder.open(path)
    assert folder.load_checkpoint().state["removed"] == [1]
    assert folder.read_result()["unlearning"]["clients"] == [1]
    assert all(1 not in record["clients"] for record in folder.read_metrics() if record["event"] == "round")
    assert len(list((path / "checkpoint").glob("*.safetensors"))) == 1


def test_a_removal_that_fails_leaves_no_folder(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*arguments: object) -> Payload:
        raise RuntimeError("away")

    monkeypatch.setattr(FedAvg, "client", lost)
    before = digests(kept)
    with pytest.raises(RunError, match="nothing was removed"):
        unlearn(kept, [1], out=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert digests(kept) == before


def test_another_runtime_can_carry_the_messages(kept: Path, tmp_path: Path) -> None:
    asked: list[tuple[str, list[int]]] = []

    def connect(problem: Any, method: Any, stores: Any, folder: Any) -> Any:
        inner = SequentialExchange(problem, method, stores)

        class Watched:
            def __call__(self, place: Any, messages: Any, attempt: int) -> Any:
                asked.append((place.phase.name, sorted(messages)))
                return inner(place, messages, attempt)

            def close(self) -> None:
                inner.close()

        return Watched()

    unlearn(kept, [1], sweep=True, repair=True, out=tmp_path / "new", connect=connect)
    assert asked == [("removal", [1]), ("control", [0, 2]), ("round", [0, 2])]


def test_resuming_keeps_the_client_out_and_the_report_in(kept: Path, tmp_path: Path) -> None:
    report, path = unlearn(kept, [1], mode="ledger", out=tmp_path / "new")
    before = RunFolder.open(path).read_result()
    resume_federated(path)
    after = RunFolder.open(path).read_result()
    assert after["unlearning"] == report
    assert after["accuracy"] == before["accuracy"]
    # A process that is killed after the checkpoint has not written the result yet.
    (path / "result.json").unlink()
    assert resume_federated(path)["unlearning"] == report
    checkpoint = RunFolder.open(path).load_checkpoint()
    assert checkpoint.state["removed"] == [1]
    assert not any(name.startswith(f"{LEDGER}1.") for name in checkpoint.tensors)


def test_rounds_that_are_left_do_not_ask_who_was_removed(kept: Path, tmp_path: Path) -> None:
    _, path = unlearn(kept, [1], mode="ledger", out=tmp_path / "new")
    state = path / "checkpoint" / "state.json"
    document = json.loads(state.read_text())
    document["progress"] |= {"step": 1, "correct": []}
    state.write_text(json.dumps(document))
    resume_federated(path)
    last = [record for record in RunFolder.open(path).read_metrics() if record["event"] == "round"][-1]
    assert last["clients"] == [0, 2]
    checkpoint = RunFolder.open(path).load_checkpoint()
    assert checkpoint.state["removed"] == [1]
    assert checkpoint.tensors[ENTERED][1] == 0


def test_a_run_on_flower_is_refused_in_one_line(kept: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(kept, path)
    (path / REMOTE).mkdir()
    with pytest.raises(UserError, match="ran on Flower") as caught:
        unlearn(path, [1], mode="ledger", out=tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options", [{"mode": "negation"}, {"sweep": True, "mode": "ledger"}], ids=["vector", "votes"])
def test_nonsense_of_a_client_without_samples_is_one_line(options: dict[str, Any]) -> None:
    run = finished()

    class Odd:
        def __call__(self, place: Any, messages: Any, attempt: int) -> Outcome:
            return Outcome([Reply(client, Payload({"odd": np.ones(2)}, {"n": 0})) for client in sorted(messages)], [])

        def close(self) -> None:
            """Nothing was started."""

    odd = Remaining(run.problem, run.method, Odd(), Stores(None))
    odd.state = run.state
    with pytest.raises(RunError, match="malformed"):
        remove(odd, [1], **options)


def test_a_report_tells_a_run_from_the_same_run_without_a_client(kept: Path, tmp_path: Path) -> None:
    _, path = unlearn(kept, [1], mode="ledger", out=tmp_path / "new")
    found, _ = read_results([RunFolder.open(kept), RunFolder.open(path)])
    assert [row.label for row in group(found)] == ["tangent", "tangent, without clients (1,)"]


def test_mistakes_are_one_line(kept: Path, tmp_path: Path) -> None:
    _, plain = run_federated(config(method="fedavg", rounds=1), out=tmp_path / "fedavg")
    _, means = run_federated(config(method="fedncm"), out=tmp_path / "fedncm")
    _, bare = run_federated(config(**{**SMALL, "options": {}}), out=tmp_path / "bare")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.yaml").write_text((kept / "config.yaml").read_text())
    mistakes: tuple[tuple[Path, Sequence[int], dict[str, Any], str], ...] = (
        (tmp_path / "nothing", [1], {}, "is not a run folder"),
        (tmp_path / "half", [1], {}, "is not finished"),
        (kept, [], {}, "no client is named"),
        (kept, [3], {}, "there is no client 3; the run has clients 0 to 2"),
        (kept, [0, 1, 2], {}, "somebody must remain"),
        (kept, [1], {"mode": "exact"}, "possible: negation, global-negation, ledger"),
        (kept, [1], {"alpha": -0.1}, "alpha must be a number from 0 to 2"),
        (kept, [1], {"alpha": 7.0}, "alpha must be a number from 0 to 2, where 1 is the whole vector, got 7"),
        (kept, [1], {"alpha": float("nan")}, "alpha must be a number from 0 to 2"),
        (kept, [1], {"alpha": 0.1, "sweep": True}, "not both"),
        (kept, [1], {"epochs": 0}, "epochs must be at least 1"),
        (kept, [1], {"in_place": True, "out": tmp_path / "x"}, "takes no --out"),
        (kept, [1], {"out": kept}, "holds a run already"),
        (bare, [1], {"mode": "ledger"}, "kept no ledger"),
        (plain, [1], {}, "no client can be removed from this run"),
        (means, [1], {"mode": "negation"}, "impossible with fedncm; possible: exact"),
        (means, [1], {"alpha": 0.5}, "exact removal has no alpha"),
        (means, [1], {"repair": True}, "trains nothing"),
    )
    for path, clients, options, text in mistakes:
        with pytest.raises(UserError) as caught:
            unlearn(path, clients, **{"out": tmp_path / "new", **options} if "in_place" not in options else options)
        assert text in str(caught.value), text
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "new").exists()


SEEDS = (0, 1, 2)
ALPHAS = tuple(step / 20 for step in range(2, 17))


@cache
def outcome(linear: bool, weights: str) -> dict[str, tuple[float, float]]:
    """Forget and retain accuracy, means over seeds, of the models of the small-data comparison.

    Five clients with very different digits; the one that owns most classes leaves.
    """
    rows: dict[str, list[tuple[float, float]]] = {}
    for seed in SEEDS:
        own = FederatedConfig(
            method="tangent",
            options={"linear": linear, "ledger": True, "weights": weights},
            classes_per_task=0,
            partition=PartitionConfig(num_clients=5, beta=0.1, min_per_client=60, seed=seed),
            rounds=10,
            local_epochs=2,
            lr=2e-3,
            seed=seed,
        )
        run = over(own)
        method, task = run.method, run.problem.tasks[0]
        assert isinstance(method, Tangent)
        counts = torch.stack([run.problem.train_samples(client, task).y.bincount(minlength=10) for client in range(5)])
        owned = (counts > 0.6 * counts.sum(dim=0)).sum(dim=1)
        leaving = max(range(5), key=lambda client: (int(owned[client]), int(counts[client].sum())))
        whole = method.tau(remove(run, [leaving], alpha=1.0).state)
        vector = {name: array - whole[name] for name, array in method.tau(run.state).items()}
        share = remove(run, [leaving])
        repaired = Remaining(run.problem, method, run.exchange, run.stores, removed=frozenset([leaving]))
        repaired.state = share.state
        repaired.repair()
        states = {
            "gold": over(own, removed=[leaving]).state,
            "ledger": remove(run, [leaving], mode="ledger").state,
            "repaired": repaired.state,
        }
        for alpha in ALPHAS:
            scaled = {name: alpha * array for name, array in vector.items()}
            states[f"{alpha}"] = method.without(run.state, [leaving], scaled)
        judge = Judge(run.problem, frozenset([leaving]))
        for name, state in states.items():
            found = judge(method.predictor(state, task))
            assert found["forget"] is not None
            assert found["retain"] is not None
            rows.setdefault(name, []).append((found["forget"], found["retain"]))
    return {
        name: (statistics.fmean(pair[0] for pair in found), statistics.fmean(pair[1] for pair in found))
        for name, found in rows.items()
    }


def matched(found: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """Negation at the scale that brings the removed client's data nearest to the model that never saw them."""
    return min((found[f"{alpha}"] for alpha in ALPHAS), key=lambda pair: abs(pair[0] - found["gold"][0]))


@pytest.mark.slow
def test_where_clients_count_alike_one_negation_reaches_the_model_that_never_saw_the_client() -> None:
    found = outcome(linear=True, weights="equal")
    forget, retain = found["gold"]
    reached = [found[f"{alpha}"] for alpha in ALPHAS]
    assert any(abs(own - forget) <= 12 and others >= retain - 4 for own, others in reached)


@pytest.mark.slow
def test_where_clients_count_by_samples_negation_and_one_round_of_the_others_reach_it() -> None:
    # Without the round no alpha does it here: within 12 points of forgetting the others stay 5 to 10 points behind.
    found = outcome(linear=True, weights="samples")
    forget, retain = found["gold"]
    assert abs(found["repaired"][0] - forget) <= 12
    assert found["repaired"][1] >= retain - 4


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["equal", "samples"])
def test_the_ledger_removes_far_more_than_the_client_brought(weights: str) -> None:
    found = outcome(linear=True, weights=weights)
    assert found["ledger"][1] < matched(found)[1] - 15
    assert found["ledger"][0] < found["gold"][0] - 15


@pytest.mark.slow
def test_the_expansion_keeps_the_others_better_than_the_network_itself_at_matched_forgetting() -> None:
    expanded, plain = outcome(linear=True, weights="samples"), outcome(linear=False, weights="samples")
    gaps = [found["gold"][1] - matched(found)[1] for found in (expanded, plain)]
    assert gaps[0] <= gaps[1]
