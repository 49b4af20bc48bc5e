"""What soft-DTW and its divergence promise: fixtures, identities, independent references and errors."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neurocl.spiking import softdtw_numba, softdtw_torch
from neurocl.spiking.softdtw import (
    soft_dtw,
    soft_dtw_alignment,
    soft_dtw_divergence,
    soft_dtw_from_cost,
)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "staer"
BACKENDS = ("torch", "numba")
TOLERANCE = {torch.float64: {"rtol": 1e-6, "atol": 1e-8}, torch.float32: {"rtol": 2e-4, "atol": 2e-4}}

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def cases(name: str) -> list[dict[str, Any]]:
    with np.load(FIXTURES / name) as arrays:
        return [
            {key.removeprefix(f"c{i}_"): arrays[key] for key in arrays.files if key.startswith(f"c{i}_")}
            for i in range(int(arrays["n_cases"]))
        ]


def series(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_dtw(cost: Tensor) -> float:
    """Classical DTW of one cost matrix, cell by cell."""
    m, n = cost.shape
    best = [[math.inf] * (n + 1) for _ in range(m + 1)]
    best[0][0] = 0.0
    for i in range(m):
        for j in range(n):
            best[i + 1][j + 1] = float(cost[i, j]) + min(best[i][j + 1], best[i + 1][j], best[i][j])
    return best[m][n]


def num_paths(m: int, n: int) -> int:
    """Number of monotone alignments of m with n steps (Delannoy)."""
    if m == 1 or n == 1:
        return 1
    return num_paths(m - 1, n) + num_paths(m, n - 1) + num_paths(m - 1, n - 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", cases("soft_dtw.npz"))
def test_soft_dtw_of_a_cost_matrix_equals_the_fixture(case: dict[str, Any], dtype: torch.dtype) -> None:
    cost = torch.tensor(case["cost"], dtype=dtype, requires_grad=True)
    value = soft_dtw_from_cost(cost, float(case["gamma"]))
    expected = torch.tensor(case["value"], dtype=dtype)
    torch.testing.assert_close(value.detach(), expected, **TOLERANCE[dtype])
    (alignment,) = torch.autograd.grad(value.sum(), cost, retain_graph=True)
    torch.testing.assert_close(alignment, torch.tensor(case["alignment"], dtype=dtype), **TOLERANCE[dtype])
    (grad,) = torch.autograd.grad((torch.tensor(case["w"], dtype=dtype) * value).sum(), cost)
    torch.testing.assert_close(grad, torch.tensor(case["grad_w"], dtype=dtype), **TOLERANCE[dtype])


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", cases("sdtw_divergence.npz"))
def test_the_divergence_equals_the_fixture(case: dict[str, Any], dtype: torch.dtype, backend: Any) -> None:
    x = torch.tensor(case["x"], dtype=dtype, requires_grad=True)
    y = torch.tensor(case["y"], dtype=dtype, requires_grad=True)
    options: dict[str, Any] = {"normalize": bool(case["normalize"]), "backend": backend}
    gamma, close = float(case["gamma"]), TOLERANCE[dtype]

    def check(result: Tensor, name: str) -> None:
        torch.testing.assert_close(result.detach(), torch.tensor(case[name], dtype=dtype), **close)

    per_sample = soft_dtw_divergence(x, y, gamma, reduction="none", **options)
    check(per_sample, "per_sample" if dtype == torch.float64 else "per_sample_f32")
    mean = soft_dtw_divergence(x, y, gamma, **options)
    check(mean, "mean")
    grad_x, grad_y = torch.autograd.grad(mean, (x, y))
    check(grad_x, "grad_x")
    check(grad_y, "grad_y")
    check(soft_dtw_divergence(x, x, gamma, reduction="none", **options), "self")


@each_backend
@pytest.mark.parametrize(("t1", "t2"), [(1, 1), (2, 2), (4, 3), (3, 6), (1, 4)])
@pytest.mark.parametrize("function", [soft_dtw, soft_dtw_divergence])
def test_gradients_pass_gradcheck(function: Any, t1: int, t2: int, backend: str) -> None:
    x = series(3, t1, 2, seed=1).requires_grad_()
    y = series(3, t2, 2, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: function(x, y, 0.7, backend=backend), (x, y))


def test_the_gradient_with_respect_to_the_cost_passes_gradcheck() -> None:
    cost = series(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda cost: soft_dtw_from_cost(cost, 0.5), (cost,))


@each_backend
def test_a_constant_series_gets_no_gradient_and_changes_none(backend: Any) -> None:
    x, y = series(5, 4, 3, seed=1), series(5, 2, 3, seed=2)
    both = [x.clone().requires_grad_(), y.clone().requires_grad_()]
    soft_dtw_divergence(*both, backend=backend).backward()
    only_x = x.clone().requires_grad_()
    soft_dtw_divergence(only_x, y, backend=backend).backward()
    assert y.grad is None
    assert torch.equal(only_x.grad, both[0].grad)
    only_y = y.clone().requires_grad_()
    soft_dtw_divergence(x, only_y, backend=backend).backward()
    assert torch.equal(only_y.grad, both[1].grad)
    assert not soft_dtw(x, y, backend=backend).requires_grad


@each_backend
def test_nothing_is_recorded_without_grad_mode(backend: Any) -> None:
    x = series(2, 3, 2).requires_grad_()
    with torch.no_grad():
        assert not soft_dtw(x, x, backend=backend).requires_grad


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    x, y = series(2, 3, 2, seed=1).requires_grad_(), series(2, 3, 2, seed=2)
    for value in (soft_dtw(x, y), soft_dtw_from_cost(x)):
        with pytest.raises(RuntimeError, match="differentiated only once"):
            torch.autograd.grad(value.sum(), x, create_graph=True)


@each_backend
def test_the_divergence_of_a_series_with_itself_is_zero(backend: Any) -> None:
    x = series(6, 5, 3).requires_grad_()
    divergence = soft_dtw_divergence(x, x.detach(), reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(divergence.sum(), x)
    assert divergence.abs().max() < 1e-12
    assert grad.abs().max() < 1e-12


@each_backend
def test_the_divergence_is_never_negative(backend: Any) -> None:
    for gamma in (0.01, 1.0, 100.0):
        x, y = series(40, 5, 2, seed=1) * 0.1, series(40, 7, 2, seed=2) * 0.1
        assert soft_dtw_divergence(x, y, gamma, reduction="none", backend=backend).min() >= -1e-12


@each_backend
def test_soft_dtw_is_symmetric(backend: Any) -> None:
    x, y = series(9, 4, 3, seed=1), series(9, 7, 3, seed=2)
    torch.testing.assert_close(soft_dtw(x, y, backend=backend), soft_dtw(y, x, backend=backend), rtol=1e-13, atol=1e-13)


def test_normalising_divides_by_the_mean_length() -> None:
    x, y = series(4, 3, 2, seed=1), series(4, 7, 2, seed=2)
    raw = soft_dtw_divergence(x, y, normalize=False, reduction="none")
    torch.testing.assert_close(soft_dtw_divergence(x, y, reduction="none"), raw / 5)
    torch.testing.assert_close(soft_dtw_divergence(x, y), raw.mean() / 5)


@each_backend
@pytest.mark.parametrize("gamma", [1.0, 1e-2, 1e-5])
def test_soft_dtw_lies_below_dtw_by_at_most_gamma_times_the_log_of_the_number_of_paths(
    gamma: float, backend: Any
) -> None:
    x, y = series(6, 5, 3, seed=1), series(6, 4, 3, seed=2)
    cost = 0.5 * (x[:, :, None] - y[:, None]).square().sum(3)
    dtw = torch.tensor([plain_dtw(matrix) for matrix in cost], dtype=x.dtype)
    gap = dtw - soft_dtw(x, y, gamma, backend=backend)
    assert gap.min() >= -1e-12
    assert gap.max() <= gamma * math.log(num_paths(5, 4)) + 1e-12


@each_backend
def test_equal_costs_give_the_log_of_the_number_of_paths(backend: Any) -> None:
    zeros = torch.zeros(3, 6, 2, dtype=torch.float64)
    value = soft_dtw(zeros, zeros[:, :4], 0.5, backend=backend)
    torch.testing.assert_close(value, torch.full_like(value, -0.5 * math.log(num_paths(6, 4))))


def test_the_alignment_is_the_gradient_with_respect_to_the_cost() -> None:
    x, y = series(3, 4, 2, seed=1), series(3, 6, 2, seed=2)
    cost = (0.5 * (x[:, :, None] - y[:, None]).square().sum(3)).requires_grad_()
    (expected,) = torch.autograd.grad(soft_dtw_from_cost(cost, 0.3).sum(), cost)
    alignment = soft_dtw_alignment(x, y, 0.3)
    torch.testing.assert_close(alignment, expected)
    corners = alignment[:, [0, -1], [0, -1]]
    torch.testing.assert_close(corners, torch.ones_like(corners))
    assert alignment.min() >= 0
    assert alignment.max() <= 1 + 1e-12
    # every step of either series is matched at least once
    assert alignment.sum(1).min() >= 1 - 1e-12
    assert alignment.sum(2).min() >= 1 - 1e-12


def assert_kernels_agree(x: Tensor, y: Tensor, gamma: float, divergence: bool) -> None:
    options: dict[str, Any] = {"divergence": divergence, "scale": 0.7, "want_x": True, "want_y": True}
    ours = softdtw_numba.evaluate(x, y, gamma, **options)
    reference = softdtw_torch.evaluate(x, y, gamma, **options)
    bound = 1e-11 if x.dtype == torch.float64 else 1e-4
    for result, expected in zip(ours, reference, strict=True):
        assert result is not None
        assert expected is not None
        assert result.shape == expected.shape
        torch.testing.assert_close(result, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "size",
    [
        (1, 1, 1, 1),
        (1, 2, 2, 10),
        (17, 4, 4, 10),
        (17, 3, 9, 1),
        (8, 9, 3, 16),
        (16, 2, 8, 17),
        (33, 16, 16, 100),
        (5, 1, 7, 3),
        (5, 7, 1, 33),
        (2, 64, 50, 4),
        (0, 3, 2, 4),
    ],
    ids=str,
)
def test_the_compiled_kernel_equals_the_reference(size: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, t1, t2, width = size
    x = series(batch, t1, width, seed=1, dtype=dtype)
    y = series(batch, t2, width, seed=2, dtype=dtype)
    assert_kernels_agree(x, y, 1.0, divergence=False)
    assert_kernels_agree(x, y, 1.0, divergence=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 20),
    t1=st.integers(1, 12),
    t2=st.integers(1, 12),
    width=st.integers(1, 20),
    gamma=st.floats(0.05, 20.0),
    seed=st.integers(0, 1000),
    divergence=st.booleans(),
)
def test_the_compiled_kernel_equals_the_reference_at_any_shape(
    batch: int, t1: int, t2: int, width: int, gamma: float, seed: int, divergence: bool
) -> None:
    x, y = series(batch, t1, width, seed=seed), series(batch, t2, width, seed=seed + 1)
    assert_kernels_agree(x, y, gamma, divergence)


@pytest.mark.parametrize("gamma", [0.1, 1.0])
def test_soft_dtw_equals_tslearn(gamma: float) -> None:
    metrics = pytest.importorskip("tslearn.metrics")

    def half_distances(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (x[:, :, None] - y[:, None]).square().sum(3)

    x = series(7, 5, 3, seed=1, dtype=torch.float32).requires_grad_()
    y = series(7, 8, 3, seed=2, dtype=torch.float32)
    for normalize in (False, True):
        peer = metrics.SoftDTWLossPyTorch(gamma=gamma, normalize=normalize, dist_func=half_distances)(x, y)
        if normalize:
            ours = soft_dtw_divergence(x, y, gamma, normalize=False, reduction="none")
        else:
            ours = soft_dtw(x, y, gamma)
        torch.testing.assert_close(ours, peer, rtol=1e-4, atol=1e-4)
        (our_grad,) = torch.autograd.grad(ours.sum(), x)
        (peer_grad,) = torch.autograd.grad(peer.sum(), x)
        torch.testing.assert_close(our_grad, peer_grad, rtol=1e-4, atol=1e-4)


def test_the_number_of_threads_does_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softdtw_numba, "PARALLEL_WORK", 0)
    x, y = series(100, 6, 10, seed=1), series(100, 4, 10, seed=2)
    options: dict[str, Any] = {"divergence": True, "scale": 1.0, "want_x": True, "want_y": True}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = softdtw_numba.evaluate(x, y, 1.0, **options)
        torch.set_num_threads(3)
        together = softdtw_numba.evaluate(x, y, 1.0, **options)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, together, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_a_sample_does_not_depend_on_the_rest_of_its_batch() -> None:
    x, y = series(37, 5, 3, seed=1, dtype=torch.float32), series(37, 4, 3, seed=2, dtype=torch.float32)
    alone = torch.cat([soft_dtw(x[b : b + 1], y[b : b + 1]) for b in range(len(x))])
    assert torch.equal(soft_dtw(x, y), alone)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, backend: Any) -> None:
    x = series(4, 3, 5, seed=1).to(dtype).requires_grad_()
    y = series(4, 2, 5, seed=2).to(dtype)
    value = soft_dtw_divergence(x, y, reduction="none", backend=backend)
    expected = soft_dtw_divergence(x.detach().float(), y.float(), reduction="none", backend=backend)
    assert value.dtype == torch.float32
    assert torch.equal(value.detach(), expected)
    value.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


@each_backend
def test_autocast_does_not_lower_the_precision(backend: Any) -> None:
    x = series(4, 3, 5, seed=1, dtype=torch.float32).requires_grad_()
    y = series(4, 2, 5, seed=2, dtype=torch.float32)
    (expected,) = torch.autograd.grad(soft_dtw(x, y, backend=backend).sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (grad,) = torch.autograd.grad(soft_dtw(x, y, backend=backend).sum(), x)
    assert torch.equal(grad, expected)


@each_backend
def test_strides_do_not_matter(backend: Any) -> None:
    base_x, base_y = series(4, 6, 20, seed=1), series(6, 2, 10, seed=2)
    views = (base_x.transpose(0, 1)[:, :, ::2], base_y[:, :1].expand(6, 3, 10))
    results = []
    for x, y in (views, [view.contiguous() for view in views]):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        value = soft_dtw(x, y, backend=backend)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), (x, y))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_time_major_logits_get_their_gradient_through_the_view() -> None:
    logits = series(4, 6, 10).requires_grad_()
    past = series(6, 2, 10, seed=1)
    soft_dtw(logits.transpose(0, 1), past).sum().backward()
    batch_major = logits.detach().transpose(0, 1).contiguous().requires_grad_()
    soft_dtw(batch_major, past).sum().backward()
    assert torch.equal(logits.grad, batch_major.grad.transpose(0, 1))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_huge_costs_give_the_hard_alignment_and_no_nan(dtype: torch.dtype, backend: Any) -> None:
    x = (series(5, 6, 4, seed=1, dtype=dtype) * 1000).requires_grad_()
    y = series(5, 4, 4, seed=2, dtype=dtype) * 1000
    cost = 0.5 * (x.detach()[:, :, None] - y[:, None]).square().sum(3)
    assert cost.max() > 1e6
    value = soft_dtw(x, y, backend=backend)
    dtw = torch.tensor([plain_dtw(matrix) for matrix in cost], dtype=dtype)
    torch.testing.assert_close(value.detach(), dtw, rtol=1e-5, atol=0.0)
    (grad,) = torch.autograd.grad(value.sum(), x)
    assert grad.isfinite().all()


@each_backend
def test_a_nan_in_the_series_shows_in_its_own_value_only(backend: Any) -> None:
    x, y = series(4, 3, 2, seed=1), series(4, 3, 2, seed=2)
    x[2, 1, 0] = math.nan
    value = soft_dtw(x, y, backend=backend)
    assert value.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, 1), {}, r"must be \[B, T, K\]"),
        (torch.zeros(2, 3, 4), torch.zeros(3, 3, 4), {}, "agree in B and K"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), {}, "agree in B and K"),
        (torch.zeros(2, 0, 4), torch.zeros(2, 3, 4), {}, "at least one step"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).double(), {}, "one dtype"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, device="meta"), {}, "one device"),
        (torch.zeros(2, 3, 4).long(), torch.zeros(2, 3, 4).long(), {}, "must be float32"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), {"gamma": 0.0}, "gamma must be above 0"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), {"gamma": -1.0}, "gamma must be above 0"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), {"gamma": math.nan}, "gamma must be above 0"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), {"backend": "cuda"}, "backend must be"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), {"backend": "triton"}, "runs on CUDA"),
    ],
)
@pytest.mark.parametrize("function", [soft_dtw, soft_dtw_divergence])
def test_wrong_arguments_are_named(function: Any, x: Tensor, y: Tensor, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(x, y, **options)


def test_the_divergence_of_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="B = 0"):
        soft_dtw_divergence(torch.zeros(0, 2, 3), torch.zeros(0, 2, 3))
    assert soft_dtw(torch.zeros(0, 2, 3), torch.zeros(0, 2, 3)).shape == (0,)


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction must be"):
        soft_dtw_divergence(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), reduction="sum")  # type: ignore[arg-type]


@pytest.mark.parametrize("cost", [torch.zeros(3, 2), torch.zeros(3, 0, 2), torch.zeros(3, 2, 2).long()])
def test_a_wrong_cost_matrix_is_refused(cost: Tensor) -> None:
    with pytest.raises(ValueError, match=r"cost must be floating point \[B, M, N\]"):
        soft_dtw_from_cost(cost)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a CUDA device, or TRITON_INTERPRET=1 to run the kernel on the CPU",
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("divergence", [False, True])
@pytest.mark.parametrize(
    "size", [(3, 2, 2, 4), (2, 4, 3, 5), (1, 1, 1, 1), (2, 3, 8, 40), (2, 6, 1, 3), (1, 32, 20, 3)], ids=str
)
def test_the_cuda_kernel_equals_the_reference(size: tuple[int, ...], divergence: bool, dtype: torch.dtype) -> None:
    from neurocl.spiking import softdtw_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, t1, t2, width = size
    x = series(batch, t1, width, seed=1, dtype=dtype).to(device)
    y = series(batch, t2, width, seed=2, dtype=dtype).to(device)
    bound = 1e-11 if dtype == torch.float64 else 1e-4
    for want_x, want_y in ((True, True), (True, False), (False, False)):
        options: dict[str, Any] = {"divergence": divergence, "scale": 0.7, "want_x": want_x, "want_y": want_y}
        ours = softdtw_triton.evaluate(x, y, 0.3, **options)
        reference = softdtw_torch.evaluate(x, y, 0.3, **options)
        for result, expected in zip(ours, reference, strict=True):
            assert (result is None) == (expected is None)
            if result is not None:
                torch.testing.assert_close(result, expected, rtol=bound, atol=bound)
