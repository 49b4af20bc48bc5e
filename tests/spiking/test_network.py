"""Spiking networks against reference networks with stored or computed weights, in float64."""

import math

import numpy as np
import pytest
import torch

from neurocl.backbones.resnet import resnet19
from neurocl.errors import UserError
from neurocl.spiking.config import NeuronConfig
from neurocl.spiking.encoding import Encoder
from neurocl.spiking.network import (
    Lif,
    NormLif,
    SpikingMlp,
    SpikingResNet,
    frozen_statistics,
    spiking_mlp,
    spiking_resnet18,
    spiking_resnet19,
    spiking_resnet_small,
)
from tests.conftest import reference

RENAMED = [
    ("stem.layer.", "stem."),
    ("stem.batch_norm.", "stem_lif.norm."),
    ("t_conv_bn1.layer.", "conv1."),
    ("t_conv_bn1.batch_norm.", "lif1.norm."),
    ("t_conv_bn2.layer.", "conv2."),
    ("t_conv_bn2.batch_norm.", "lif2.norm."),
    ("shortcuts.layer.", "shortcut.0."),
    ("shortcuts.batch_norm.", "shortcut.1."),
    ("mlp.layer.", "head."),
    ("lif_stem", "stem_lif"),
]


def our_name(name):
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    return name


def record_rates(network):
    """Mean spike rate of every layer, filled by the next forward pass."""
    rates = {}
    for name, module in network.named_modules():
        inner_of_norm = name.endswith(".lif")
        if isinstance(module, Lif | NormLif) and not inner_of_norm:
            module.register_forward_hook(lambda m, a, out, name=name: rates.__setitem__(name, out.mean().item()))
    return rates


@pytest.fixture(scope="module")
def small():
    case = reference("staer/sresnet_small")
    network = SpikingResNet(
        int(case["cfg_in_channels"]),
        int(case["cfg_K"]),
        stem=int(case["cfg_stem"]),
        blocks=tuple(case["cfg_blocks"].tolist()),
        channels=tuple(case["cfg_channels"].tolist()),
    ).double()
    weights = {our_name(k.removeprefix("param/")): torch.from_numpy(v) for k, v in case.items() if "param/" in k}
    assert network.load_state_dict(weights, strict=False).unexpected_keys == []
    assert {name for name, _ in network.named_parameters()} == set(weights)
    return network, case


@pytest.mark.parametrize("layout", ["static view", "materialised"])
def test_small_network_equals_the_reference(small, layout):
    network, case = small
    network.load_state_dict({k: torch.zeros_like(v) if "mean" in k else v for k, v in network.state_dict().items()})
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    network.zero_grad()
    image = torch.from_numpy(case["image"]).double()
    x_seq = Encoder(int(case["cfg_T"]))(image)
    if layout == "materialised":
        x_seq = x_seq.contiguous()
    rates = record_rates(network)
    network.train()
    logits = network(x_seq)
    np.testing.assert_allclose(logits.detach().numpy(), case["train_logits"], rtol=1e-9, atol=1e-9)
    for key in [key for key in case if key.startswith("rate_train/")]:
        assert rates[our_name(key.removeprefix("rate_train/"))] == pytest.approx(float(case[key]), abs=1e-9)
    buffers = dict(network.named_buffers())
    for key in [key for key in case if key.startswith("running_after")]:
        measured = buffers[our_name(key.partition("/")[2])].numpy()
        np.testing.assert_allclose(measured, case[key], rtol=1e-9, atol=1e-9)
    (torch.from_numpy(case["w"]) * logits).sum().backward()
    for key in [key for key in case if key.startswith("grad/")]:
        measured = network.get_parameter(our_name(key.removeprefix("grad/"))).grad.numpy()
        np.testing.assert_allclose(measured, case[key], rtol=1e-5, atol=1e-5)
    network.eval()
    with torch.no_grad():
        np.testing.assert_allclose(network(x_seq).numpy(), case["eval_logits"], rtol=1e-9, atol=1e-9)
    for key in [key for key in case if key.startswith("rate_eval/")]:
        assert rates[our_name(key.removeprefix("rate_eval/"))] == pytest.approx(float(case[key]), abs=1e-9)


def test_full_resnet19_equals_the_reference():
    case = reference("staer/sresnet19_full")
    network = SpikingResNet(3, 10).double()
    assert sum(p.numel() for p in network.parameters()) == int(case["n_params"])
    a, b = float(case["a"]), float(case["b"])
    with torch.no_grad():
        for j, name in enumerate(case["param_names"]):
            weight = network.get_parameter(our_name(str(name)))
            s = np.sin(a * np.arange(weight.numel()) + b * j)
            if "batch_norm.weight" in name:
                values = 1 + 0.5 * s
            elif "batch_norm.bias" in name:
                values = 0.3 + 0.3 * s
            else:
                values = s * math.sqrt(2 / weight[0].numel())
            weight.copy_(torch.from_numpy(values).view(weight.shape))
    size = int(case["B"]) * 3 * 32 * 32
    i = np.arange(size)
    image = torch.from_numpy(np.sin(0.017 * i) + 0.5 * np.cos(0.31 * i)).view(-1, 3, 32, 32)
    rates = record_rates(network)
    with torch.no_grad():
        logits = network(Encoder(int(case["T"]))(image))
    np.testing.assert_allclose(logits.numpy(), case["train_logits"], rtol=1e-9, atol=1e-9)
    for key in [key for key in case if key.startswith("rate/")]:
        assert rates[our_name(key.removeprefix("rate/"))] == pytest.approx(float(case[key]), abs=1e-9)


def test_parameter_counts_are_the_published_ones():
    def count(network):
        return sum(p.numel() for p in network.parameters())

    assert count(spiking_resnet19((3, 32, 32), 10, timesteps=2)) == 12_569_216
    assert count(spiking_resnet19((1, 28, 28), 10, timesteps=2)) == 12_566_912
    assert count(resnet19((3, 32, 32), 10)) == 12_569_216
    assert count(spiking_resnet18((3, 32, 32), 10, timesteps=2)) == 11_173_952


@pytest.mark.parametrize("factory", [spiking_mlp, spiking_resnet_small])
@pytest.mark.parametrize("timesteps", [1, 3, 4])
def test_any_number_of_steps_and_a_batch_of_one_work(factory, timesteps):
    network = factory((1, 8, 8), 10, timesteps=timesteps)
    x = torch.rand(1, 1, 8, 8)
    if timesteps == 1 and factory is spiking_mlp:
        with pytest.raises(UserError, match="batch_size >= 2 or timesteps >= 2"):
            network(x)
    else:
        assert network(x).shape == (timesteps, 1, 10)
    assert network.eval()(x).shape == (1, 10)
    assert network.features(x).shape == (1, network.network.num_features)


def test_a_network_keeps_no_state_between_calls():
    network = spiking_mlp((1, 8, 8), 10, timesteps=4).eval()
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(network(x), network(x))


def test_evaluation_changes_neither_statistics_nor_randomness():
    network = spiking_resnet_small((1, 8, 8), 10, timesteps=2, encoder="poisson").eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    random = torch.get_rng_state()
    first = network(torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    second = network(torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(first, second)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_frozen_statistics_use_the_batch_but_leave_the_running_values():
    network = spiking_resnet_small((1, 8, 8), 10, timesteps=2)
    x = torch.rand(4, 1, 8, 8)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with frozen_statistics(network):
        frozen = network(x)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert torch.equal(frozen, network(x))
    assert not torch.equal(
        network.state_dict()["network.stem_lif.norm.running_mean"], before["network.stem_lif.norm.running_mean"]
    )


def test_neurons_and_batchnorm_fuse_to_the_same_values_as_apart():
    torch.manual_seed(0)
    fused = SpikingMlp(20, 10, neuron=NeuronConfig()).double()
    apart = SpikingMlp(20, 10, neuron=NeuronConfig(learnable=True)).double()
    apart.load_state_dict(fused.state_dict(), strict=False)
    x_seq = torch.randn(4, 6, 20, dtype=torch.float64)
    torch.testing.assert_close(fused(x_seq), apart(x_seq), rtol=1e-9, atol=1e-9)


def test_learnable_neurons_receive_gradients():
    network = spiking_mlp((1, 8, 8), 10, timesteps=4, neuron=NeuronConfig(learnable=True))
    network(torch.rand(8, 1, 8, 8)).square().sum().backward()
    assert network.network.lifs[0].lif.decay.grad is not None
    assert network.network.lifs[0].lif.threshold.grad.abs() > 0


@pytest.mark.parametrize(
    "neuron", [{"reset": "immediate"}, {"reset": "hard"}, {"backend": "spikingjelly", "reset": "hard"}]
)
def test_other_neurons_train(neuron):
    network = spiking_resnet_small((1, 8, 8), 10, timesteps=2, neuron=NeuronConfig(**neuron))
    network(torch.rand(4, 1, 8, 8)).sum().backward()
    assert network.network.stem.weight.grad.abs().sum() > 0


def test_the_spikingjelly_back_end_with_delayed_reset_is_refused():
    with pytest.raises(ValueError, match="spikingjelly back end has reset immediate or hard"):
        NeuronConfig(backend="spikingjelly")
