"""Operation counts by hand, against spikingjelly's counter and against published sizes; rates, memory, the ANN twin."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neurocl.spiking.config import NeuronConfig
from neurocl.spiking.energy import measure_energy, synaptic_operations
from neurocl.spiking.network import spiking_mlp, spiking_resnet19, spiking_resnet_small

SYNAPSES = ("conv", "linear")


@pytest.fixture(autouse=True)
def _one_timed_pass(monkeypatch):
    monkeypatch.setattr("neurocl.spiking.energy.TIMED_SECONDS", 0.0)


def lively(network, x):
    """Running statistics of ``x`` and offsets that make every layer fire."""
    network.train()
    with torch.no_grad():
        for _ in range(5):
            network(x)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.bias.uniform_(0.2, 0.8)
    return network.eval()


def small_resnet(**options):
    torch.manual_seed(0)
    network = spiking_resnet_small(
        (3, 8, 8), 10, **{"timesteps": 4, "stem": 8, "blocks": (2, 1), "channels": (8, 16), **options}
    )
    return lively(network, torch.rand(16, 3, 8, 8))


def by_name(report):
    return {layer.name: layer for layer in report.layers}


@pytest.fixture
def two_neurons():
    """Two inputs, two neurons that take them unchanged, one output; three steps."""
    network = spiking_mlp((1, 1, 2), 1, timesteps=3, hidden=(2,)).eval()
    body = network.network
    with torch.no_grad():
        body.hidden[0].weight.copy_(torch.eye(2))
        body.lifs[0].norm.running_var.fill_(1 - body.lifs[0].norm.eps)
        body.head.weight.fill_(1.0)
    return network


def test_two_neurons_cost_what_a_hand_count_gives(two_neurons):
    # input 1.5: membranes 1.5, 1.25, 1.125, three spikes; input 0.4: 0.4, 0.6, 0.7, none
    report = measure_energy(two_neurons, torch.tensor([1.5, 0.4]).view(1, 1, 1, 2))
    hidden, neurons, head = report.layers
    assert (hidden.kind, neurons.kind, head.kind) == ("linear", "norm-lif", "linear")
    assert (hidden.macs, hidden.macs_every_step, hidden.acs) == (4, 12, 0)
    assert (neurons.spikes, neurons.firing_rate, neurons.dead_share, neurons.updates) == (3, 0.5, 0.5, 6)
    assert (head.macs, head.acs) == (0, 3)
    assert (report.spiking.macs, report.spiking.acs, report.spiking.updates) == (4, 3, 6)
    assert report.spiking.synapse_pj == pytest.approx(4 * 4.6 + 3 * 0.9, rel=1e-12)
    assert report.spiking.neuron_pj == pytest.approx(6 * 4.6, rel=1e-12)
    assert report.spiking.compute_pj == pytest.approx(10 * 4.6 + 3 * 0.9, rel=1e-12)
    assert report.spiking_every_step.compute_pj == pytest.approx(18 * 4.6 + 3 * 0.9, rel=1e-12)
    assert report.ann.compute_pj == pytest.approx(6 * 4.6, rel=1e-12)


def test_memory_traffic_of_two_neurons_is_that_of_a_hand_count(two_neurons):
    report = measure_energy(two_neurons, torch.tensor([1.5, 0.4]).view(1, 1, 1, 2))
    hidden = 4 * 4 + 2 * 4 + 2 * 4 * (1 + 3)  # weights, input, and the result kept: written once, read three times
    neurons = 3 * 2 * (4 + 4 + 1 / 8)
    head = 3 * (2 * 4 + 2 / 8)
    assert report.spiking.memory_bytes == hidden + neurons + head
    assert report.spiking_every_step.memory_bytes == 3 * (4 * 4 + 2 * 4) + neurons + head
    assert report.ann.memory_bytes == (4 * 4 + 4 * 4) + (2 * 4 + 3 * 4)
    assert report.spiking.memory_pj == pytest.approx(24.96 * report.spiking.memory_bytes, rel=1e-12)


def test_a_static_picture_of_whole_numbers_still_counts_as_a_current(two_neurons):
    report = measure_energy(two_neurons, torch.ones(1, 1, 1, 2))
    assert (report.layers[0].macs, report.layers[0].acs) == (4, 0)


def test_neurons_are_dead_only_if_no_item_makes_them_fire(two_neurons):
    one, other = (torch.tensor(values).view(1, 1, 1, 2) for values in ([3.0, 0.0], [0.0, 3.0]))
    assert measure_energy(two_neurons, one).dead_share == 0.5
    assert measure_energy(two_neurons, torch.cat([one, other])).dead_share == 0.0


def test_other_prices_scale_the_energy_and_not_the_counts(two_neurons):
    x = torch.tensor([1.5, 0.4]).view(1, 1, 1, 2)
    usual, dear = measure_energy(two_neurons, x), measure_energy(two_neurons, x, mac_pj=46.0, ac_pj=9.0, byte_pj=1.0)
    assert dear.spiking.compute_pj == pytest.approx(10 * usual.spiking.compute_pj, rel=1e-12)
    assert dear.spiking.memory_pj == usual.spiking.memory_bytes
    assert (dear.spiking.macs, dear.spiking.acs) == (usual.spiking.macs, usual.spiking.acs)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (3, 5), "padding": (0, 2), "stride": (2, 1), "dilation": (1, 2)},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1, "groups": 2},
    ],
)
def test_synaptic_operations_of_a_convolution_are_counted_with_borders_strides_and_groups(options):
    spikes = torch.from_numpy(np.random.default_rng(0).integers(-1, 3, (5, 4, 7, 9))).float()
    layer = nn.Conv2d(4, 6, bias=False, **options)
    ones = torch.ones_like(layer.weight)
    every_tap = F.conv2d(spikes.abs(), ones, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    assert synaptic_operations(layer, spikes) == every_tap.double().sum()


@pytest.mark.parametrize("kind", ["resnet", "mlp"])
def test_synaptic_operations_of_a_network_are_those_of_spikingjellys_counter(kind):
    from spikingjelly.activation_based.op_counter import DispatchCounterMode, SynOpCounter

    if kind == "resnet":
        network = small_resnet()
    else:
        torch.manual_seed(0)
        network = lively(spiking_mlp((3, 8, 8), 10, timesteps=4), torch.rand(16, 3, 8, 8))
    x = torch.rand(5, 3, 8, 8)
    report = measure_energy(network, x)
    counter = SynOpCounter()
    with DispatchCounterMode([counter]), torch.no_grad():
        network(x)
    counted = sum(layer.acs for layer in report.layers if layer.kind in SYNAPSES)
    assert counted > 1000
    assert round(5 * counted) == counter.get_total()
    assert 5 * counted == pytest.approx(counter.get_total(), rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "giga_macs", "neurons"), [((3, 32, 32), 2.285, 2_097_152), ((1, 28, 28), 1.748, None)]
)
def test_resnet19_has_its_published_size_per_image_and_step(shape, giga_macs, neurons):
    report = measure_energy(spiking_resnet19(shape, 10, timesteps=1), torch.rand(1, *shape))
    assert round(report.ann.macs / 1e9, 3) == giga_macs
    assert neurons is None or sum(layer.neurons for layer in report.layers) == neurons
    assert sum(layer.kind in ("lif", "norm-lif") for layer in report.layers) == 25


def test_spikes_over_a_shortcut_without_weights_are_added_one_by_one():
    layers = by_name(measure_energy(small_resnet(), torch.rand(5, 3, 8, 8)))
    first, projected = layers["stages.0.0.lif3"], layers["stages.1.0.lif3"]
    assert first.acs == pytest.approx(layers["stages.0.0.lif2"].spikes + layers["stem_lif"].spikes, rel=1e-12)
    assert projected.acs == pytest.approx(layers["stages.1.0.lif2"].spikes, rel=1e-12)
    assert first.ann_acs == first.neurons == 8 * 8 * 8


def test_firing_rates_and_dead_neurons_are_those_of_the_recorded_spikes():
    network, x = small_resnet(), torch.rand(5, 3, 8, 8)
    recorded = {}
    modules = dict(network.network.named_modules())
    for name in ("stem_lif", "stages.0.1.lif2", "stages.1.0.lif3"):
        modules[name].register_forward_hook(lambda _m, _i, spikes, name=name: recorded.update({name: spikes}))
    with torch.no_grad():
        network(x)
    layers = by_name(measure_energy(network, x))
    for name, spikes in recorded.items():
        assert layers[name].firing_rate == pytest.approx(float(spikes.double().mean()), rel=1e-12)
        assert layers[name].dead_share == float((spikes.amax(dim=(0, 1)) == 0).double().mean())
        assert layers[name].spikes == pytest.approx(float(spikes.double().sum()) / 5, rel=1e-12)


def test_totals_are_the_sums_of_the_layers():
    report = measure_energy(small_resnet(), torch.rand(3, 3, 8, 8))
    assert sum(layer.compute_pj for layer in report.layers) == pytest.approx(report.spiking.compute_pj, rel=1e-12)
    assert sum(layer.ann_pj for layer in report.layers) == pytest.approx(report.ann.compute_pj, rel=1e-12)
    assert sum(layer.spikes for layer in report.layers) == report.spikes
    neurons = sum(layer.neurons for layer in report.layers)
    assert report.firing_rate == pytest.approx(report.spikes / (4 * neurons), rel=1e-12)


def test_the_same_image_twice_costs_as_much_per_image_as_once():
    network, x = small_resnet(), torch.rand(1, 3, 8, 8)
    once, twice = measure_energy(network, x), measure_energy(network, torch.cat([x, x]))
    assert once.spiking == twice.spiking
    assert once.layers == twice.layers


def test_a_spike_code_turns_the_first_layer_into_additions_and_leaves_nothing_to_reuse():
    network, x = small_resnet(encoder="poisson"), torch.rand(4, 3, 8, 8)
    report = measure_energy(network, x)
    stem = report.layers[0]
    assert stem.macs == 0
    assert stem.acs == synaptic_operations(network.network.stem, network.encoder(x).flatten(0, 1)) / 4
    assert report.spiking == report.spiking_every_step


def test_event_counts_are_as_many_spikes_and_normalised_frames_are_currents():
    network = small_resnet()
    frames = torch.zeros(1, 4, 3, 8, 8)
    frames[0, 2, 1, 4, 4] = 3
    stem = measure_energy(network, frames).layers[0]
    assert (stem.macs, stem.acs) == (0, 3 * 9 * 8)
    stem = measure_energy(network, frames - 0.1).layers[0]
    assert (stem.macs, stem.acs) == (4 * 64 * 27 * 8, 0)


def test_pooled_spikes_are_numbers_that_the_head_must_multiply():
    head = measure_energy(small_resnet(), torch.rand(4, 3, 8, 8)).layers[-1]
    assert (head.name, head.macs, head.acs) == ("head", 4 * 16 * 10, 0)


def test_every_kind_of_neuron_is_measured():
    for neuron in (NeuronConfig(learnable=True), NeuronConfig(reset="hard")):
        report = measure_energy(small_resnet(neuron=neuron), torch.rand(2, 3, 8, 8))
        assert [layer.kind for layer in report.layers].count("norm-lif") == 1 + 3 * 2
        assert [layer.kind for layer in report.layers].count("lif") == 3
        assert report.spikes > 0


def test_measuring_leaves_mode_and_statistics_alone():
    network = small_resnet().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    measure_energy(network, torch.rand(2, 3, 8, 8))
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_time_is_measured_at_batch_1_and_in_one_batch_and_the_report_is_json():
    report = measure_energy(small_resnet(), torch.rand(12, 3, 8, 8))
    assert [timing.batch_size for timing in report.timings] == [1, 12]
    for timing in report.timings:
        assert timing.seconds_per_image > 0
        assert timing.images >= timing.batch_size
        assert (timing.joules_per_image is None) == (timing.meter.backend == "none")
    document = json.loads(json.dumps(report.as_dict()))
    assert document["constants"]["source"].startswith("theoretical, 45 nm constants (Horowitz 2014), 32-bit float")
    assert len(document["layers"]) == len(report.layers)


def test_no_items_are_refused(two_neurons):
    with pytest.raises(ValueError, match="at least one item"):
        measure_energy(two_neurons, torch.empty(0, 1, 1, 2))
