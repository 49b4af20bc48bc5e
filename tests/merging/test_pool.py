"""A pool of task vectors: composing, specialising, unlearning, and what is on disk."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from neurocl.errors import UserError
from neurocl.merging.lora import LoraLayer
from neurocl.merging.memory import merge
from neurocl.merging.pool import TaskVectorPool, task_vector

State = dict[str, Tensor]


def state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"fc.weight": (4, 5), "fc.bias": (4,), "conv.weight": (3, 2, 2, 2)}
    found = {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**found, "steps": torch.tensor(7)}


def expert(seed: int) -> State:
    """The base with small changes."""
    noise = state(seed)
    return {k: v + 0.01 * noise[k] if v.is_floating_point() else v for k, v in state(0).items()}


@pytest.fixture
def pool() -> TaskVectorPool:
    found = TaskVectorPool(state(0))
    for seed, name in enumerate(("cars", "birds", "digits"), start=1):
        found.add(name, task_vector(found.base, expert(seed)))
    return found


def equal(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def test_one_task_alone_is_its_expert_bit_for_bit(pool: TaskVectorPool) -> None:
    assert equal(pool.compose(["cars"]), expert(1))
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in expert(1).items()}
    other = TaskVectorPool(state(0, torch.bfloat16))
    other.add("cars", task_vector(other.base, half))
    assert equal(other.compose(), half)


def test_composing_is_the_mean_and_with_alpha_the_sum_of_task_arithmetic(pool: TaskVectorPool) -> None:
    models = [expert(seed) for seed in (1, 2, 3)]
    for found, expected in (
        (pool.compose(), merge(pool.base, models, "average")),
        (pool.compose(alpha=3.0), merge(pool.base, models, "task-arithmetic")),
        (pool.compose(weights=[1, 1, 1]), merge(pool.base, models, "task-arithmetic")),
    ):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_equal_tasks_compose_to_that_task() -> None:
    pool = TaskVectorPool(state(0))
    for name in "abc":
        pool.add(name, task_vector(pool.base, expert(1)))
    assert equal(pool.compose(), expert(1))


def test_unlearning_and_learning_again_restores_every_bit(pool: TaskVectorPool) -> None:
    before = pool.compose()
    vector = pool.remove("birds")
    without = pool.compose()
    assert not equal(without, before)
    assert equal(without, pool.compose(["digits", "cars"]))
    pool.add("birds", vector)
    assert equal(pool.compose(), before)


def test_the_order_of_tasks_does_not_matter(pool: TaskVectorPool) -> None:
    weights = {"cars": 0.5, "birds": 0.2, "digits": 0.3}
    found = [pool.compose(order, [weights[n] for n in order]) for order in itertools.permutations(weights)]
    assert all(equal(found[0], other) for other in found[1:])
    by_history = TaskVectorPool(pool.base)
    for name in ("digits", "birds", "cars"):
        by_history.add(name, pool.vector(name))
    assert equal(by_history.compose(), pool.compose())


def test_a_subset_is_the_mean_of_its_members(pool: TaskVectorPool) -> None:
    found = pool.compose(["cars", "digits"])
    expected = merge(pool.base, [expert(1), expert(3)], "average")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_negation_goes_the_other_way(pool: TaskVectorPool) -> None:
    there, back = pool.compose(["cars"], alpha=0.5), pool.negate("cars", alpha=0.5)
    for name, value in pool.base.items():
        if value.is_floating_point():
            torch.testing.assert_close((there[name] + back[name]) / 2, value, rtol=0, atol=1e-7)
    assert torch.equal(back["steps"], pool.base["steps"])


def test_an_empty_pool_is_the_base(pool: TaskVectorPool) -> None:
    assert equal(TaskVectorPool(pool.base).compose(), dict(pool.base))
    assert equal(pool.compose([]), dict(pool.base))
    assert len(pool) == 3
    assert list(pool) == ["birds", "cars", "digits"]


def test_lora_factors_compose_as_their_products_and_ranks_add_up_at_most() -> None:
    torch.manual_seed(0)
    base = {"w": torch.randn(8, 9, dtype=torch.float64), "conv.weight": torch.randn(3, 2, 2, 2, dtype=torch.float64)}
    pool = TaskVectorPool(base)
    layers = [LoraLayer(torch.randn(r, 9).double(), torch.randn(8, r).double(), 0.5 * r) for r in (1, 2)]
    kernel = LoraLayer(torch.randn(1, 8).double(), torch.randn(3, 1).double())
    pool.add("a", {"w": layers[0], "conv.weight": kernel})
    pool.add("b", {"w": layers[1]})
    found = pool.compose(weights=[2.0, -1.0])
    change = found["w"] - base["w"]
    torch.testing.assert_close(change, 2 * layers[0].delta() - layers[1].delta())
    assert int(torch.linalg.matrix_rank(change)) == 3
    torch.testing.assert_close(found["conv.weight"] - base["conv.weight"], 2 * kernel.delta().reshape(3, 2, 2, 2))


def test_what_does_not_fit_is_named(pool: TaskVectorPool) -> None:
    for call, message in (
        (lambda: pool.vector("card"), r"no task 'card'; did you mean 'cars'"),
        (lambda: pool.remove("planes"), "no task 'planes'"),
        (lambda: pool.compose(["cars", "cars"]), "named twice"),
        (lambda: pool.compose(["cars"], [1.0, 2.0]), "2 weights for 1 tasks"),
        (lambda: pool.add("cars", {}), "a task 'cars' already"),
        (lambda: pool.add("../up", {}), "named with letters"),
        (lambda: pool.add("x", {"nothing": torch.ones(1)}), "changes 'nothing', which the base does not have"),
        (lambda: pool.add("x", {"fc.bias": torch.ones(5)}), r"'fc.bias' has shape \[5\], in the base \[4\]"),
        (lambda: pool.add("x", {"fc.bias": torch.full((4,), torch.nan)}), "not finite"),
        (
            lambda: pool.add("x", {"fc.weight": LoraLayer(torch.ones(1, 4), torch.ones(4, 1))}),
            r"\[4, 4\], in the base \[4, 5\]",
        ),
        (lambda: task_vector(pool.base, {}), "in only one of them"),
        (lambda: task_vector(pool.base, {**pool.base, "fc.bias": torch.ones(1)}), r"shape \[4\] in the base"),
    ):
        with pytest.raises(UserError, match=message):
            call()  # type: ignore[no-untyped-call]
    assert pool.names == ["birds", "cars", "digits"]


# ---- on disk


def test_a_saved_pool_composes_the_same_bits(pool: TaskVectorPool, tmp_path: Path) -> None:
    pool.add("lora", {"fc.weight": LoraLayer(torch.ones(1, 5), torch.ones(4, 1), 0.25)})
    pool.save(tmp_path / "pool")
    again = TaskVectorPool.load(tmp_path / "pool", state(0))
    assert again.names == pool.names
    assert equal(again.compose(), pool.compose())


def test_saving_again_writes_only_what_changed_and_removes_what_was_unlearned(
    pool: TaskVectorPool, tmp_path: Path
) -> None:
    pool.save(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    pool.remove("birds")
    pool.add("planes", {"fc.bias": torch.ones(4)})
    pool.save(tmp_path)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert {name.rpartition("-")[0] for name in after} == {"cars", "digits", "planes"}
    assert all(before[name] == time for name, time in after.items() if name in before)
    assert not list(tmp_path.glob(".*"))


def test_a_crash_before_the_index_leaves_the_old_pool(
    pool: TaskVectorPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.save(tmp_path)
    old = pool.compose()
    pool.remove("cars")
    pool.add("cars", task_vector(pool.base, expert(9)))
    import neurocl.merging.pool as module

    whole = module.write_atomically

    def crash(path: Path, data: str | bytes) -> None:
        if path.name == "index.json":
            raise KeyboardInterrupt
        whole(path, data)

    monkeypatch.setattr(module, "write_atomically", crash)
    with pytest.raises(KeyboardInterrupt):
        pool.save(tmp_path)
    assert equal(TaskVectorPool.load(tmp_path, state(0)).compose(), old)


def test_a_pool_is_bound_to_its_base_and_damage_is_named(pool: TaskVectorPool, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a pool of task vectors"):
        TaskVectorPool.load(tmp_path, pool.base)
    pool.save(tmp_path)
    for other in (lambda: TaskVectorPool.load(tmp_path, state(5)), lambda: TaskVectorPool(state(5)).save(tmp_path)):
        with pytest.raises(UserError, match="task vectors of another base"):
            other()  # type: ignore[no-untyped-call]
    file = next(tmp_path.glob("cars-*"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"cars-\w+\.safetensors: damaged"):
        TaskVectorPool.load(tmp_path, pool.base)
    file.unlink()
    with pytest.raises(UserError, match="No such file"):
        TaskVectorPool.load(tmp_path, pool.base)


def test_an_index_cannot_point_outside_its_folder(pool: TaskVectorPool, tmp_path: Path) -> None:
    pool.save(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    index["tasks"]["cars"]["file"] = "../cars.safetensors"
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="table of tasks is damaged"):
        TaskVectorPool.load(tmp_path, pool.base)
