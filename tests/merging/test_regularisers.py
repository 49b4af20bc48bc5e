"""Suites of regularised experts: who knows what of whom, what is trained, and that an interrupted suite goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neurocl.devices import Runtime
from neurocl.errors import UserError
from neurocl.merging.ita_iel import EPSILON, Iel, Ita
from neurocl.merging.regularisers import NUM_EXAMPLES, STRENGTHS, regulariser_factory
from neurocl.merging.statistics import Statistics
from neurocl.merging.suite import Suite, SuiteConfig, load_domains, suite_config
from neurocl.merging.tak import Tak, aggregate
from neurocl.merging.training import train_suite

CPU = Runtime(torch.device("cpu"))
TASKS = ("wrapped", "turned", "inverted")  # not the order in which the digits list them


def config(**changes: Any) -> SuiteConfig:
    small = {"width": 8, "depth": 1, "heads": 2, "embed_dim": 4, "pretrain_epochs": 1, "epochs": 1, "tasks": TASKS}
    return suite_config("digits", **{**small, **changes})


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Suite]:
    root = tmp_path_factory.mktemp("suites")
    found = {}
    for name in ("none", "ita", "iel", "tak"):
        own = config(regularise=name)
        found[name] = train_suite(own, root / name, runtime=CPU, regularise=regulariser_factory(own, CPU))
    return found


def build(suites: dict[str, Suite], name: str, task: str, **changes: Any) -> Any:
    factory = regulariser_factory(config(regularise=name, **changes), CPU)
    assert factory is not None
    return factory(suites[name], task)


def stored(suite: Suite, task: str) -> Statistics:
    return Statistics.load(suite.path / "statistics" / f"{task}.safetensors")


def changed(suite: Suite, task: str) -> set[str]:
    return {name for name, value in suite.base.items() if not torch.equal(value, suite.experts[task][name])}


def test_plain_fine_tuning_has_no_regulariser() -> None:
    assert regulariser_factory(config(), CPU) is None


def test_an_unknown_regulariser_and_a_negative_strength_are_told() -> None:
    with pytest.raises(UserError, match="regularise: input should be 'none', 'ita', 'iel' or 'tak', got 'ewc'"):
        config(regularise="ewc")
    with pytest.raises(UserError, match="strength: input should be greater than or equal to 0"):
        config(strength=-1.0)


def test_tasks_come_in_the_order_of_the_configuration() -> None:
    assert tuple(domain.name for domain in load_domains(config())[1]) == TASKS


def test_ita_knows_the_tasks_before(suites: dict[str, Suite]) -> None:
    first, last = build(suites, "ita", "wrapped"), build(suites, "ita", "inverted")
    assert isinstance(last, Ita)
    assert first.strength == STRENGTHS["ita"]
    assert all(float(metric) == pytest.approx(EPSILON) for metric in first.fisher.values())
    earlier = [stored(suites["ita"], task) for task in ("wrapped", "turned")]
    for name, metric in last.fisher.items():
        total: Tensor = sum(part.sum("fisher", name).total for part in earlier)  # type: ignore[assignment]
        torch.testing.assert_close(metric, ((EPSILON + total) / (2 * NUM_EXAMPLES)).float())


def test_iel_knows_the_tasks_before_and_its_own_and_the_sum_of_their_vectors(suites: dict[str, Suite]) -> None:
    suite = suites["iel"]
    last = build(suites, "iel", "inverted", strength=3.0)
    assert isinstance(last, Iel)
    assert last.num_tasks == 3
    assert last.strength == 3.0
    known = Statistics.merged(stored(suite, task) for task in TASKS)
    for name, metric in last.fisher.items():
        torch.testing.assert_close(metric, (EPSILON + known.mean("fisher", name)).float())
        past = suite.experts["wrapped"][name] + suite.experts["turned"][name] - 2 * suite.base[name]
        torch.testing.assert_close(last.past[name], past)


def test_tak_knows_the_factors_of_all_other_tasks(suites: dict[str, Suite]) -> None:
    found = build(suites, "tak", "turned")
    assert isinstance(found, Tak)
    expected = aggregate(stored(suites["tak"], task) for task in ("wrapped", "inverted"))
    assert set(found.curvature.matrices) == set(expected.matrices)
    for name, pair in expected.matrices.items():
        torch.testing.assert_close(found.curvature.matrices[name].a, pair.a.float())
        torch.testing.assert_close(found.curvature.matrices[name].b, pair.b.float())
    assert found.scales["head.weight"] == 0.01
    assert found.scales["norm.weight"] == found.scales["cls_token"] == 10.0
    assert found.scales["blocks.0.mlp.fc1.weight"] == 1.0


def test_experts_differ_from_the_base_where_their_regulariser_looks(suites: dict[str, Suite]) -> None:
    matrices = {f"blocks.0.{layer}.weight" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    everything = set(suites["none"].base)
    tokens = {"pos_embed", "patch_embed.weight", "patch_embed.bias"}
    for task in TASKS:
        assert changed(suites["none"], task) == everything
        assert changed(suites["ita"], task) == matrices
        assert changed(suites["iel"], task) == matrices
        assert changed(suites["tak"], task) == everything - tokens


@pytest.mark.parametrize("name", ["iel", "tak"])
def test_an_interrupted_suite_goes_on_to_the_same_experts(suites: dict[str, Suite], name: str, tmp_path: Path) -> None:
    copy = tmp_path / "suite"
    shutil.copytree(suites[name].path, copy)
    for task in ("turned", "inverted"):
        shutil.rmtree(copy / "experts" / task)
    (copy / "statistics" / "inverted.safetensors").unlink()
    own = config(regularise=name)
    again = train_suite(own, copy, runtime=CPU, regularise=regulariser_factory(own, CPU))
    for task, state in suites[name].experts.items():
        for key, value in state.items():
            assert torch.equal(again.experts[task][key], value), (task, key)
