"""Chain of Merges against the reference networks and the identities that any such chain has."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from neurocl.errors import UserError
from neurocl.merging.activation_chain import mean_model
from neurocl.merging.collector import collect
from neurocl.merging.com import ChainResult, chain_of_merges
from neurocl.merging.regmean import regmean
from tests.merging.networks import Mlp, Transformer, jittered, reference_networks

Target = Literal["merged", "expert"]
TARGETS: list[tuple[Target, str]] = [("merged", "com_self"), ("expert", "com_expert")]


def compare(model: nn.Module, arrays: dict[str, Tensor], prefix: str, rtol: float) -> None:
    for name, value in model.named_parameters():
        torch.testing.assert_close(
            value.detach(), arrays[prefix + name], rtol=rtol, atol=rtol * float(arrays[prefix + name].abs().max())
        )


def same(one: nn.Module, two: nn.Module, rtol: float = 1e-6) -> bool:
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=rtol, atol=rtol) for a, b in pairs)


def mlp_problem(num_tasks: int = 3, num_rows: int = 60) -> tuple[list[Any], list[list[Tensor]]]:
    torch.manual_seed(0)
    base = Mlp().double()
    experts = [jittered(copy.deepcopy(base), seed) for seed in range(num_tasks)]
    return experts, [[torch.randn(num_rows, 6, dtype=torch.float64)] for _ in range(num_tasks)]


# ---- reference arrays


@pytest.mark.parametrize(("target", "label"), TARGETS)
@pytest.mark.parametrize("off_diagonal", ["1", "0.9"])
@pytest.mark.parametrize("ridge", ["0", "0.001"])
def test_the_reference_mlp_is_met(target: Target, label: str, off_diagonal: str, ridge: str) -> None:
    arrays, base, experts, batches = reference_networks("mlp")
    result = chain_of_merges(
        base, experts, batches, target=target, off_diagonal=float(off_diagonal), ridge=float(ridge)
    )
    rtol = 1e-5 if ridge == "0" else 1e-6
    compare(result.model, arrays, f"mlp/{label}_alpha{off_diagonal}_ridge{ridge}/", rtol)


def test_the_reference_mlp_with_task_weights_is_met() -> None:
    arrays, base, experts, batches = reference_networks("mlp")
    weights = arrays["task_weights_case"].tolist()
    result = chain_of_merges(base, experts, batches, off_diagonal=0.9, ridge=1e-3, weights=weights)
    compare(result.model, arrays, "mlp/com_self_weighted/", 1e-6)


@pytest.mark.parametrize("off_diagonal", ["1", "0.9"])
@pytest.mark.parametrize("ridge", ["0", "0.001"])
def test_collected_grams_and_regmean_meet_the_reference_mlp(off_diagonal: str, ridge: str) -> None:
    arrays, _, experts, batches = reference_networks("mlp")
    statistics = [collect(model, own) for model, own in zip(experts, batches, strict=True)]
    for name in statistics[0].names("gram"):
        models = torch.stack([model.get_parameter(name).detach() for model in experts])
        gram = torch.stack([own.mean("gram", name) for own in statistics])
        merged = regmean(models[0], models, gram=gram, off_diagonal=float(off_diagonal), ridge=float(ridge))
        expected = arrays[f"mlp/regmean_alpha{off_diagonal}_ridge{ridge}/{name}"]
        rtol = 1e-5 if ridge == "0" else 1e-6
        torch.testing.assert_close(merged, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize(("target", "label"), TARGETS)
@pytest.mark.parametrize("blocks", [None, ["blocks.0", "blocks.1"]])
def test_the_reference_transformer_is_met_with_and_without_cached_blocks(
    target: Target, label: str, blocks: list[str] | None
) -> None:
    arrays, base, experts, batches = reference_networks("transformer")
    result = chain_of_merges(
        base,
        experts,
        batches,
        target=target,
        off_diagonal=float(arrays["alpha"]),
        ridge=float(arrays["ridge"]),
        blocks=blocks,
    )
    compare(result.model, arrays, f"{label}/", 1e-6)
    merged = [report.names[0] for report in result.layers if not report.skipped]
    assert merged == [f"blocks.{i}.{name}" for i in range(2) for name in ("qkv", "out", "fc1", "fc2")]
    assert [report.names for report in result.layers if report.skipped] == [["emb"]]


# ---- identities


@pytest.mark.parametrize("target", ["merged", "expert"])
@pytest.mark.parametrize("fit_bias", [False, True])
def test_identical_experts_and_a_single_one_are_returned_exactly(target: Target, fit_bias: bool) -> None:
    experts, batches = mlp_problem()
    for number in (1, 3):
        copies = [copy.deepcopy(experts[0]) for _ in range(number)]
        result = chain_of_merges(None, copies, batches[:number], target=target, fit_bias=fit_bias)
        for name, value in result.model.named_parameters():
            assert torch.equal(value, experts[0].get_parameter(name))


@pytest.mark.parametrize("target", ["merged", "expert"])
def test_one_linear_layer_is_joint_least_squares(target: Target) -> None:
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Linear(4, 3, bias=False)).double() for _ in range(2)]
    inputs = [torch.randn(30, 4, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)]
    result = chain_of_merges(
        None, experts, [[x] for x in inputs], target=target, off_diagonal=1.0, ridge=0.0, gram_reduction="sum"
    )
    responses = torch.cat([model(x) for model, x in zip(experts, inputs, strict=True)]).detach()
    expected = torch.linalg.lstsq(torch.cat(inputs), responses).solution.T
    torch.testing.assert_close(result.model.get_parameter("0.weight").detach(), expected)


def test_the_second_layer_of_a_linear_chain_is_least_squares_on_what_the_merged_first_one_gives() -> None:
    torch.manual_seed(1)
    experts = [nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)).double() for _ in range(2)]
    inputs = [torch.randn(30, 4, dtype=torch.float64) for _ in range(2)]
    for target in ("merged", "expert"):
        result = chain_of_merges(None, experts, [[x] for x in inputs], target=target, off_diagonal=1.0, ridge=0.0).model
        seen = [result[0](x).detach() for x in inputs]  # type: ignore[index]
        own = [x if target == "merged" else model[0](y) for x, y, model in zip(seen, inputs, experts, strict=True)]
        targets = torch.cat([model[1](x) for x, model in zip(own, experts, strict=True)]).detach()
        # four directions reach the layer, so the solution is the mean plus the smallest step that fits
        mean = torch.stack([model[1].weight for model in experts]).mean(0).detach()
        rest = targets - torch.cat(seen) @ mean.T
        step = torch.linalg.pinv(torch.cat(seen), rtol=1e-9) @ rest
        torch.testing.assert_close(result.get_parameter("1.weight").detach(), mean + step.T, rtol=1e-6, atol=1e-8)


def test_experts_that_differ_in_one_layer_only_give_regmean_there() -> None:
    experts, batches = mlp_problem()
    for model in experts[1:]:
        for name in ("fc.0", "fc.2"):
            model.get_submodule(name).load_state_dict(experts[0].get_submodule(name).state_dict())
    gram = torch.stack([collect(m, b).mean("gram", "fc.1.weight") for m, b in zip(experts, batches, strict=True)])
    models = torch.stack([model.get_parameter("fc.1.weight").detach() for model in experts])
    expected = regmean(models[0], models, gram=gram, off_diagonal=0.95, ridge=1e-4)
    for target in ("merged", "expert"):
        result = chain_of_merges(None, experts, batches, target=target)
        torch.testing.assert_close(result.model.get_parameter("fc.1.weight").detach(), expected)
        assert torch.equal(result.model.get_parameter("fc.0.weight"), experts[0].get_parameter("fc.0.weight"))
        assert [report.skipped for report in result.layers] == [["fc.0"], [], ["fc.2"]]


@pytest.mark.parametrize("target", ["merged", "expert"])
def test_neither_the_order_of_tasks_nor_repeated_data_nor_the_batch_size_matters(target: Target) -> None:
    experts, batches = mlp_problem()
    expected = chain_of_merges(None, experts, batches, target=target).model
    order = [2, 0, 1]
    turned = chain_of_merges(None, [experts[i] for i in order], [batches[i] for i in order], target=target).model
    doubled = chain_of_merges(None, experts, [own * 2 for own in batches], target=target).model
    small = chain_of_merges(None, experts, [list(own[0].split(7)) for own in batches], target=target).model
    once = chain_of_merges(None, experts, [iter(own) for own in batches], target=target).model
    for other in (turned, doubled, small, once):
        assert same(expected, other, 1e-9)


def test_equal_inputs_in_all_tasks_give_the_mean_in_the_first_layer() -> None:
    experts, batches = mlp_problem()
    result = chain_of_merges(None, experts, [batches[0]] * 3).model
    mean = torch.stack([model.get_parameter("fc.0.weight").detach() for model in experts]).mean(0)
    torch.testing.assert_close(result.get_parameter("fc.0.weight").detach(), mean)


def test_permuting_hidden_units_of_all_experts_permutes_the_result() -> None:
    experts, batches = mlp_problem()
    order = torch.randperm(9)

    def permuted(model: Any) -> Any:
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.fc[0].weight.copy_(model.fc[0].weight[order].clone())
            model.fc[0].bias.copy_(model.fc[0].bias[order].clone())
            model.fc[1].weight.copy_(model.fc[1].weight[:, order].clone())
        return model

    expected = permuted(chain_of_merges(None, experts, batches, target="expert").model)
    assert same(chain_of_merges(None, [permuted(m) for m in experts], batches, target="expert").model, expected, 1e-8)


@pytest.mark.parametrize("target", ["merged", "expert"])
def test_perturbing_a_layer_never_lowers_its_objective(target: Target) -> None:
    experts, batches = mlp_problem()
    model: Any = chain_of_merges(None, experts, batches, target=target, off_diagonal=1.0, ridge=0.0).model
    for layer in range(3):
        seen, goals = [], []
        for expert, (x,) in zip(experts, batches, strict=True):
            inside = x if layer == 0 else None
            z, y = x, x
            for index in range(layer):
                z, y = model.fc[index](z).relu(), expert.fc[index](y).relu()
            inside = z if target == "merged" else y
            seen.append(z.detach())
            goals.append((inside @ expert.fc[layer].weight.T).detach())

        def objective(weight: Tensor, seen: list[Tensor] = seen, goals: list[Tensor] = goals) -> float:
            errors = [((z @ weight.T - g) ** 2).sum() / len(z) for z, g in zip(seen, goals, strict=True)]
            return float(torch.stack(errors).sum())

        weight = model.fc[layer].weight.detach()
        lowest = objective(weight)
        steps = [objective(weight + 0.01 * torch.randn_like(weight)) for _ in range(20)]
        assert all(value >= lowest * (1 - 1e-12) for value in steps)


def test_on_linear_networks_expert_targets_beat_regmean_and_the_average() -> None:
    def error(model: Any, experts: list[Any], inputs: list[Tensor]) -> float:
        errors = [((model(x) - expert(x)) ** 2).mean().detach() for expert, x in zip(experts, inputs, strict=True)]
        return float(torch.stack(errors).sum())

    better = 0
    for seed in range(10):
        torch.manual_seed(seed)
        base = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3))).double()
        experts = [jittered(copy.deepcopy(base), 10 * seed + t, 0.2) for t in range(3)]
        inputs = [torch.randn(80, 6, dtype=torch.float64) @ torch.randn(6, 6).double() for _ in range(3)]
        statistics = [collect(model, [x]) for model, x in zip(experts, inputs, strict=True)]
        reg = mean_model(None, experts)
        for name, value in reg.named_parameters():
            models = torch.stack([model.get_parameter(name).detach() for model in experts])
            gram = torch.stack([own.mean("gram", name) for own in statistics])
            value.data.copy_(regmean(models[0], models, gram=gram, off_diagonal=1.0))
        chain = chain_of_merges(
            None, experts, [[x] for x in inputs], target="expert", off_diagonal=1.0, ridge=0.0
        ).model
        better += error(chain, experts, inputs) <= error(reg, experts, inputs)
        assert error(chain, experts, inputs) < error(mean_model(None, experts), experts, inputs)
    assert better >= 8


# ---- options


def test_the_bias_can_be_solved_jointly() -> None:
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Linear(4, 3)).double() for _ in range(2)]
    inputs = [torch.randn(30, 4, dtype=torch.float64) + 1, torch.randn(30, 4, dtype=torch.float64) - 1]
    data = [[x] for x in inputs]
    fitted = chain_of_merges(None, experts, data, off_diagonal=1.0, ridge=0.0, fit_bias=True).model
    targets = torch.cat([model(x) for model, x in zip(experts, inputs, strict=True)]).detach()
    ones = torch.cat([torch.cat(inputs), torch.ones(60, 1).double()], 1)
    expected = torch.linalg.lstsq(ones, targets).solution.T
    torch.testing.assert_close(fitted.get_parameter("0.weight").detach(), expected[:, :4])
    torch.testing.assert_close(fitted.get_parameter("0.bias").detach(), expected[:, 4])
    averaged = chain_of_merges(None, experts, data).model.get_parameter("0.bias").detach()
    torch.testing.assert_close(averaged, torch.stack([model[0].bias for model in experts]).mean(0).detach())


@pytest.mark.parametrize("fit_bias", [False, True])
@pytest.mark.parametrize("target", ["merged", "expert"])
def test_an_off_diagonal_of_zero_needs_only_diagonals(target: Target, fit_bias: bool) -> None:
    experts, batches = mlp_problem()
    cheap = chain_of_merges(None, experts, batches, target=target, off_diagonal=0.0, fit_bias=fit_bias).model
    full = chain_of_merges(
        None, experts, batches, target=target, off_diagonal=0.0, fit_bias=fit_bias, diagnostics=True
    ).model
    assert same(cheap, full, 1e-9)


def test_task_weights_follow_their_formulas() -> None:
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Linear(4, 3, bias=False)).double() for _ in range(2)]
    inputs = [3 * torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64)]
    models = torch.stack([model[0].weight.detach() for model in experts])
    grams = torch.stack([x.T @ x / 30 for x in inputs])
    correlation = torch.stack([g / torch.outer(g.diagonal().sqrt(), g.diagonal().sqrt()) for g in grams]).abs()
    weights = {
        "none": torch.ones(2),
        "offdiag": correlation.sum((1, 2)) - 4,
        "trace": 1 / torch.stack([g.trace() for g in grams]),
        "response": torch.stack(
            [(w**2).sum() / ((x @ w.T) ** 2).sum() * 30 for w, x in zip(models, inputs, strict=True)]
        ),
    }
    for weighting, c in weights.items():
        result = chain_of_merges(None, experts, [[x] for x in inputs], task_weighting=weighting)  # type: ignore[arg-type]
        expected = regmean(models[0], models, gram=grams, weights=c, off_diagonal=0.95, ridge=1e-4)
        torch.testing.assert_close(result.model.get_parameter("0.weight").detach(), expected)


def test_sums_instead_of_means_weigh_tasks_by_their_rows() -> None:
    experts, batches = mlp_problem()
    batches[0] = batches[0] * 3
    # without a ridge, whose anchor is the mean weighted by the tasks' weights but not by their rows
    sums = chain_of_merges(None, experts, batches, gram_reduction="sum", ridge=0.0).model
    weighed = chain_of_merges(None, experts, batches, weights=[3.0, 1.0, 1.0], ridge=0.0).model
    for name in ("fc.0.weight", "fc.1.weight", "fc.2.weight"):
        torch.testing.assert_close(sums.get_parameter(name), weighed.get_parameter(name), rtol=1e-7, atol=1e-9)


def test_diagnostics_report_conditions_and_shifts() -> None:
    experts, batches = mlp_problem()
    first, second, _ = chain_of_merges(None, experts, batches, diagnostics=True).layers
    assert first.shift_before is not None
    assert first.shift_after is not None
    assert second.shift_before is not None
    assert second.shift_after is not None
    assert max(first.shift_before + first.shift_after) < 1e-12
    assert min(second.shift_before + second.shift_after) > 1e-3
    assert second.condition is not None
    assert second.condition > 1
    assert second.num_rows == [60, 60, 60]


def test_progress_names_every_stage() -> None:
    experts, batches = mlp_problem()
    calls: list[tuple[int, int, list[str]]] = []
    chain_of_merges(None, experts, batches, progress=lambda *call: calls.append(call))
    assert calls == [(0, 3, ["fc.0"]), (1, 3, ["fc.1"]), (2, 3, ["fc.2"])]


# ---- networks of other shapes


class Projections(nn.Module):
    """Three projections of one input, a layer without bias, a head behind the blocks and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.twice = nn.Linear(6, 6, bias=False)
        self.unused = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = (self.q(x) * self.k(x).sigmoid()).tanh() + self.v(x)
        out: Tensor = self.twice(self.twice(h).relu())
        return out


def test_layers_that_read_one_tensor_form_a_stage_in_execution_order(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    base = Projections().double()
    experts = [jittered(copy.deepcopy(base), seed) for seed in range(2)]
    data = [[torch.randn(20, 6, dtype=torch.float64)] for _ in range(2)]
    result = chain_of_merges(None, experts, data)
    assert [report.names for report in result.layers] == [["q", "k", "v"], ["twice"]]
    assert [report.num_rows for report in result.layers] == [[20, 20], [40, 40]]
    assert "twice runs 2 times" in caplog.text
    mean = torch.stack([model.unused.weight.detach() for model in experts]).mean(0)
    torch.testing.assert_close(result.model.get_parameter("unused.weight").detach(), mean)
    named = chain_of_merges(None, experts, data, stages=[["q", "k", "v"], ["twice"]])
    assert same(named.model, result.model, 1e-12)
    apart = chain_of_merges(None, experts, data, stages=[["q"], ["k"], ["v"], ["twice"]])
    assert same(apart.model, result.model, 1e-12)
    with pytest.raises(UserError, match="'unused' is no linear layer that runs"):
        chain_of_merges(None, experts, data, stages=[["unused"]])


def test_union_of_both_inputs_is_used_for_a_layer_that_runs_twice() -> None:
    torch.manual_seed(0)
    base = Projections().double()
    experts = [jittered(copy.deepcopy(base), seed) for seed in range(2)]
    for model in experts:
        for name in "qkv":
            model.get_submodule(name).load_state_dict(base.get_submodule(name).state_dict())
    data = [torch.randn(20, 6, dtype=torch.float64) for _ in range(2)]
    average = mean_model(None, experts)
    gram = torch.stack([collect(average, [x]).mean("gram", "twice.weight") for x in data])
    models = torch.stack([model.twice.weight.detach() for model in experts])
    merged = chain_of_merges(None, experts, [[x] for x in data]).model.get_parameter("twice.weight").detach()
    torch.testing.assert_close(merged, regmean(models[0], models, gram=gram, off_diagonal=0.95, ridge=1e-4))


class PyTorchTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.stem(x)
        for layer in self.layers:
            h = layer(h, src_key_padding_mask=attention_mask == 0)
        out: Tensor = self.head(h[:, 0])
        return out


@pytest.mark.parametrize("target", ["merged", "expert"])
def test_cached_blocks_equal_whole_passes_with_masks_a_stem_and_a_head(target: Target) -> None:
    torch.manual_seed(0)
    base = PyTorchTransformer().double()
    experts = [jittered(copy.deepcopy(base), seed, 0.1) for seed in range(2)]
    lengths = torch.arange(6).remainder(4) + 1
    mask = (torch.arange(4) < lengths.unsqueeze(1)).long()
    data = [[{"x": torch.randn(6, 4, 5, dtype=torch.float64), "attention_mask": mask}] for _ in range(2)]

    def merge(blocks: list[str] | None) -> ChainResult:
        return chain_of_merges(None, experts, data, target=target, blocks=blocks, diagnostics=True)

    whole, cached = merge(None), merge(["layers.0", "layers.1"])
    assert same(whole.model, cached.model, 1e-9)
    names = ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"]
    order = ["stem", *(f"layers.{i}.{name}" for i in range(2) for name in names), "head"]
    assert [report.names[0] for report in whole.layers] == order
    assert [report.names[0] for report in cached.layers] == order
    assert whole.layers[1].num_rows == [int(mask.sum())] * 2
    assert whole.layers[-1].num_rows == [6, 6]
    for one, two in zip(whole.layers, cached.layers, strict=True):
        assert one.shift_after == pytest.approx(two.shift_after, abs=1e-9)


def test_convolutions_are_averaged_or_solved_on_their_patches() -> None:
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False)).double() for _ in range(2)]
    images = [torch.randn(4, 2, 6, 6, dtype=torch.float64) for _ in range(2)]
    data = [[x] for x in images]
    averaged = chain_of_merges(None, experts, data)
    assert averaged.layers == []
    torch.testing.assert_close(
        averaged.model.get_parameter("0.weight"), (experts[0][0].weight + experts[1][0].weight) / 2
    )
    solved = chain_of_merges(None, experts, data, conv=True, off_diagonal=1.0, ridge=0.0).model
    weight = solved.get_parameter("0.weight")

    def objective(value: Tensor) -> Tensor:
        convolved = [torch.nn.functional.conv2d(x, value, padding=1) for x in images]
        return torch.stack([((y - e(x)) ** 2).sum() for y, e, x in zip(convolved, experts, images, strict=True)]).sum()

    (gradient,) = torch.autograd.grad(objective(weight), weight)
    assert float(gradient.abs().max()) < 1e-8


def test_half_precision_experts_give_a_half_precision_network() -> None:
    experts, batches = mlp_problem()
    halves = [copy.deepcopy(model).bfloat16() for model in experts]
    result = chain_of_merges(None, halves, [[x.bfloat16() for x in own] for own in batches]).model
    exact = chain_of_merges(None, experts, batches).model
    assert all(value.dtype == torch.bfloat16 for value in result.parameters())
    assert same(result.double(), exact, 0.1)


def test_the_experts_are_left_alone() -> None:
    experts, batches = mlp_problem()
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in experts]
    experts[0].train()
    chain_of_merges(None, experts, batches, target="expert", diagnostics=True)
    assert experts[0].training
    for model, state in zip(experts, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


# ---- what is refused


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    experts, batches = mlp_problem()
    with pytest.raises(UserError, match="one data set"):
        chain_of_merges(None, experts, batches[:2])
    with pytest.raises(UserError, match="task 2 has no calibration batches"):
        chain_of_merges(None, experts, [batches[0], [], batches[2]])
    with pytest.raises(UserError, match=r"model 2 differs from the first in parameter 'fc\.0\.bias'"):
        chain_of_merges(None, [experts[0], Mlp((6, 7, 8, 4)).double(), experts[2]], batches)
    with pytest.raises(UserError, match="no models"):
        chain_of_merges(None, [], [])
    with pytest.raises(ValueError, match="off_diagonal"):
        chain_of_merges(None, experts, batches, off_diagonal=1.5)


def test_batch_norm_is_refused() -> None:
    experts = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    with pytest.raises(UserError, match="'1' is a BatchNorm"):
        chain_of_merges(None, experts, [[torch.randn(5, 4)]] * 2)


def test_blocks_that_are_no_sequence_are_refused() -> None:
    torch.manual_seed(0)
    experts = [jittered(Transformer(3).double(), seed) for seed in range(2)]
    data = [[torch.randn(6, 4, 5, dtype=torch.float64)] for _ in range(2)]
    for blocks, message in (
        (["blocks.1", "blocks.0"], "does not run on the output of block 'blocks.1'"),
        (["blocks.7"], "no block 'blocks.7'"),
        (["blocks.0", "head"], "does not run on the output"),
    ):
        with pytest.raises(UserError, match=message):
            chain_of_merges(None, experts, data, blocks=blocks)
