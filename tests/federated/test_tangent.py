"""The expanded network is affine in its displacement, averages of displacements are averages of functions, and the
ledger adds up; ridge regression in tangent features is what all data together give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurocl.errors import UserError
from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.exchange import Fault
from neurocl.federated.method import Reply, Samples
from neurocl.federated.partition import PartitionConfig
from neurocl.federated.payload import Payload, encode
from neurocl.federated.tangent import ENTERED, LEDGER, Displaced, Tangent, subtracted
from neurocl.federated.tangent_ridge import ridge_displacement, symmetric, tangent_moments, upper
from tests.conftest import reference
from tests.federated.small_problem import config, in_memory

# Names of the reference files for the parameters of a Sequential.
NAMES = {"0.weight": "W1", "0.bias": "b1", "2.weight": "W2", "2.bias": "b2"}


def reference_network(case: Mapping[str, Any]) -> nn.Sequential:
    """W2 tanh(W1 x + b1) + b2 in float64."""
    hidden, inputs = case["theta_W1"].shape
    network = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, len(case["theta_b2"]))).double()
    network.load_state_dict({name: torch.from_numpy(case[f"theta_{own}"]) for name, own in NAMES.items()})
    return network


def taus(case: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    return [
        {name: torch.from_numpy(case[f"tau_{own}"][client]) for name, own in NAMES.items()}
        for client in range(len(case["num_samples"]))
    ]


def combined(one: Mapping[str, Tensor], other: Mapping[str, Tensor], a: float, b: float) -> dict[str, Tensor]:
    return {name: a * one[name] + b * other[name] for name in one}


def close(found: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=0, atol=tolerance)


def test_every_expansion_equals_the_reference() -> None:
    case = reference("federated-unlearning/tangent")
    network, x = reference_network(case), torch.from_numpy(case["x"])
    close(network(x).detach(), case["f0"])
    for tau, wanted in zip(taus(case), case["lin_each"], strict=True):
        close(Displaced(network, tau)(x).detach(), wanted)


def test_the_aggregated_and_the_negated_model_equal_the_reference() -> None:
    case = reference("federated-unlearning/tangent")
    network, x, own = reference_network(case), torch.from_numpy(case["x"]), taus(case)
    share = case["num_samples"] / case["num_samples"].sum()
    mean = {name: sum(p * tau[name] for p, tau in zip(share, own, strict=True)) for name in NAMES}
    close(Displaced(network, mean)(x).detach(), case["lin_aggregate"])
    # A mean of displacements is a mean of functions.
    close(case["lin_aggregate"], np.einsum("k,knc->nc", share, case["lin_each"]))
    stores = [{name: value.numpy() for name, value in tau.items()} for tau in (mean, own[int(case["removed"])])]
    negated = subtracted(stores[0], stores[1], float(case["alpha"]))
    moved = {name: torch.from_numpy(value) for name, value in negated.items()}
    close(Displaced(network, moved)(x).detach(), case["lin_negated"])


def test_the_expansion_is_affine_in_the_displacement() -> None:
    case = reference("federated-unlearning/tangent")
    network, x, own = reference_network(case), torch.from_numpy(case["x"]), taus(case)
    start = network(x).detach()
    mixed = Displaced(network, combined(own[0], own[1], 0.7, -1.9))(x).detach() - start
    parts = [Displaced(network, tau)(x).detach() - start for tau in own[:2]]
    close(mixed, 0.7 * parts[0] - 1.9 * parts[1])


def test_without_displacement_the_expansion_is_the_network_and_has_its_gradient() -> None:
    case = reference("federated-unlearning/tangent")
    network, x = reference_network(case), torch.from_numpy(case["x"])
    zero = {name: torch.zeros_like(value, requires_grad=True) for name, value in network.named_parameters()}
    labels = torch.arange(len(x)) % 6
    for linear in (True, False):
        out = Displaced(network, zero, linear=linear)(x)
        close(out.detach(), network(x).detach())
        found = torch.autograd.grad(F.cross_entropy(out, labels), list(zero.values()))
        wanted = torch.autograd.grad(F.cross_entropy(network(x), labels), list(network.parameters()))
        for one, other in zip(found, wanted, strict=True):
            close(one, other)


def test_the_network_itself_is_not_affine() -> None:
    case = reference("federated-unlearning/tangent")
    network, x, own = reference_network(case), torch.from_numpy(case["x"]), taus(case)
    start = network(x).detach()
    once, twice = (
        Displaced(network, combined(own[0], own[0], scale, 0.0), linear=False)(x).detach() - start for scale in (1, 2)
    )
    assert (twice - 2 * once).abs().max() > 0.01


def tangent_run(**changes: Any) -> tuple[Any, Tangent]:
    run, _ = in_memory(config(method="tangent", **changes))
    assert isinstance(run.method, Tangent)
    return run, run.method


@pytest.mark.parametrize("linear", [True, False])
def test_the_ledger_adds_up_to_the_displacement(linear: bool) -> None:
    options = {"ledger": True, "linear": linear}
    run, method = tangent_run(options=options, participation=0.7, rounds=3, participation_per="round")
    run.run()
    tau = method.tau(run.state)
    assert any(array.any() for array in tau.values())
    for name, array in tau.items():
        total = sum(method.contribution(run.state, client)[name].astype(float) for client in range(3))
        close(total, array, 1e-6)


def test_the_ledger_changes_nothing_else() -> None:
    kept, method = tangent_run(options={"ledger": True})
    plain, _ = tangent_run()
    kept.run()
    plain.run()
    own = {name: array for name, array in kept.state.arrays.items() if not name.startswith(LEDGER)}
    assert encode(Payload(own)) == encode(Payload(plain.state.arrays))
    # Nothing of the ledger is sent.
    assert set(method.message(kept.state, next(kept._schedule())[1]).arrays) == set(method.tau(kept.state))


def test_a_client_that_was_lost_is_in_the_ledger_with_the_rounds_it_took_part_in() -> None:
    faults = [Fault("drop", client=1, task=task, round=number) for task in (0, 1) for number in (0, 1)]
    run, _ = in_memory(config(method="tangent", options={"ledger": True}, max_repeats=0), *faults)
    run.run()
    assert isinstance(run.method, Tangent)
    assert not any(name.startswith(f"{LEDGER}1.") for name in run.state.arrays)
    assert run.method.share(run.state, 1) == 0
    assert run.state.arrays[ENTERED].sum() == pytest.approx(4)


def test_shares_are_those_of_the_samples() -> None:
    run, method = tangent_run(classes_per_task=(4,))
    run.run()
    counts = [len(run.problem.train_samples(client, run.problem.tasks[0])) for client in range(3)]
    for client, count in enumerate(counts):
        assert method.share(run.state, client) == pytest.approx(count / sum(counts))


def test_with_one_client_and_the_head_alone_expanding_changes_nothing() -> None:
    one = {"partition": PartitionConfig(num_clients=1), "rounds": 2}
    expanded, method = tangent_run(options={"train": "head"}, **one)
    plain, _ = tangent_run(options={"train": "head", "linear": False}, **one)
    expanded.run()
    plain.run()
    for name, array in method.tau(plain.state).items():
        close(expanded.state.arrays[name], array, 1e-5)


def test_the_twin_that_is_not_expanded_is_fedavg_from_the_same_start() -> None:
    run, method = tangent_run(options={"linear": False}, lr=0.05, optimizer="sgd", classes_per_task=(2,))
    run.run()
    problem = problem_for(config(method="fedavg", lr=0.05, optimizer="sgd", classes_per_task=(2,)))
    fedavg = method_for(problem)
    start = dict(method.network().named_parameters())
    object.__setattr__(problem.source, "build", lambda: method.network())
    other, _ = in_memory(problem.config)
    other.method, other.problem = fedavg, problem
    other.exchange.method = fedavg  # type: ignore[attr-defined]
    other.exchange.problem = problem  # type: ignore[attr-defined]
    other.run()
    for name, array in method.tau(run.state).items():
        close(array + start[name].detach().numpy(), other.state.arrays[name], 1e-5)


def test_frozen_down_lora_moves_only_b_and_the_head_and_stays_linear() -> None:
    run, method = tangent_run(options={"rank": 2})
    run.run()
    names = set(method.tau(run.state))
    assert names == {"head.weight", "head.bias", "backbone.fc1.lora_B", "backbone.fc2.lora_B"}
    x, tau = torch.rand(4, 64), method.tau(run.state)
    outputs = []
    for scale in (0.0, 1.0, 2.0):
        state = Payload({**run.state.arrays, **{name: scale * array for name, array in tau.items()}})
        outputs.append(method.predictor(state, run.problem.tasks[0])(x))
    close(outputs[2] - outputs[0], 2 * (outputs[1] - outputs[0]), 1e-5)


def test_without_weights_in_the_head_the_backbone_stays_where_it_is() -> None:
    run, method = tangent_run(options={"head_std": 0.0})
    run.run()
    tau = method.tau(run.state)
    assert tau["head.weight"].any()
    # AdamW turns rounding into steps, but there is no gradient to round.
    assert not any(tau[name].any() for name in tau if name.startswith("backbone."))


def test_a_ledger_that_would_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurocl.federated.tangent.LARGEST_LEDGER", 1000)
    run, _ = tangent_run(options={"ledger": True})
    with pytest.raises(UserError, match="a ledger of 3 clients takes"):
        run.run()


def test_the_quadratic_solution_equals_the_reference() -> None:
    case = reference("federated-unlearning/quadratic")
    grams, moments = (torch.from_numpy(case[name]) for name in ("grams", "moments"))
    ridge, removed = float(case["lam"]), int(case["removed"])
    close(ridge_displacement(grams.sum(0), moments.sum(0), ridge), case["tau_full"], 1e-12)
    left = ridge_displacement(grams.sum(0) - grams[removed], moments.sum(0) - moments[removed], ridge)
    close(left, case["tau_without"], 1e-12)
    others = [client for client in range(3) if client != removed]
    close(ridge_displacement(grams[others].sum(0), moments[others].sum(0), ridge), left, 1e-12)
    # The client comes back.
    back = ridge_displacement(
        grams.sum(0) - grams[removed] + grams[removed], moments[others].sum(0) + moments[removed], ridge
    )
    close(back, case["tau_full"], 1e-12)


def test_tangent_moments_are_sums_over_samples_of_their_gradients() -> None:
    case = reference("federated-unlearning/tangent")
    network, x = reference_network(case), torch.from_numpy(case["x"])
    labels = torch.arange(len(x)) % 6
    gram, moments = tangent_moments(network, list(NAMES), Samples(x, labels))
    wanted_gram, wanted_moments = torch.zeros_like(gram), torch.zeros_like(moments)
    for row, label in zip(x, labels, strict=True):
        for output in range(6):
            score = network(row[None])[0, output]
            slope = torch.cat([part.flatten() for part in torch.autograd.grad(score, list(network.parameters()))])
            wanted_gram += slope[:, None] * slope
            wanted_moments += slope * (float(output == label) - score.detach())
    close(gram, wanted_gram)
    close(moments, wanted_moments)
    assert torch.equal(symmetric(upper(gram), len(gram)), (gram.triu() + gram.triu(1).mT))


def test_ridge_in_tangent_features_minimises_the_squared_loss_of_the_expansion() -> None:
    case = reference("federated-unlearning/tangent")
    network, x = reference_network(case), torch.from_numpy(case["x"])
    labels = torch.arange(len(x)) % 6
    tau = ridge_displacement(*tangent_moments(network, list(NAMES), Samples(x, labels)), 0.3)
    own = dict(network.named_parameters())
    leaves = {
        name: part.view_as(own[name]).clone().requires_grad_()
        for name, part in zip(NAMES, tau.split([own[name].numel() for name in NAMES]), strict=True)
    }
    loss = (Displaced(network, leaves)(x) - F.one_hot(labels, 6)).square().sum()
    loss = loss + 0.3 * sum(leaf.square().sum() for leaf in leaves.values())
    for slope in torch.autograd.grad(loss, list(leaves.values())):
        close(slope, torch.zeros_like(slope), 1e-9)


def test_tangent_ridge_does_not_depend_on_tasks_or_clients() -> None:
    options = {"train": "head"}
    together, _ = in_memory(config(method="tangent-ridge", options=options, classes_per_task=(4,)))
    apart, _ = in_memory(config(method="tangent-ridge", options=options))
    alone, _ = in_memory(config(method="tangent-ridge", options=options, partition=PartitionConfig(num_clients=1)))
    sums: list[dict[str, Any]] = []
    for run in (together, apart, alone):
        run.run()
        own = run.state.arrays
        sums.append({kind: sum(own[name] for name in own if name.startswith(kind)) for kind in ("gram", "moments")})
    for found in sums[1:]:
        for kind, total in found.items():
            # Messages are in float32.
            np.testing.assert_allclose(total, sums[0][kind], rtol=1e-5, atol=1e-4)


def test_tangent_ridge_refuses_what_is_too_large_or_no_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = in_memory(config(method="tangent-ridge", options={"train": "head"}))
    place = next(run._schedule())[1]
    size = run.method._size  # type: ignore[attr-defined]
    state = run.method.initial_state()
    gram, moments = np.zeros(size * (size + 1) // 2, dtype=np.float32), np.zeros(size, dtype=np.float32)
    assert not run.method.objection(state, place, Payload({"gram": gram, "moments": moments}, {"n": 1}))
    gram[-1] = -1
    assert "diagonal" in run.method.objection(state, place, Payload({"gram": gram, "moments": moments}, {"n": 1}))
    assert "shape" in run.method.objection(state, place, Payload({"gram": gram[1:], "moments": moments}, {"n": 1}))
    gram[-1] = 1
    run.method.aggregate(state, place, [Reply(0, Payload({"gram": gram, "moments": moments}, {"n": 1}))])
    monkeypatch.setattr("neurocl.federated.tangent_ridge.LARGEST_P", 100)
    with pytest.raises(UserError, match="at most 100 are allowed"):
        run.method.initial_state()
