"""AdaMerging: its gradient against autograd through the explicit sum, and what its coefficients do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from neurocl.errors import UserError
from neurocl.merging.adamerging import CoefficientMode, ada_merging, mean_entropy
from tests.merging.networks import Mlp, jittered


def case(num_tasks: int = 3) -> tuple[Any, list[Any], list[list[Tensor]]]:
    torch.manual_seed(0)
    base = Mlp().double()
    experts = []
    for seed in range(num_tasks):
        expert = Mlp().double()
        expert.load_state_dict(base.state_dict())
        experts.append(jittered(expert, seed, 0.2))
    return base, experts, [[torch.randn(7, 6, dtype=torch.float64)] for _ in experts]


def by_autograd(
    base: nn.Module,
    experts: list[Any],
    batches: list[list[Tensor]],
    mode: str,
    num_steps: int,
    heads: Any,
    scale: float,
) -> Tensor:
    """The coefficients after Adam steps along gradients through the explicit sum."""
    start = {name: value.detach() for name, value in base.named_parameters()}
    vectors = [{name: dict(e.named_parameters())[name].detach() - v for name, v in start.items()} for e in experts]
    width = len(start) if mode == "layer" else 1
    coefficients = torch.full((len(experts), width), 0.3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([coefficients], lr=0.01)
    for _ in range(num_steps):
        columns = coefficients.expand(-1, len(start))
        merged = {
            name: value + sum(columns[t, index] * vectors[t][name] for t in range(len(experts)))
            for index, (name, value) in enumerate(start.items())
        }
        loss = torch.zeros((), dtype=torch.float64)
        for task, own in enumerate(batches):
            output = functional_call(base, merged, (own[0],))
            if heads is not None:
                output = scale * F.normalize(output, dim=1) @ heads[task].T
            p = output.softmax(dim=1)
            loss = loss - (p * p.log()).sum(dim=1).mean() / len(batches)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return coefficients.detach() if mode == "layer" else coefficients.detach()[:, 0]


@pytest.mark.parametrize("with_heads", [False, True])
@pytest.mark.parametrize("mode", ["layer", "task"])
def test_coefficients_follow_the_gradient_through_the_explicit_sum(mode: CoefficientMode, with_heads: bool) -> None:
    base, experts, batches = case()
    heads = [F.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1) for _ in experts] if with_heads else None
    found = ada_merging(base, experts, batches, heads=heads, logit_scale=5.0, mode=mode, num_steps=8, lr=0.01)
    expected = by_autograd(base, experts, batches, mode, 8, heads, 5.0)
    torch.testing.assert_close(found.coefficients, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found.coefficients, torch.full_like(expected, 0.3), atol=1e-3)


def test_the_network_is_the_base_with_its_share_of_each_task_vector() -> None:
    base, experts, batches = case()
    found = ada_merging(base, experts, batches, num_steps=3, lr=0.05)
    own = [dict(expert.named_parameters()) for expert in experts]
    for index, (name, value) in enumerate(base.named_parameters()):
        change = sum(found.coefficients[t, index] * (own[t][name] - value) for t in range(3))
        torch.testing.assert_close(dict(found.model.named_parameters())[name], value + change)
    assert found.names == tuple(name for name, _ in base.named_parameters())


def test_without_steps_it_is_task_arithmetic_and_the_inputs_stay_as_they_were() -> None:
    base, experts, batches = case()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    found = ada_merging(base, experts, batches, num_steps=0, init=0.5)
    for name, value in found.model.state_dict().items():
        expected = before[name] + 0.5 * sum(expert.state_dict()[name] - before[name] for expert in experts)
        torch.testing.assert_close(value, expected)
        assert torch.equal(base.state_dict()[name], before[name])
    assert found.entropies == ()


def test_entropy_falls_and_every_step_is_told() -> None:
    base, experts, batches = case()
    told: list[tuple[int, int, float]] = []
    found = ada_merging(base, experts, batches, num_steps=60, lr=0.02, progress=lambda *a: told.append(a))
    assert [entry[0] for entry in told] == list(range(1, 61))
    assert found.entropies[-1] < found.entropies[0]
    assert told[-1][2] == found.entropies[-1]


def test_clamped_coefficients_stay_between_zero_and_one() -> None:
    base, experts, batches = case()
    free = ada_merging(base, experts, batches, num_steps=30, lr=0.1).coefficients
    held = ada_merging(base, experts, batches, num_steps=30, lr=0.1, clamp=True).coefficients
    assert bool(((free < 0) | (free > 1)).any())
    assert bool(((held >= 0) & (held <= 1)).all())


def test_one_seed_gives_one_result() -> None:
    base, experts, _ = case()
    batches = [[torch.randn(2, 6, dtype=torch.float64) for _ in range(5)] for _ in experts]
    results = [ada_merging(base, experts, batches, num_steps=4, lr=0.05, seed=s).coefficients for s in (0, 0, 1)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_experts_equal_to_the_base_leave_nothing_to_learn() -> None:
    base, _, batches = case()
    found = ada_merging(base, [base, base, base], batches, num_steps=5)
    assert found.names == ()
    for own, other in zip(found.model.parameters(), base.parameters(), strict=True):
        assert torch.equal(own, other)


def test_running_statistics_are_averaged() -> None:
    networks = [nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(3)]
    for index, network in enumerate(networks):
        network[1].running_mean = torch.full((2,), float(index))
    found = ada_merging(networks[0], networks[1:], [[torch.randn(4, 3)]] * 2, num_steps=2)
    torch.testing.assert_close(found.model[1].running_mean, torch.full((2,), 1.5))  # type: ignore[index]


def test_entropy_is_zero_for_certain_and_log_k_for_undecided_predictions() -> None:
    torch.testing.assert_close(mean_entropy(torch.zeros(3, 5)), torch.tensor(5.0).log())
    assert float(mean_entropy(torch.tensor([[1e4, 0.0]]))) == 0


def test_what_does_not_fit_is_told() -> None:
    base, experts, batches = case()
    with pytest.raises(UserError, match="at least one expert"):
        ada_merging(base, [], [])
    with pytest.raises(UserError, match="2 lists of batches for 3 experts"):
        ada_merging(base, experts, batches[:2])
    with pytest.raises(UserError, match="1 heads for 3 experts"):
        ada_merging(base, experts, batches, heads=[torch.eye(4)])
    with pytest.raises(UserError, match="no batches of task 2"):
        ada_merging(base, experts, [batches[0], [], batches[2]])
    with pytest.raises(UserError, match="expert 2 does not have the parameters"):
        ada_merging(base, [experts[0], Mlp((6, 4)), experts[2]], batches)
