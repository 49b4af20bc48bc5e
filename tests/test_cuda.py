"""The same numbers on a GPU as on the CPU; every check also runs CPU against CPU, so that it is itself checked."""

import numpy as np
import pytest
import torch

from neurocl import continual, spiking

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]
QUICK = {"epochs": 1, "max_train_per_class": 16, "max_test_per_class": 8, "buffer_size": 16, "threads": 1}


@pytest.mark.parametrize("device", DEVICES)
def test_the_neuron_spikes_alike(device):
    current = 1.5 * torch.randn(4, 3, 1000)
    here, there = current.clone().requires_grad_(), current.to(device).requires_grad_()
    expected, spikes = spiking.lif(here), spiking.lif(there)
    assert torch.equal(spikes.cpu(), expected)
    weights = torch.randn_like(current)
    (expected * weights).sum().backward()
    (spikes * weights.to(device)).sum().backward()
    torch.testing.assert_close(there.grad.cpu(), here.grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("first", "second"), [(4, 4), (4, 8), (4, 2), (40, 33)])
def test_the_divergence_and_its_gradient_agree(device, first, second):
    x, y = torch.randn(7, first, 10), torch.randn(7, second, 10)
    here, there = x.clone().requires_grad_(), x.to(device).requires_grad_()
    expected = spiking.soft_dtw_divergence(here, y)
    value = spiking.soft_dtw_divergence(there, y.to(device))
    torch.testing.assert_close(value.cpu(), expected, rtol=2e-4, atol=2e-4)
    expected.backward()
    value.backward()
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_the_network_gives_the_same_series_in_float64(device):
    torch.manual_seed(0)
    network = spiking.SpikingResNet(1, 10, stem=8, blocks=(1, 1), channels=(8, 16)).double()
    x_seq = torch.randn(3, 1, 8, 8, dtype=torch.float64).expand(4, 3, 1, 8, 8)
    expected = network(x_seq)
    on_device = network.to(device)(x_seq.to(device).expand(4, 3, 1, 8, 8))
    torch.testing.assert_close(on_device.cpu(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_staer_trains_resumes_and_repeats_itself(device, precision, tmp_path):
    values = {"area": "spiking", "method": "staer", "device": device, "precision": precision, **QUICK}
    whole = continual.train(keep=False, **values)
    again = continual.train(keep=False, **values)
    np.testing.assert_array_equal(whole.class_il, again.class_il)
    continual.train(out=tmp_path / "run", stop_after_task=1, **values)
    resumed = continual.resume(tmp_path / "run")
    np.testing.assert_array_equal(resumed.class_il, whole.class_il)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["er-ace", "derpp", "lwf", "ewc-online", "icarl", "gdumb"])
def test_the_baselines_train(device, method):
    options = {"fit_epochs": 2} if method == "gdumb" else {}
    result = continual.train(area="continual", method=method, options=options, device=device, keep=False, **QUICK)
    assert result.status == "finished"
