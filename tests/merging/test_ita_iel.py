"""ITA and IEL: the algebra against the reference arrays, and the identities that training with them must keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neurocl.devices import Runtime, generator_for, seed_everything
from neurocl.errors import UserError
from neurocl.merging.collector import collect
from neurocl.merging.ita_iel import (
    EPSILON,
    Iel,
    Ita,
    decoupled_step,
    fisher_distance,
    iel_fisher,
    iel_gradient,
    ita_fisher,
    ita_gradient,
    jensen_gap,
    linear_weights,
    lora_gradients,
    omega,
    omega_gradient,
    omega_pairwise,
)
from neurocl.merging.statistics import Statistics
from neurocl.merging.suite import logits, network
from neurocl.merging.training import Fit, fit
from tests.merging.networks import Mlp, reference_arrays
from tests.merging.tiny_suite import HOW, head, items, vit

PLACES = [f"{op}_{layer}" for op in ("qkv", "proj", "fc1", "fc2") for layer in (0, 5)]
CPU = Runtime(torch.device("cpu"))


@pytest.fixture(scope="module")
def analytic() -> dict[str, Tensor]:
    return reference_arrays("merging-ita-iel/analytic")


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    return reference_arrays("merging-ita-iel/fisher_reg")


# ---- ensembles to second order


def test_both_forms_of_omega_and_its_gradient_agree_with_the_reference(analytic: dict[str, Tensor]) -> None:
    taus, weights, fisher = analytic["tau"], analytic["w"], analytic["F"]
    for form in (omega, omega_pairwise):
        torch.testing.assert_close(form(taus, weights, fisher), analytic["omega"], rtol=1e-12, atol=0)
    gradient = omega_gradient(taus, weights, fisher)
    torch.testing.assert_close(gradient, analytic["omega_grad"], rtol=1e-12, atol=1e-14)
    taus = taus.clone().requires_grad_(True)
    (by_autograd,) = torch.autograd.grad(omega(taus, weights, fisher), taus)
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-12, atol=1e-14)


def test_omega_is_zero_for_equal_members_and_positive_otherwise(analytic: dict[str, Tensor]) -> None:
    taus, weights, fisher = analytic["tau"], analytic["w"], analytic["F"]
    same = taus[:1].expand(3, -1)
    assert abs(float(omega(same, weights, fisher))) < 1e-12
    assert float(omega_pairwise(same, weights, fisher)) == 0
    assert float(omega(taus, weights, fisher)) > 0


def test_omega_takes_task_vectors_of_any_shape(analytic: dict[str, Tensor]) -> None:
    taus, weights, fisher = analytic["tau"].reshape(3, 4, 6), analytic["w"], analytic["F"].reshape(4, 6)
    torch.testing.assert_close(omega(taus, weights, fisher), analytic["omega"], rtol=1e-12, atol=0)
    torch.testing.assert_close(omega_pairwise(taus, weights, fisher), analytic["omega"], rtol=1e-12, atol=0)
    assert omega_gradient(taus, weights, fisher).shape == taus.shape


def test_the_composed_quadratic_loss_is_below_the_mean_by_the_jensen_gap(analytic: dict[str, Tensor]) -> None:
    taus, weights, hessian = analytic["tau"], analytic["w"], analytic["H"]

    def loss(x: Tensor) -> Tensor:
        return analytic["c"] + analytic["b"] @ x + x @ hessian @ x / 2

    individual = torch.stack([loss(tau) for tau in taus])
    composed = loss(weights @ taus)
    torch.testing.assert_close(individual, analytic["loss_individual"], rtol=1e-12, atol=0)
    torch.testing.assert_close(composed, analytic["loss_composed"], rtol=1e-12, atol=0)
    gap = jensen_gap(taus, weights, hessian)
    torch.testing.assert_close(gap, analytic["jensen_gap"], rtol=1e-12, atol=0)
    torch.testing.assert_close(weights @ individual - composed, gap, rtol=1e-11, atol=0)


def test_the_jensen_gap_of_a_diagonal_bowl_is_omega_and_of_a_saddle_may_be_negative(
    analytic: dict[str, Tensor],
) -> None:
    taus, weights, fisher = analytic["tau"], analytic["w"], analytic["F"]
    torch.testing.assert_close(jensen_gap(taus, weights, fisher.diag()), omega(taus, weights, fisher))
    assert float(jensen_gap(taus, weights, -fisher.diag())) < 0


def test_the_fisher_distance_is_the_quadratic_form_of_the_diagonal(analytic: dict[str, Tensor]) -> None:
    tau, fisher = analytic["tau"][0], analytic["F"]
    torch.testing.assert_close(fisher_distance(tau, fisher), tau @ fisher.diag() @ tau)


# ---- the published regularisers


def published_fisher(arrays: dict[str, Tensor], mode: str, task: int, place: str) -> Tensor:
    sums = [arrays[f"{mode}/task{s}/F_unnorm/{place}"].double() for s in range(task + 1)]
    counts = [int(n) for n in arrays["n_examples"][: task + 1]]
    if mode == "iel":
        return iel_fisher(sums, counts)
    return ita_fisher(sums[:task], counts[:task], compat="reference")


def lora(arrays: dict[str, Tensor], mode: str, task: int, place: str) -> tuple[Tensor, Tensor]:
    return tuple(arrays[f"{mode}/task{task}/{letter}/{place}"][0].double() for letter in "AB")  # type: ignore[return-value]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("task", range(3))
def test_the_metrics_agree_with_the_published_ones(published: dict[str, Tensor], task: int, place: str) -> None:
    tt, alpha = max(2, task + 1), float(published["alpha"])
    ours = published_fisher(published, "ita", task, place)
    theirs = published[f"ita/task{task}/Fscaled/{place}"].double()
    torch.testing.assert_close(alpha * tt * ours.expand_as(theirs), theirs, rtol=1e-6, atol=0)
    theirs = published[f"iel/task{task}/Fhat/{place}"].double()
    torch.testing.assert_close(published_fisher(published, "iel", task, place), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("task", range(3))
@pytest.mark.parametrize("mode", ["ita", "iel"])
def test_the_gradients_of_lora_factors_agree_with_the_published_ones(
    published: dict[str, Tensor], mode: str, task: int, place: str
) -> None:
    a, b = lora(published, mode, task, place)
    fisher, tau = published_fisher(published, mode, task, place), b @ a
    if mode == "ita":
        pull = ita_gradient(tau, fisher, float(published["alpha"]))
    else:
        earlier = (lora(published, mode, s, place) for s in range(task))
        past = sum((own_b @ own_a for own_a, own_b in earlier), torch.zeros_like(tau))
        pull = iel_gradient(tau, past, task + 1, fisher, float(published["beta"]))
    for ours, letter in zip(lora_gradients(pull, a, b), "AB", strict=True):
        theirs = published[f"{mode}/task{task}/grad{letter}/{place}"][0].double()
        error = (ours - theirs).norm() / theirs.norm()
        assert error < 1e-6, f"{letter}: {error}"


def test_the_pull_of_iel_is_as_many_times_the_gradient_of_omega_as_there_are_tasks() -> None:
    torch.manual_seed(0)
    taus, fisher = torch.randn(4, 3, 5, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64)
    expected = 4 * 0.3 * omega_gradient(taus, torch.full((4,), 0.25, dtype=torch.float64), fisher)[-1]
    torch.testing.assert_close(iel_gradient(taus[-1], taus[:-1].sum(0), 4, fisher, 0.3), expected)


def test_samples_are_counted_truly_unless_the_reference_is_asked_for() -> None:
    sums, counts = [torch.full((2,), 6.0), torch.full((2,), 2.0)], [3, 1]
    torch.testing.assert_close(ita_fisher(sums, counts), torch.full((2,), (8.0 + EPSILON) / 4))
    reference = ita_fisher(sums, counts, compat="reference")
    torch.testing.assert_close(reference, torch.full((2,), (8.0 + EPSILON) / 6))
    equal = ita_fisher(sums, [2, 2], compat="reference")
    torch.testing.assert_close(equal, ita_fisher(sums, [2, 2]))
    assert float(ita_fisher([], [])) == EPSILON
    with pytest.raises(ValueError, match="2 Fisher sums with 1 counts"):
        ita_fisher(sums, [1])
    with pytest.raises(ValueError, match="0 Fisher sums"):
        iel_fisher([], [])


def test_the_chain_rule_to_lora_factors_is_that_of_autograd() -> None:
    torch.manual_seed(1)
    a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 5), (4, 2)))
    pull = torch.randn(4, 5, dtype=torch.float64)
    expected = torch.autograd.grad((b @ a * pull).sum(), (a, b))
    for ours, theirs in zip(lora_gradients(pull, a.detach(), b.detach()), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- the decoupled step


def test_the_step_is_clipped_per_tensor_and_scaled_by_the_schedule() -> None:
    pull = torch.tensor([30.0, 40.0])
    torch.testing.assert_close(decoupled_step(pull, 0.5), 0.5 * pull)
    torch.testing.assert_close(decoupled_step(100 * pull, 0.5).norm(), torch.tensor(50.0))
    assert not decoupled_step(torch.zeros(3), 1.0).any()


def test_ita_alone_contracts_every_entry_by_its_fisher_each_step() -> None:
    torch.manual_seed(2)
    fisher, tau = torch.rand(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    ita, moved = Ita({"w": fisher}, 0.3), tau.clone()
    for _ in range(5):
        moved = moved - ita.step({"w": moved}, 1.0)["w"]
    torch.testing.assert_close(moved, (1 - 0.3 * fisher) ** 5 * tau)


def test_an_endless_strength_ends_at_the_point_of_rest_instead_of_flying_off() -> None:
    torch.manual_seed(3)
    tau, past, fisher = (torch.rand(3, 4) + 0.1 for _ in range(3))
    assert not (tau - Ita({"w": fisher}, 1e6).step({"w": tau}, 1.0)["w"]).any()
    iel = Iel({"w": fisher}, {"w": past}, 2, 1e6)
    torch.testing.assert_close(tau - iel.step({"w": tau}, 1.0)["w"], past / 2)


def test_iel_composes_the_uniform_mean() -> None:
    tau, past = torch.rand(2, 2), torch.rand(2, 2)
    iel = Iel({"w": torch.ones(2, 2), "v": torch.ones(2, 2)}, {"w": past}, 2, 1.0)
    composed = iel.compose({"w": tau, "v": tau})
    assert composed is not None
    torch.testing.assert_close(composed["w"], (tau + past) / 3)
    torch.testing.assert_close(composed["v"], tau / 3)


# ---- built from statistics


def fisher_of(module: nn.Module, x: Tensor) -> Statistics:
    return collect(module, [x], kinds=("fisher",))


def test_regularisers_take_the_matrices_of_linear_layers_or_those_asked_for() -> None:
    module = Mlp()
    assert linear_weights(module) == ["fc.0.weight", "fc.1.weight", "fc.2.weight"]
    assert linear_weights(module, ["fc.[12].*"]) == ["fc.1.weight", "fc.2.weight"]
    with pytest.raises(UserError, match=r"no linear layer is named like blocks\.\*"):
        linear_weights(module, ["blocks.*"])
    ita = Ita.of(module, [], parameters=["fc.0.*"])
    assert ita.trains("fc.0.weight")
    assert not ita.trains("fc.0.bias")
    assert not ita.trains("fc.1.weight")


def test_statistics_of_two_halves_regularise_as_those_of_the_whole() -> None:
    torch.manual_seed(4)
    module, x = Mlp().double(), torch.randn(8, 6, dtype=torch.float64)
    halves, whole = [fisher_of(module, x[:3]), fisher_of(module, x[3:])], [fisher_of(module, x)]
    deltas = {name: torch.randn_like(dict(module.named_parameters())[name]) for name in linear_weights(module)}
    for name, pull in Ita.of(module, whole, strength=0.4).step(deltas, 0.7).items():
        torch.testing.assert_close(pull, Ita.of(module, halves, strength=0.4).step(deltas, 0.7)[name])
    built = Iel.of(module, halves, {}, strength=0.4)
    assert built.num_tasks == 2
    torch.testing.assert_close(
        built.fisher["fc.1.weight"], EPSILON + whole[0].mean("fisher", "fc.1.weight"), rtol=1e-12, atol=0
    )


def test_a_missing_fisher_is_named() -> None:
    module = Mlp()
    with pytest.raises(UserError, match=r"no fisher of 'fc\.0\.weight'"):
        Ita.of(module, [Statistics()])


# ---- in the loop


def trained(regulariser: Ita | Iel | None, how: Fit = HOW, **options: bool) -> dict[str, Tensor]:
    seed_everything(0)
    model = network(vit())
    fit(model, items(), head(), how, generator=generator_for(1), runtime=CPU, regulariser=regulariser, **options)
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def start() -> dict[str, Tensor]:
    seed_everything(0)
    return dict(network(vit()).named_parameters())


def metric(value: float) -> dict[str, Tensor]:
    """The same metric for every parameter, so that all are trained."""
    return {name: torch.full_like(own, value) for name, own in start().items()}


def test_without_strength_ita_and_a_first_task_of_iel_are_plain_fine_tuning() -> None:
    plain = trained(None)
    for regulariser in (Ita(metric(1.0), 0.0), Iel(metric(1.0), {}, 0, 0.0)):
        for name, value in trained(regulariser).items():
            torch.testing.assert_close(value, plain[name], rtol=0, atol=1e-7)


def test_an_endless_strength_keeps_the_base() -> None:
    before, after = start(), trained(Ita(metric(1.0), 1e6))
    free = trained(Ita(metric(1.0), 0.0))
    for name, value in after.items():
        held, moved = (value - before[name]).norm(), (free[name] - before[name]).norm()
        assert held <= 0.2 * moved + 1e-7, name


def test_what_has_no_metric_stays_at_the_base_and_can_be_trained_afterwards() -> None:
    seed_everything(0)
    model = network(vit())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    ita = Ita.of(model, [], parameters=["blocks.*"])
    fit(model, items(), head(), HOW, generator=generator_for(1), runtime=CPU, regulariser=ita)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) != ita.trains(name), name
        assert value.requires_grad


def test_a_later_task_of_iel_trains_the_composed_network() -> None:
    """One step of plain gradient descent on tau must be that on the composed loss, which autograd gives directly."""
    before = start()
    past = {name: 0.01 * torch.randn(value.shape) for name, value in before.items()}
    one_step = Fit(epochs=1, lr=1e-3, batch_size=len(items()), weight_decay=0.0, warmup=0.0)
    found = trained(Iel(metric(1.0), past, 2, 0.0), one_step)
    seed_everything(0)
    composed = network(vit())
    with torch.no_grad():
        for name, value in composed.named_parameters():
            value += past[name] / 3
    everything = torch.arange(len(items()))
    value = logits(composed(items().batch(everything)), head())
    torch.nn.functional.cross_entropy(value, items().labels).backward()
    for name, own in composed.named_parameters():
        assert own.grad is not None
        # Adam's first step is the sign of the gradient; leave out entries whose gradient is round-off.
        clear = own.grad.abs() > 1e-4 * own.grad.abs().max()
        moved = (found[name] - before[name])[clear]
        assert torch.equal(moved.sign(), -own.grad[clear].sign()), name


def test_weight_decay_of_a_regularised_task_pulls_to_the_base_and_not_to_zero() -> None:
    still = Fit(epochs=1, lr=1e-12, batch_size=8, weight_decay=1e9, warmup=0.0)
    before, after = start(), trained(Ita(metric(1.0), 0.0), still)
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)
