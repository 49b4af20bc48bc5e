"""What the LIF neuron promises, for every back end: exact spikes, exact gradients, nothing kept but the input."""

from __future__ import annotations

import copy
import logging
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neurocl.spiking.neuron import lif, lif_membrane, lif_residual, norm_lif

FIXTURE = Path(__file__).parents[1] / "fixtures" / "staer" / "lif.npz"
CPU_BACKENDS = ("torch", "numba")
FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def gradients(function: Callable[..., Tensor], *inputs: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Result of ``function`` and the gradient of every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    return result.detach(), *torch.autograd.grad(result, leaves, grad)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return 1 / (1 + (torch.pi * v) ** 2) * grad


def plain_loop(x: Tensor, decay: Any = 0.5, threshold: Any = 1.0, reset: str = "delayed") -> Tensor:
    """The equations of the three resets, written for autograd, alpha 2."""
    held, spikes = torch.zeros_like(x[0]), []
    late = torch.zeros_like(x[0])
    for current in x:
        u = decay * held + current - late
        s = _Step.apply(u - threshold)
        spikes.append(s)
        fired = s.detach()
        held, late = u, torch.zeros_like(u)
        if reset == "delayed":
            late = threshold * fired
        elif reset == "immediate":
            held = u - threshold * fired
        else:
            held = u * (1 - fired)
    return torch.stack(spikes)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_spikes_membranes_and_gradients_match_the_published_code(backend: str) -> None:
    data = np.load(FIXTURE)
    for i in range(int(data["n_cases"])):
        case = {name: data[f"c{i}_{name}"] for name in ("x", "spikes", "membrane", "w", "grad_x")}
        constants = {"decay": float(data[f"c{i}_beta"]), "threshold": float(data[f"c{i}_threshold"])}
        x, w = torch.from_numpy(case["x"]), torch.from_numpy(case["w"])
        spikes, grad = gradients(lambda x: lif(x, backend=backend, **constants), x, grad=w)  # noqa: B023
        np.testing.assert_array_equal(spikes, case["spikes"])
        np.testing.assert_allclose(grad, case["grad_x"], rtol=1e-5, atol=1e-5)
        spikes, membrane = lif_membrane(x, **constants)
        np.testing.assert_array_equal(spikes, case["spikes"])
        np.testing.assert_allclose(membrane, case["membrane"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("alpha", [2.0, 5.0])
def test_equals_snntorch(backend: str, alpha: float) -> None:
    snntorch = pytest.importorskip("snntorch")
    node = snntorch.Leaky(beta=0.5, threshold=1.0, spike_grad=snntorch.surrogate.atan(alpha))

    def reference(x: Tensor) -> Tensor:
        membrane, spikes = node.reset_mem(), []
        for current in x:
            fired, membrane = node(current, membrane)
            spikes.append(fired)
        return torch.stack(spikes)

    x, w = 1.5 * torch.randn(6, 3, 1111), torch.randn(6, 3, 1111)
    ours = gradients(lambda x: lif(x, alpha=alpha, backend=backend), x, grad=w)
    theirs = gradients(reference, x, grad=w)
    assert torch.equal(ours[0], theirs[0])
    if alpha == 2.0:
        assert torch.equal(ours[1], theirs[1])
    torch.testing.assert_close(ours[1], theirs[1])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_membrane_at_the_threshold_does_not_fire(backend: str) -> None:
    # 1.0 is a tie; 0.5 * 1.0 + 1.0 = 1.5 fires; 0.5 * 1.5 + 1.25 - 1 = 1.0 is a tie again; 0.5 + 0.5 = 1.0 too.
    x = torch.tensor([1.0, 1.0, 1.25, 0.5])[:, None]
    assert lif(x, backend=backend).flatten().tolist() == [0, 1, 0, 0]
    assert lif_membrane(x)[1].flatten().tolist() == [1.0, 1.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("reset", "membranes"),
    # Charged with 2 at every step: delayed 0.5u + 2 - 1; immediate 0.5(u - 1) + 2; hard 0.5 * 0 + 2.
    [("delayed", [2.0, 2.0, 2.0]), ("immediate", [2.0, 2.5, 2.75]), ("hard", [2.0, 2.0, 2.0])],
)
def test_each_reset_follows_its_equation(reset: Any, membranes: list[float]) -> None:
    assert lif_membrane(torch.full((3, 1), 2.0), reset=reset)[1].flatten().tolist() == membranes


@pytest.mark.parametrize("reset", ["delayed", "immediate", "hard"])
def test_each_reset_equals_a_loop_recorded_by_autograd(reset: Any) -> None:
    x, w = 2 * torch.randn(5, 41, dtype=torch.float64), torch.randn(5, 41, dtype=torch.float64)
    expected = gradients(lambda x: plain_loop(x, 0.7, 0.9, reset), x, grad=w)
    for function in (
        lambda x: lif(x, decay=0.7, threshold=0.9, reset=reset),
        lambda x: lif_membrane(x, decay=0.7, threshold=0.9, reset=reset)[0],
    ):
        spikes, grad = gradients(function, x, grad=w)
        assert torch.equal(spikes, expected[0])
        torch.testing.assert_close(grad, expected[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reset", ["delayed", "immediate", "hard"])
def test_learnable_decay_and_threshold_get_the_gradients_of_the_loop(reset: Any) -> None:
    x, w = 2 * torch.randn(5, 41, dtype=torch.float64), torch.randn(5, 41, dtype=torch.float64)
    decay, threshold = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    ours = gradients(lambda x, d, t: lif(x, decay=d, threshold=t, reset=reset), x, decay, threshold, grad=w)
    loop = gradients(lambda x, d, t: plain_loop(x, d, t, reset), x, decay, threshold, grad=w)
    for mine, expected in zip(ours, loop, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


def test_sharpness_scales_the_surrogate() -> None:
    x = torch.tensor([[1.3]], dtype=torch.float64)
    for backend in CPU_BACKENDS:
        _, grad = gradients(lambda x: lif(x, alpha=4.0, backend=backend), x, grad=torch.ones_like(x))  # noqa: B023
        assert grad.item() == pytest.approx(2 / (1 + (2 * np.pi * 0.3) ** 2), rel=1e-12)


@pytest.mark.parametrize("dtype", FUSED_DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (2, 1), (4, 3, 5, 7, 11), (16, 4099), (7, 2, 1024), (4,), (3, 0, 2)])
def test_the_fused_kernels_equal_the_loop_to_the_last_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, w = (1.5 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    for constants in ({}, {"decay": 0.9, "threshold": 0.6, "alpha": 3.0}):
        fused = gradients(lambda x: lif(x, backend="numba", **constants), x, grad=w)  # noqa: B023
        loop = gradients(lambda x: lif(x, backend="torch", **constants), x, grad=w)  # noqa: B023
        assert fused[0].dtype == fused[1].dtype == dtype
        assert torch.equal(fused[0], loop[0])
        assert torch.equal(fused[1], loop[1])


def test_bfloat16_is_rounded_to_nearest_even_and_keeps_nan_and_infinity() -> None:
    # With decay 0 the gradient is the incoming one times the surrogate, here 1 / (1 + (pi * v)^2).
    x = torch.randn(1, 5000).bfloat16()
    w = torch.cat([torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38]), torch.randn(4996)])[None]
    _, grad = gradients(lambda x: lif(x, decay=0.0, backend="numba"), x, grad=w.bfloat16())
    _, exact = gradients(lambda x: lif(x, decay=0.0, backend="torch"), x.float(), grad=w.bfloat16().float())
    torch.testing.assert_close(grad, exact.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_lower_precision_input_keeps_its_state_in_float32() -> None:
    x = torch.full((12, 5), 0.3).bfloat16()
    assert torch.equal(lif(x, decay=0.9).float(), lif(x.float(), decay=0.9))
    assert torch.equal(lif(x.half(), decay=0.9).float(), lif(x.half().float(), decay=0.9))


def test_a_repeated_step_is_neither_copied_nor_kept_in_full() -> None:
    x, w = 1.2 * torch.randn(1, 3, 2000), torch.randn(4, 3, 2000)
    fused = gradients(lambda x: lif(x.expand(4, 3, 2000)), x, grad=w)
    loop = gradients(lambda x: lif(x.repeat(4, 1, 1), backend="torch"), x, grad=w)
    assert torch.equal(fused[0], loop[0])
    torch.testing.assert_close(fused[1], loop[1])
    leaf = x.requires_grad_()
    assert kept_bytes(lambda: lif(leaf.expand(4, 3, 2000))) == x.nbytes


@pytest.mark.parametrize(
    "rearrange",
    [
        lambda x: x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2]),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(2, 4),
        lambda x: x[..., ::2],
        lambda x: x[::2],
        lambda x: x.flip(0)[:, :1].expand(4, 3, 6, 5, 7),
    ],
    ids=["channels last", "batch first", "transposed", "strided", "every other step", "expanded batch"],
)
def test_any_memory_layout_gives_the_same_values(rearrange: Callable[[Tensor], Tensor]) -> None:
    x = rearrange(1.5 * torch.randn(4, 3, 6, 5, 7))
    w = torch.randn(*x.shape)
    fused = gradients(lambda x: lif(x, backend="numba"), x, grad=w)
    loop = gradients(lambda x: lif(x.contiguous(), backend="torch"), x, grad=w)
    assert torch.equal(fused[0], loop[0])
    assert torch.equal(fused[1], loop[1])


def test_spikes_lie_in_memory_like_the_current() -> None:
    x = torch.randn(12, 6, 5, 7).contiguous(memory_format=torch.channels_last)
    assert lif(x.unflatten(0, (4, 3))).flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", FUSED_DTYPES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_residual_neuron_equals_lif_of_the_sum(backend: str, dtype: torch.dtype) -> None:
    a, b, w = (torch.randn(4, 3, 1025).to(dtype) for _ in range(3))
    fused = gradients(lambda a, b: lif_residual(a, b, backend=backend), a, b, grad=w)
    summed = gradients(lambda a, b: lif(a + b, backend="torch"), a, b, grad=w)
    for mine, expected in zip(fused, summed, strict=True):
        assert torch.equal(mine, expected)


def test_the_residual_neuron_takes_two_layouts() -> None:
    a = torch.randn(4, 3, 6, 5)
    b = torch.randn(4, 3, 5, 6).transpose(2, 3)
    assert torch.equal(lif_residual(a, b), lif(a + b))


def test_a_single_spike_on_an_identity_shortcut_does_not_fire() -> None:
    spike = torch.ones(1, 4)
    assert not lif_residual(spike, torch.zeros(1, 4)).any()
    assert lif_residual(spike, spike).all()


def make_norm(channels: int, dtype: torch.dtype, **options: Any) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **options).to(dtype)
    with torch.no_grad():
        if norm.affine:
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return norm


def compare_with_batchnorm(
    x: Tensor,
    norm: nn.BatchNorm1d | nn.BatchNorm2d,
    steps: int,
    *,
    shortcut: Tensor | None = None,
    repeat: int = 1,
    tolerance: float,
    **options: Any,
) -> None:
    """Spikes, every gradient and the running statistics against BatchNorm followed by the plain loop."""
    ours, theirs = copy.deepcopy(norm), copy.deepcopy(norm)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    extras = [None if shortcut is None else shortcut.clone().requires_grad_() for _ in range(2)]
    spikes = norm_lif(x1, ours, timesteps=steps, shortcut=extras[0], repeat=repeat, **options)
    z = theirs(torch.cat([x2] * repeat))
    z = z if extras[1] is None else z + extras[1]
    options.pop("backend", None)
    expected, membrane = lif_membrane(z.unflatten(0, (steps, -1)), **options)
    threshold = options.get("threshold", 1.0)
    flipped = spikes.unflatten(0, (steps, -1)) != expected
    assert not flipped[(membrane - threshold).abs() > (1e-5 if x.dtype == torch.float32 else 0)].any()
    assert not flipped.any(), "a spike flipped at rounding level: choose another seed"
    w = torch.randn_like(spikes)
    spikes.backward(w)
    expected.flatten(0, 1).backward(w)
    # Rounding is relative to the largest gradient; a sum over K values of both signs has the size of sqrt(K).
    largest = max(1.0, x2.grad.abs().max().item())
    samples = (x2.numel() // norm.num_features * repeat) ** 0.5
    pairs = [(x1.grad, x2.grad, largest)]
    pairs += [(a.grad, b.grad, samples) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
    pairs += [(a, b, 1.0) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True)]
    if extras[0] is not None and extras[1] is not None:
        pairs.append((extras[0].grad, extras[1].grad, 1.0))
    for mine, reference, scale in pairs:
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance * scale)


TOLERANCES = [(torch.float32, 1e-5), (torch.float64, 1e-9)]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize("with_shortcut", [True, False], ids=["shortcut", "alone"])
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (2, 16, 8, 8), (5, 130, 3, 3), (2, 1, 20, 40), (4, 6, 1, 1)])
def test_norm_lif_equals_batchnorm_and_then_lif(
    shape: tuple[int, ...],
    with_shortcut: bool,
    channels_last: bool,
    training: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    steps, (batch, channels, *space) = 4, shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = (2 * torch.randn(steps * batch, channels, *space, dtype=dtype) + 3).contiguous(memory_format=layout)
    shortcut = torch.randn_like(x) if with_shortcut else None
    norm = make_norm(channels, dtype).train(training)
    compare_with_batchnorm(x, norm, steps, shortcut=shortcut, tolerance=tolerance)
    spikes = norm_lif(x, norm, timesteps=steps, shortcut=shortcut)
    assert spikes.stride() == x.stride()


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_stem_equals_its_current_repeated_over_time(
    backend: str, channels_last: bool, training: bool, dtype: torch.dtype, tolerance: float
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(6, 5, 7, 9, dtype=dtype).contiguous(memory_format=layout)
    norm = make_norm(5, dtype).train(training)
    compare_with_batchnorm(x, norm, 4, repeat=4, tolerance=tolerance, backend=backend)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"momentum": 0.3, "eps": 1e-3}, {"affine": False}, {"track_running_stats": False}],
    ids=["average", "momentum", "no affine", "no statistics"],
)
def test_norm_lif_follows_the_options_of_the_norm(
    options: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    x = torch.randn(8, 5, 7, 9, dtype=dtype)
    norm = make_norm(5, dtype, **options)
    norm(torch.randn_like(x))
    compare_with_batchnorm(x, norm, 4, tolerance=tolerance)
    compare_with_batchnorm(x, norm, 4, repeat=4, tolerance=tolerance)
    if options.get("track_running_stats", True):
        compare_with_batchnorm(x, norm.eval(), 4, tolerance=tolerance)


@pytest.mark.parametrize("reset", ["immediate", "hard"])
def test_norm_lif_knows_every_reset(reset: Any) -> None:
    x = torch.randn(8, 5, 7, 9, dtype=torch.float64)
    shortcut = torch.randn_like(x)
    compare_with_batchnorm(x, make_norm(5, x.dtype), 4, tolerance=1e-9, reset=reset)
    compare_with_batchnorm(x, make_norm(5, x.dtype), 4, shortcut=shortcut, tolerance=1e-9, reset=reset)


def test_norm_lif_takes_the_output_of_a_linear_layer() -> None:
    x = torch.randn(24, 33, dtype=torch.float64)
    compare_with_batchnorm(x, nn.BatchNorm1d(33).double(), 4, tolerance=1e-9, decay=0.8, threshold=0.4)


def test_norm_lif_keeps_its_digits_when_the_mean_is_large() -> None:
    x = torch.randn(8, 5, 30, 30) + 1000
    norm = nn.BatchNorm2d(5, momentum=1.0)
    norm_lif(x, norm, timesteps=4)
    exact = x.double().var((0, 2, 3))
    torch.testing.assert_close(norm.running_var.double(), exact, rtol=1e-5, atol=0)


def test_norm_lif_of_bfloat16_is_close_to_float32() -> None:
    x = torch.randn(8, 6, 16, 16).bfloat16()
    norms = [nn.BatchNorm2d(6) for _ in range(2)]
    w = torch.randn(8, 6, 16, 16).bfloat16()
    low = gradients(lambda x: norm_lif(x, norms[0], timesteps=4), x, grad=w)
    high = gradients(lambda x: norm_lif(x, norms[1], timesteps=4), x.float(), grad=w.float())
    assert low[0].dtype == low[1].dtype == torch.bfloat16
    assert torch.equal(low[0].float(), high[0])
    torch.testing.assert_close(low[1].float(), high[1], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(norms[0].running_var, norms[1].running_var)


def test_untracked_batches_leave_the_running_statistics_alone() -> None:
    x, norm = torch.randn(8, 5, 7, 9), make_norm(5, torch.float32)
    before = copy.deepcopy(norm.state_dict())
    for backend in ("auto", "torch"):
        spikes = norm_lif(x, norm, timesteps=4, track=False, backend=backend)
        assert torch.equal(spikes, norm_lif(x, copy.deepcopy(norm), timesteps=4))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_the_number_of_threads_changes_no_bit(threads: Callable[[int], None]) -> None:
    x = torch.randn(8, 24, 60, 60)
    w, shortcut = torch.randn_like(x), torch.randn_like(x)
    for layout in (torch.contiguous_format, torch.channels_last):
        results = []
        for count in (1, 2, 3):
            threads(count)
            norm = nn.BatchNorm2d(24)
            given = x.contiguous(memory_format=layout)
            fused = norm_gradients(given, norm, shortcut, w)
            plain = gradients(lambda x: lif(x.unflatten(0, (4, 2))).flatten(0, 1), given, grad=w)
            results.append([*fused, *plain, *(b.clone() for b in norm.buffers())])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def norm_gradients(x: Tensor, norm: nn.BatchNorm2d, shortcut: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_(), shortcut.detach().requires_grad_(), norm.weight, norm.bias]
    spikes = norm_lif(leaves[0], norm, timesteps=4, shortcut=leaves[1])
    return spikes.detach(), *torch.autograd.grad(spikes, leaves, w)


def test_a_forked_process_starts_its_own_threads(threads: Callable[[int], None]) -> None:
    threads(2)
    x = torch.randn(4, 1 << 16)
    expected = lif(x).numpy()
    child = os.fork()
    if child == 0:
        # Threads of the parent do not exist here; a pool that believed in them would wait for ever.
        signal.alarm(20)
        os._exit(0 if np.array_equal(lif(x).numpy(), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class Held:
    """A tensor that the backward pass holds; gone when the pass lets go of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of all pieces of memory that the backward pass of ``forward`` holds, parameters apart."""
    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Held:
        held.add(item := Held(tensor))
        return item

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item.tensor):
        result = forward()
    storages = [item.tensor.untyped_storage() for item in held if not isinstance(item.tensor, nn.Parameter)]
    kept = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del result
    return sum(kept.values())


def test_nothing_is_kept_but_the_input() -> None:
    x = torch.randn(4, 2, 8, 16, 16, requires_grad=True)
    other = torch.randn_like(x, requires_grad=True)
    norm = nn.BatchNorm2d(8)
    for backend in CPU_BACKENDS:
        assert kept_bytes(lambda: lif(x, backend=backend)) == x.nbytes  # noqa: B023
    assert kept_bytes(lambda: lif_residual(x, other)) == 2 * x.nbytes
    assert kept_bytes(lambda: norm_lif(x.flatten(0, 1), norm, timesteps=4)) == x.nbytes
    assert kept_bytes(lambda: norm_lif(x[0], norm, timesteps=4, repeat=4)) == x.nbytes, "all of x is one storage"
    stem = x[0].detach().clone().requires_grad_()
    assert kept_bytes(lambda: norm_lif(stem, norm, timesteps=4, repeat=4)) == stem.nbytes


def test_a_normalised_layer_keeps_less_than_snntorch_and_spikingjelly() -> None:
    snntorch = pytest.importorskip("snntorch")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
    leaky = snntorch.Leaky(beta=0.5, threshold=1.0, spike_grad=snntorch.surrogate.atan())
    node = neuron.LIFNode(
        tau=2.0,
        decay_input=False,
        v_reset=None,
        detach_reset=True,
        surrogate_function=surrogate.ATan(alpha=2.0),
        step_mode="m",
    )
    x = torch.randn(16, 8, 16, 16, requires_grad=True)
    norm = nn.BatchNorm2d(8)

    def snntorch_layer() -> Tensor:
        membrane, spikes = leaky.reset_mem(), []
        for current in norm(x).unflatten(0, (4, 4)):
            fired, membrane = leaky(current, membrane)
            spikes.append(fired)
        return torch.stack(spikes)

    ours = kept_bytes(lambda: norm_lif(x, norm, timesteps=4))
    assert kept_bytes(lambda: node(norm(x).unflatten(0, (4, 4)))) >= 2 * ours
    assert kept_bytes(snntorch_layer) >= 2 * ours


def test_no_gradient_means_nothing_is_recorded() -> None:
    with torch.no_grad():
        spikes = norm_lif(torch.randn(8, 5, 3, 3), nn.BatchNorm2d(5), timesteps=4)
    assert spikes.grad_fn is None
    assert lif(torch.randn(4, 3)).grad_fn is None


def triton_device() -> str:
    """Where Triton kernels can run here; skips the test if nowhere."""
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, and TRITON_INTERPRET=1 is not set")
    return "cuda"


@pytest.mark.parametrize("dtype", FUSED_DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (4, 3, 5, 7, 11), (6, 2, 1024)])
def test_the_triton_kernels_equal_the_loop(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    device = triton_device()
    x, y, w = ((1.5 * torch.randn(shape)).to(dtype).to(device) for _ in range(3))
    if device == "cpu":
        # The interpreter cuts float32 to bfloat16 where a GPU rounds: take values whose sums are exact.
        x, y = ((16 * value).round().clamp(-112, 112) / 16 for value in (x, y))
    constants = {"decay": 0.9, "threshold": 0.6, "alpha": 3.0}
    layouts = [x, x[:1].expand(shape)]
    if x.ndim == 5:
        layouts.append(x.transpose(2, 4).contiguous().transpose(2, 4))
    # Division on a GPU is correct to two units in the last place.
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    for current in layouts:
        pairs = []
        for backend in ("triton", "torch"):
            options: Any = {**constants, "backend": backend}
            alone = gradients(lambda x: lif(x, **options), current, grad=w)  # noqa: B023
            summed = gradients(lambda x, y: lif_residual(x, y, **options), current, y, grad=w)  # noqa: B023
            pairs.append((*alone, *summed))
        for position, (mine, expected) in enumerate(zip(*pairs, strict=True)):
            is_spikes = position in (0, 2)
            torch.testing.assert_close(
                mine, expected, rtol=0 if is_spikes else tolerance, atol=0 if is_spikes else tolerance
            )


def test_triton_refuses_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend 'triton'"):
        lif(torch.randn(4, 3), backend="triton")


def test_learned_constants_run_fused_when_no_gradient_is_wanted() -> None:
    decay = nn.Parameter(torch.tensor(0.7))
    x = torch.randn(4, 100)
    with torch.no_grad():
        assert torch.equal(lif(x, decay=decay, backend="numba"), lif(x, decay=decay, backend="torch"))
    with pytest.raises(ValueError, match="constant decay and threshold"):
        lif(x, decay=decay, backend="numba")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reset": "soft"}, "reset must be one of delayed, immediate, hard, got 'soft'"),
        ({"surrogate": "relu"}, "surrogate must be one of atan"),
        ({"backend": "jax"}, "backend must be one of auto, torch, numba, triton"),
        ({"decay": 1.5}, "decay must be between 0 and 1, got 1.5"),
        ({"threshold": 0.0}, "threshold must be positive, got 0.0"),
        ({"alpha": -1.0}, "alpha must be positive"),
        ({"decay": torch.ones(3)}, "a 0-d tensor"),
        ({"backend": "numba", "reset": "hard"}, "needs reset='delayed'"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lif(torch.randn(4, 3), **options)


def test_a_bad_tensor_is_named() -> None:
    norm = nn.BatchNorm2d(5)
    with pytest.raises(ValueError, match="floating-point"):
        lif(torch.ones(4, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one time step"):
        lif(torch.ones(0, 3))
    with pytest.raises(ValueError, match="one shape, dtype and device"):
        lif_residual(torch.ones(4, 3), torch.ones(4, 1))
    with pytest.raises(ValueError, match="float16"):
        lif(torch.ones(4, 3).half(), backend="numba")
    with pytest.raises(ValueError, match=r"x has 7 rows, not a positive multiple of 4 time steps"):
        norm_lif(torch.ones(7, 5, 2, 2), norm, timesteps=4)
    with pytest.raises(ValueError, match="repeat must be 1 or timesteps"):
        norm_lif(torch.ones(4, 5, 2, 2), norm, timesteps=4, repeat=2)
    with pytest.raises(ValueError, match=r"shortcut must be \(8, 5, 2, 2\)"):
        norm_lif(torch.ones(8, 5, 2, 2), norm, timesteps=4, shortcut=torch.ones(2, 5, 2, 2))
    with pytest.raises(ValueError, match="more than one value per channel"):
        norm_lif(torch.ones(1, 5, 1, 1), norm, timesteps=1)
