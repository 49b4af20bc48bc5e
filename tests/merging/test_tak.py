"""TAK: factors of several tasks and their penalty against the reference arrays, and what training against it does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurocl.devices import Runtime, generator_for, seed_everything
from neurocl.errors import UserError
from neurocl.merging.collector import collect
from neurocl.merging.linearised import first_order, unit_rows
from neurocl.merging.statistics import Statistics
from neurocl.merging.suite import network
from neurocl.merging.tak import Curvature, Mode, Tak, aggregate, disentanglement_error, quadratic_penalty
from neurocl.merging.training import Fit, fit
from tests.merging.networks import reference_arrays
from tests.merging.tiny_suite import HOW, head, items, vit

CPU = Runtime(torch.device("cpu"))
TOLERANCE = {"rtol": 0.0, "atol": 1e-9}


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    return reference_arrays("merging-tak-kfac/kfac")


def reference_tasks(arrays: dict[str, Tensor]) -> list[Statistics]:
    """Statistics of all reference tasks but the current one, from the published sums."""
    found = []
    for task, count in enumerate(arrays["n_examples"].tolist()):
        if task == int(arrays["current_task"]):
            continue
        statistics = Statistics()
        for kind, label in (("kfac_a", "aaT_sum"), ("kfac_b", "ggT_sum_S0"), ("block", "ffT_sum_S0")):
            prefix = f"task{task}/{label}/"
            for key in (key for key in arrays if key.startswith(prefix)):
                statistics.add(kind, key.removeprefix(prefix), arrays[key], num_samples=count)
        found.append(statistics)
    return found


def deltas_of(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("delta/"): value for key, value in arrays.items() if key.startswith("delta/")}


# ---- against the published code


def test_accumulated_factors_agree_with_the_published_ones(arrays: dict[str, Tensor]) -> None:
    found = aggregate(reference_tasks(arrays))
    assert len(found.matrices) == 5
    assert len(found.vectors) == 9
    for name, (a, b) in found.matrices.items():
        torch.testing.assert_close(a[0], arrays[f"agg/A/{name}"], **TOLERANCE)
        torch.testing.assert_close(b[0], arrays[f"agg/B/{name}"], **TOLERANCE)
    for name, dense in found.vectors.items():
        torch.testing.assert_close(dense, arrays[f"agg/F/{name}"], **TOLERANCE)


@pytest.mark.parametrize("mode", ["accumulated", "per-task"])
def test_the_penalty_agrees_with_the_published_one(arrays: dict[str, Tensor], mode: Mode) -> None:
    found = aggregate(reference_tasks(arrays), mode).penalties(deltas_of(arrays))
    parts = {"matrices": 0.0, "norms": 0.0, "projection": 0.0, "token": 0.0}
    for name, value in found.items():
        kind = (
            "projection"
            if name == "lin_proj.weight"
            else "token"
            if "class_embedding" in name
            else "norms"
            if "ln_" in name
            else "matrices"
        )
        parts[kind] += float(value)
    expected = arrays[f"penalty_{mode.replace('-', '_')}"]
    torch.testing.assert_close(torch.tensor(list(parts.values()), dtype=torch.float64), expected, **TOLERANCE)


def test_dense_blocks_are_the_exact_drift(arrays: dict[str, Tensor]) -> None:
    curvature = aggregate(reference_tasks(arrays))
    found = curvature.penalties(deltas_of(arrays))
    for name in curvature.vectors:
        torch.testing.assert_close(found[name], arrays[f"exact_drift_block/{name}"], **TOLERANCE)


def test_factors_of_a_linear_map_with_one_token_are_exact_for_squared_outputs() -> None:
    case = reference_arrays("merging-tak-kfac/analytic")
    change = torch.cat([case["dW"], case["db"].reshape(-1, 1)], dim=1)
    found = quadratic_penalty(change, case["A"].unsqueeze(0), case["B"].unsqueeze(0))
    torch.testing.assert_close(found, case["quad_exact"], **TOLERANCE)


def test_the_merged_pair_is_the_published_approximation_of_the_sum_of_products() -> None:
    case = reference_arrays("merging-tak-kfac/analytic")
    lam, a, b = case["lam"], case["As"], case["Bs"]
    exact = sum(torch.kron(y, weight * x) for x, y, weight in zip(a, b, lam, strict=True))
    merged = torch.kron(b.sum(dim=0), (lam[:, None, None] * a).sum(dim=0))
    torch.testing.assert_close(exact, case["kron_sum_exact"], **TOLERANCE)
    torch.testing.assert_close(merged, case["kron_sum_merged"], **TOLERANCE)
    # The penalty is the quadratic form of those matrices.
    torch.manual_seed(0)
    change = torch.randn(len(b[0]), len(a[0]), dtype=torch.float64)
    flat = change.flatten()
    torch.testing.assert_close(quadratic_penalty(change, lam[:, None, None] * a, b), flat @ exact @ flat)
    one = quadratic_penalty(change, (lam[:, None, None] * a).sum(0, keepdim=True), b.sum(0, keepdim=True))
    torch.testing.assert_close(one, flat @ merged @ flat)


# ---- identities


def made_up_task(seed: int, count: int) -> Statistics:
    generator = torch.Generator().manual_seed(seed)

    def gram(width: int) -> Tensor:
        x = torch.randn(2 * width, width, generator=generator, dtype=torch.float64)
        return count * x.T @ x

    statistics = Statistics()
    statistics.add("kfac_a", "fc.weight", gram(4), num_samples=count)
    statistics.add("kfac_b", "fc.weight", gram(2), num_samples=count)
    statistics.add("block", "norm.bias", gram(3), num_samples=count)
    return statistics


def made_up_change(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"fc.weight": (2, 3), "fc.bias": (2,), "norm.bias": (3,)}
    return {k: torch.randn(*s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}


def total(curvature: Curvature, deltas: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(curvature.penalties(deltas).values())).sum()


def test_with_one_reference_task_both_modes_are_the_same() -> None:
    task, change = made_up_task(0, 7), made_up_change(1)
    torch.testing.assert_close(total(aggregate([task]), change), total(aggregate([task], "per-task"), change))


def test_with_equal_tasks_the_merged_pair_counts_each_task_in_full() -> None:
    tasks, change = [made_up_task(0, 7) for _ in range(3)], made_up_change(1)
    merged, apart = aggregate(tasks).penalties(change), aggregate(tasks, "per-task").penalties(change)
    torch.testing.assert_close(merged["fc.weight"], 3 * apart["fc.weight"])
    torch.testing.assert_close(merged["norm.bias"], apart["norm.bias"])


def test_the_merged_factors_keep_the_size_of_one_task() -> None:
    sizes = {count: aggregate(made_up_task(s, 5) for s in range(count)).nbytes() for count in (1, 4)}
    assert sizes[1] == sizes[4]
    assert aggregate((made_up_task(s, 5) for s in range(4)), "per-task").nbytes() > 3 * sizes[1]


def test_the_penalty_is_a_quadratic_form_that_is_never_negative() -> None:
    curvature, change = aggregate([made_up_task(0, 7), made_up_task(1, 3)], "per-task"), made_up_change(2)
    value = total(curvature, change)
    assert float(value) > 0
    torch.testing.assert_close(total(curvature, {k: -3 * v for k, v in change.items()}), 9 * value)
    assert float(total(curvature, {k: 0 * v for k, v in change.items()})) == 0


def test_a_change_of_what_no_task_feeds_in_costs_nothing() -> None:
    inputs = torch.zeros(10, 4, dtype=torch.float64)
    inputs[:, :2] = torch.randn(10, 2, dtype=torch.float64)
    layer = nn.Linear(4, 3, bias=False).double()
    curvature = aggregate([collect(layer, [inputs], kinds=("kfac",), num_probes=0)])
    change = torch.zeros(3, 4, dtype=torch.float64)
    change[:, 2:] = 1
    assert float(total(curvature, {"weight": change})) == 0
    change[:, 1] = 1
    assert float(total(curvature, {"weight": change})) > 0


def test_the_gradient_is_the_closed_form_and_that_of_finite_differences() -> None:
    torch.manual_seed(3)
    a, b = (torch.randn(2, n, n, dtype=torch.float64) for n in (4, 3))
    a, b = a @ a.mT, b @ b.mT
    change = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    quadratic_penalty(change, a, b).mul(0.5).backward()
    torch.testing.assert_close(change.grad, (b @ change.detach() @ a).sum(dim=0))
    assert torch.autograd.gradcheck(lambda x: quadratic_penalty(x, a, b), (change,))


def test_the_bias_is_the_last_column_of_the_change() -> None:
    task, change = made_up_task(0, 7), made_up_change(1)
    a, b = task.mean("kfac_a", "fc.weight"), task.mean("kfac_b", "fc.weight")
    d = torch.cat([change["fc.weight"], change["fc.bias"].reshape(-1, 1)], dim=1)
    expected = torch.trace(b @ d @ a @ d.T)
    torch.testing.assert_close(aggregate([task]).penalties(change)["fc.weight"], expected)


def test_tasks_that_do_not_fit_together_are_named() -> None:
    with pytest.raises(UserError, match="no reference tasks"):
        aggregate([])
    with pytest.raises(UserError, match="no K-FAC factors"):
        aggregate([Statistics()])
    other = Statistics()
    other.add("block", "norm.bias", torch.eye(3), num_samples=1)
    with pytest.raises(UserError, match=r"different parameters, such as 'fc\.weight'"):
        aggregate([made_up_task(0, 7), other])
    wide = Statistics()
    for kind, width in (("kfac_a", 9), ("kfac_b", 2)):
        wide.add(kind, "fc.weight", torch.eye(width), num_samples=1)
    wide.add("block", "norm.bias", torch.eye(3), num_samples=1)
    with pytest.raises(UserError, match=r"K-FAC factors of 'fc\.weight' have shapes \[4, 4\] and \[9, 9\]"):
        aggregate([made_up_task(0, 7), wide])


def test_scales_are_those_of_layers_vectors_and_the_projection() -> None:
    curvature, change = aggregate([made_up_task(0, 7)]), made_up_change(1)
    apart = curvature.penalties(change)
    found = Tak(curvature, strength=2.0, vectors_scale=10.0).penalty(change)
    torch.testing.assert_close(found, 2 * (apart["fc.weight"] + 10 * apart["norm.bias"]))
    found = Tak(curvature, strength=2.0, projection_scale=0.5, projection=["fc.*"]).penalty(change)
    torch.testing.assert_close(found, 2 * (0.5 * apart["fc.weight"] + 10 * apart["norm.bias"]))


# ---- in the loop

OTHER = 1 - items(1).batch(torch.arange(24))  # negatives


def other_curvature() -> Curvature:
    model = fresh()
    found = collect(
        model,
        [OTHER],
        kinds=("kfac",),
        num_probes=0,
        forward=lambda module, batch: unit_rows(module(batch)),
    )
    return aggregate([found]).to(torch.device("cpu"), torch.float32)


def fresh() -> nn.Module:
    seed_everything(0)
    return network(vit())


@pytest.mark.parametrize("linear", [False, True])
def test_without_strength_tak_is_plain_fine_tuning_of_the_tracked_parameters(linear: bool) -> None:
    curvature = other_curvature()
    seed_everything(0)
    plain, regularised = network(vit()), fresh()
    tracked = Tak(curvature, strength=0.0)
    for name, value in plain.named_parameters():
        value.requires_grad_(tracked.trains(name))
    assert not tracked.trains("pos_embed")
    assert tracked.trains("cls_token")

    class Plain(Tak):
        def penalty(self, deltas: dict[str, Tensor]) -> None:  # type: ignore[override]
            return None

    options = {"runtime": CPU, "linear": linear}
    fit(plain, items(), head(), HOW, generator=generator_for(1), regulariser=Plain(curvature), **options)  # type: ignore[arg-type]
    fit(regularised, items(), head(), HOW, generator=generator_for(1), regulariser=tracked, **options)  # type: ignore[arg-type]
    for own, other in zip(plain.parameters(), regularised.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-7)


def test_the_penalty_holds_the_drift_down_on_the_other_task_more_than_on_its_own() -> None:
    longer = Fit(epochs=60, lr=1e-2, batch_size=8, weight_decay=0.0, warmup=0.0)
    own = items().batch(torch.arange(24))
    foreign, at_home = {}, {}
    for strength in (0.0, 30.0):
        model = fresh()
        start = {name: value.detach().clone() for name, value in model.named_parameters()}
        tak = Tak(other_curvature(), strength=strength)
        order = generator_for(1)
        fit(model, items(), head(), longer, generator=order, runtime=CPU, regulariser=tak, linear=True)
        deltas = {name: value.detach() - start[name] for name, value in model.named_parameters()}
        for drifts, inputs in ((foreign, OTHER), (at_home, own)):
            change = first_order(model, start, deltas, inputs, unit_rows)[1]
            drifts[strength] = float(change.square().sum(dim=1).mean())
    assert foreign[30.0] < 0.3 * foreign[0.0]
    assert foreign[30.0] / at_home[30.0] < 0.8 * foreign[0.0] / at_home[0.0]


def linear_task(features: slice, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs [64, 8] that are zero outside some features, and labels that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(64, 8, dtype=torch.float64)
    x[:, features] = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    return x, (x.sum(dim=1) > 0).long()


def linear_expert(task: tuple[Tensor, Tensor], curvature: Curvature, strength: float, start: Tensor) -> Tensor:
    """Weights [2, 8] by gradient descent from ``start`` with noise in the gradient where the task says nothing."""
    x, y = task
    weight = start.clone().requires_grad_(True)
    generator = torch.Generator().manual_seed(int(y.sum()))
    noise = 0.3 * torch.randn(2, 8, generator=generator, dtype=torch.float64)
    for _ in range(200):
        delta = weight - start
        loss = F.cross_entropy(x @ weight.T, y) + (noise * delta).sum() * 0.1
        loss = loss + strength * total(curvature, {"weight": delta})
        (gradient,) = torch.autograd.grad(loss, weight)
        weight = (weight - 0.3 * gradient).detach().requires_grad_(True)
    return weight.detach()


def test_disjoint_tasks_add_up_when_each_is_trained_against_the_drift_in_the_other() -> None:
    tasks = [linear_task(slice(0, 4), 0), linear_task(slice(4, 8), 1)]
    start = torch.zeros(2, 8, dtype=torch.float64)
    layer = nn.Linear(8, 2, bias=False).double()
    curvatures = [aggregate([collect(layer, [x], kinds=("kfac",), num_probes=0)]) for x, _ in tasks]
    errors, drifts, accuracies = {}, {}, {}
    for strength in (0.0, 0.5):
        experts = [linear_expert(task, curvatures[1 - i], strength, start) for i, task in enumerate(tasks)]
        drifts[strength] = float((tasks[1][0] @ (experts[0] - start).T).square().sum(dim=1).mean())
        accuracies[strength] = float(((tasks[0][0] @ experts[0].T).argmax(1) == tasks[0][1]).double().mean())
        errors[strength] = disentanglement_error(
            [as_layer(expert) for expert in experts],
            as_layer(sum(experts, torch.zeros_like(start))),
            [[x] for x, _ in tasks],
        )
    assert drifts[0.5] < 0.01 * drifts[0.0]
    assert accuracies[0.5] >= accuracies[0.0]
    assert errors[0.5] < errors[0.0]
    assert errors[0.5] <= 2 / 64


def as_layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    layer.weight.data = weight
    return layer


def test_disentanglement_error_counts_disagreements_of_each_task() -> None:
    x = torch.eye(2, dtype=torch.float64)
    same, swapped = as_layer(torch.eye(2).double()), as_layer(torch.eye(2).flip(0).double())
    assert disentanglement_error([same, same], same, [[x], [x]]) == 0
    assert disentanglement_error([same, swapped], same, [[x], [x[:1], x[1:]]]) == 1
    heads = [torch.eye(2).double(), torch.ones(2, 2).double()]
    assert disentanglement_error([swapped, swapped], same, [[x], [x]], heads) == 1
