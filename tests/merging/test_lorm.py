"""Closed-form merging of LoRA factors against published results, least squares and exact identities."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from neurocl.merging.lorm import RunningTaskMerge, merge_a, merge_b, projected, regmean_weights
from tests.conftest import reference

LAYERS = ("blk.attn.qkv.weight", "blk.mlp.fc2.weight")


def close(value: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return float((value.double() - expected.double()).norm() / expected.double().norm()) < tolerance


def arrays_of(name: str) -> dict[str, Tensor]:
    return {key: torch.as_tensor(value) for key, value in reference(f"merging-lorm/{name}").items()}


def problem(n: int = 3, o: int = 5, d: int = 6, r: int = 2) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Bs [n, o, r], As [n, r, d], inputs and their summed Gram matrices."""
    torch.manual_seed(2)
    inputs = [torch.randn(20 + 7 * i, d, dtype=torch.float64) for i in range(n)]
    grams = torch.stack([x.T @ x for x in inputs])
    return torch.randn(n, o, r).double(), torch.randn(n, r, d).double(), inputs, grams


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("unseen", ["mean", "zero"])
def test_published_rounds_are_met(layer: str, unseen: str) -> None:
    arrays = arrays_of("lorm_closed_form")

    def stacked(group: str, what: str) -> Tensor:
        return torch.stack([arrays[f"x/{group}/client{i}/{what}/{layer}"] for i in range(3)])

    merged_a = merge_a(stacked("A", "A"), stacked("A", "gram"), unseen=unseen)
    assert merged_a.dtype == torch.float32
    assert close(merged_a, arrays[f"x/A/merged_A/{layer}"])
    assert torch.equal(stacked("A", "B")[0], arrays[f"x/A/merged_B/{layer}"])
    shared = stacked("B", "A")[0]
    assert close(
        merge_b(shared, stacked("B", "B"), stacked("B", "gram"), unseen=unseen), arrays[f"x/B/merged_B/{layer}"]
    )


@pytest.mark.parametrize("group", ["A", "B"])
def test_published_heads_are_met(group: str) -> None:
    arrays = arrays_of("lorm_closed_form")
    heads = torch.stack([arrays[f"x/{group}/client{i}/head_w"] for i in range(3)])
    grams = torch.stack([arrays[f"x/{group}/client{i}/gram_head"] for i in range(3)])
    assert close(regmean_weights(heads, grams), arrays[f"x/{group}/merged_head_w"])


@pytest.mark.parametrize("layer", LAYERS)
def test_published_task_merges_are_met(layer: str) -> None:
    arrays = arrays_of("lorm_closed_form")
    running = RunningTaskMerge.empty(*arrays[f"x/W0/{layer}"].shape)
    for t in range(3):
        gram = torch.stack([arrays[f"x/task/t{t}/client{i}/gram/{layer}"] for i in range(3)]).sum(0)
        running.add(arrays[f"x/task/t{t}/B/{layer}"], arrays[f"x/task/t{t}/A/{layer}"], gram)
        if t:
            for unseen in ("mean", "zero"):
                merged = arrays[f"x/W0/{layer}"] + running.value(unseen=unseen)
                assert close(merged, arrays[f"x/task/t{t}/merged_W/{layer}"], 1e-3)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("unseen", ["mean", "zero"])
def test_published_regmean_is_met_and_is_joint_least_squares(layer: str, unseen: str) -> None:
    arrays = arrays_of("regmean")
    weights = torch.stack([arrays[f"x/client{i}/W/{layer}"] for i in range(3)]).double()
    inputs = [arrays[f"x/client{i}/X/{layer}"].double() for i in range(3)]
    grams = torch.stack([x.T @ x for x in inputs])
    for factor in ("1.0", "0.9", "0.5", "0.0"):
        merged = regmean_weights(weights, grams, off_diagonal=float(factor), unseen=unseen)
        assert close(merged, arrays[f"x/out_alpha{factor}/{layer}"])
    assert close(regmean_weights(weights, grams, unseen=unseen), arrays[f"x/lstsq64/{layer}"], 1e-12)


def test_one_client_or_identical_clients_get_their_factor_back() -> None:
    Bs, As, _, grams = problem()
    assert torch.equal(merge_a(As[:1], grams[:1]), As[0])
    assert torch.equal(merge_b(As[0], Bs[:1], grams[:1]), Bs[0])
    assert torch.equal(merge_a(As[:1].expand(3, -1, -1), grams), As[0])
    assert torch.equal(merge_b(As[0], Bs[:1].expand(3, -1, -1), grams), Bs[0])


def test_the_residual_of_both_rules_is_orthogonal_to_the_data() -> None:
    Bs, As, _, grams = problem()
    A = As[0]
    B = merge_b(A, Bs, grams)
    left = sum((B @ A - own @ A) @ gram @ A.T for own, gram in zip(Bs, grams, strict=True))
    torch.testing.assert_close(left, torch.zeros_like(B), rtol=0, atol=1e-10)
    merged = merge_a(As, grams)
    left = sum((merged - own) @ gram for own, gram in zip(As, grams, strict=True))
    torch.testing.assert_close(left, torch.zeros_like(merged), rtol=0, atol=1e-10)


def test_the_a_rule_is_least_squares_on_the_stacked_rows() -> None:
    _, As, inputs, grams = problem()
    targets = torch.cat([x @ own.T for x, own in zip(inputs, As, strict=True)])
    torch.testing.assert_close(merge_a(As, grams), torch.linalg.lstsq(torch.cat(inputs), targets).solution.T)


def test_perturbing_the_merged_b_never_lowers_the_objective() -> None:
    Bs, As, inputs, grams = problem()
    A = As[0]

    def objective(B: Tensor) -> float:
        errors = [((x @ (B @ A - own @ A).T) ** 2).sum() for x, own in zip(inputs, Bs, strict=True)]
        return float(torch.stack(errors).sum())

    B = merge_b(A, Bs, grams)
    lowest = objective(B)
    assert all(objective(B + 0.01 * torch.randn_like(B)) > lowest for _ in range(20))


def test_equal_grams_average_and_scale_and_order_do_not_matter() -> None:
    Bs, As, _, grams = problem()
    same = grams[:1].expand(3, -1, -1)
    torch.testing.assert_close(merge_a(As, same), As.mean(0))
    torch.testing.assert_close(merge_b(As[0], Bs, same), Bs.mean(0))
    torch.testing.assert_close(merge_a(As, 9 * grams), merge_a(As, grams))
    order = [2, 0, 1]
    torch.testing.assert_close(merge_b(As[0], Bs[order], grams[order]), merge_b(As[0], Bs, grams))


def test_the_product_of_a_b_round_does_not_depend_on_the_gauge() -> None:
    Bs, As, _, grams = problem()
    A, R = As[0], torch.randn(2, 2, dtype=torch.float64)
    turned = merge_b(R @ A, Bs @ torch.linalg.inv(R), grams) @ R @ A
    torch.testing.assert_close(turned, merge_b(A, Bs, grams) @ A)


def test_a_diagonal_is_exploited_and_means_the_same_as_a_diagonal_matrix() -> None:
    Bs, As, _, grams = problem()
    diagonal = grams.diagonal(dim1=1, dim2=2)
    dense = torch.diag_embed(diagonal)
    expected = (As * diagonal.unsqueeze(1)).sum(0) / diagonal.sum(0)
    for value in (merge_a(As, diagonal), merge_a(As, grams, off_diagonal=0.0), merge_a(As, dense)):
        torch.testing.assert_close(value, expected)
    torch.testing.assert_close(projected(As[0], diagonal), As[0] @ dense @ As[0].T)
    for value in (merge_b(As[0], Bs, grams, off_diagonal=0.0), merge_b(As[0], Bs, dense)):
        torch.testing.assert_close(value, merge_b(As[0], Bs, diagonal))


def test_clients_with_disjoint_inputs_keep_their_own_columns() -> None:
    _, As, inputs, _ = problem(n=2)
    inputs[0][:, 3:] = 0
    inputs[1][:, :3] = 0
    diagonal = torch.stack([(x**2).sum(0) for x in inputs])
    torch.testing.assert_close(merge_a(As, diagonal), torch.cat([As[0][:, :3], As[1][:, 3:]], 1))


def test_unseen_inputs_get_the_mean_or_zero() -> None:
    _, As, inputs, _ = problem()
    for x in inputs:
        x[:, 1] = 0
    grams = torch.stack([x.T @ x for x in inputs])
    for given in (grams, grams.diagonal(dim1=1, dim2=2)):
        torch.testing.assert_close(merge_a(As, given)[:, 1], As.mean(0)[:, 1])
        assert float(merge_a(As, given, unseen="zero")[:, 1].abs().max()) < 1e-12
    torch.testing.assert_close(merge_a(As, torch.zeros_like(grams)), As.mean(0))


def test_dependent_rows_of_a_do_no_harm() -> None:
    Bs, As, _, grams = problem()
    A = torch.stack([As[0, 0], 2 * As[0, 0]])
    merged = merge_b(A, Bs, grams) @ A
    assert merged.isfinite().all()
    left = sum((merged - own @ A) @ gram @ A.T for own, gram in zip(Bs, grams, strict=True))
    torch.testing.assert_close(left, torch.zeros(5, 2).double(), rtol=0, atol=1e-9)


def test_a_client_without_data_has_no_say() -> None:
    Bs, As, _, grams = problem()
    grams[2] = 0
    torch.testing.assert_close(merge_a(As, grams), merge_a(As[:2], grams[:2]))
    torch.testing.assert_close(merge_b(As[0], Bs, grams), merge_b(As[0], Bs[:2], grams[:2]))


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_running_merge_equals_the_batch_formula(diagonal: bool) -> None:
    Bs, As, _, grams = problem()
    running = RunningTaskMerge.empty(5, 6, diagonal=diagonal)
    for t, (B, A, gram) in enumerate(zip(Bs, As, grams, strict=True), 1):
        running.add(B, A, gram)
        if t == 1:
            torch.testing.assert_close(running.value(), B @ A, rtol=1e-12, atol=1e-12)
        batch = regmean_weights(Bs[:t] @ As[:t], grams[:t], off_diagonal=0.0 if diagonal else 1.0)
        torch.testing.assert_close(running.value(), batch)
    assert running.gram.numel() == (6 if diagonal else 36)


def test_the_running_merge_shrinks_like_the_batch_formula_and_checks_shapes() -> None:
    Bs, As, _, grams = problem()
    running = RunningTaskMerge.empty(5, 6)
    with pytest.raises(ValueError, match="no task"):
        running.value()
    for B, A, gram in zip(Bs, As, grams, strict=True):
        running.add(B, A, gram, off_diagonal=0.5)
    torch.testing.assert_close(running.value(), regmean_weights(Bs @ As, grams, off_diagonal=0.5))
    with pytest.raises(ValueError, match="expected"):
        running.add(Bs[0], As[0], grams[0].diagonal())


def test_alternating_rounds_never_raise_the_global_objective() -> None:
    torch.manual_seed(3)
    inputs = [torch.randn(30, 6, dtype=torch.float64) for _ in range(3)]
    targets = [x @ torch.randn(6, 5, dtype=torch.float64) for x in inputs]
    grams = torch.stack([x.T @ x for x in inputs])
    B, A = torch.randn(5, 2, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)

    def objective() -> float:
        errors = [((x @ (B @ A).T - y) ** 2).sum() for x, y in zip(inputs, targets, strict=True)]
        return float(torch.stack(errors).sum())

    values = [objective()]
    for _ in range(4):
        Bs = [torch.linalg.lstsq(x @ A.T, y).solution.T for x, y in zip(inputs, targets, strict=True)]
        B = merge_b(A, torch.stack(Bs), grams)
        values.append(objective())
        pseudo = torch.linalg.pinv(B)
        As = [pseudo @ torch.linalg.lstsq(x, y).solution.T for x, y in zip(inputs, targets, strict=True)]
        A = merge_a(torch.stack(As), grams)
        values.append(objective())
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(values))
