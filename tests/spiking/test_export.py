"""NIR export: same spikes after a round trip, here and in another reader of NIR; refusals that name layer and cure."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from neurocl import continual
from neurocl.errors import UserError
from neurocl.spiking.config import NeuronConfig
from neurocl.spiking.encoding import Encoder
from neurocl.spiking.export import export_run, replay, to_nir
from neurocl.spiking.network import SpikingClassifier, SpikingNetwork, spiking_mlp, spiking_resnet_small
from neurocl.spiking.neuron import lif

nir = pytest.importorskip("nir", reason="needs the package nir")

QUICK = {"epochs": 1, "max_train_per_class": 20, "max_test_per_class": 10, "buffer_size": 20, "threads": 1}
SHAPE = (3, 8, 8)


def network(kind, **neuron):
    """A network with statistics of its own in every BatchNorm, which fires in every layer."""
    torch.manual_seed(0)
    options = {"timesteps": 5, "neuron": NeuronConfig(**{"reset": "hard", **neuron})}
    if kind == "mlp":
        built = spiking_mlp(SHAPE, 10, hidden=(32, 16), **options)
    else:
        built = spiking_resnet_small(SHAPE, 10, stem=8, blocks=(2, 1), channels=(8, 16), **options)
    built.train()
    with torch.no_grad():
        for module in built.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(0.2, 0.8)
        for _ in range(20):
            built(torch.randn(16, *SHAPE))
    return built.eval()


def through_a_file(graph, path):
    nir.write(path, graph)
    return nir.read(path)


def spikes_of(built, x_seq):
    """Spikes of all layers of neurons by their names in the graph, and logits over time, in float64."""
    built = copy.deepcopy(built).double().eval()
    recorded = {}
    for name, module in built.network.named_modules():
        if name.endswith(("lif1", "lif2", "lif3", "stem_lif")) or (name.startswith("lifs.") and name.count(".") == 1):
            module.register_forward_hook(
                lambda _m, _i, spikes, name=name.replace(".", "_"): recorded.update({name: spikes})
            )
    with torch.no_grad():
        return recorded, built.network.head(built.network.features(x_seq))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short runs on real digits: neurons that NIR has, those it has not, and no spiking neurons at all."""
    folder = tmp_path_factory.mktemp("runs")
    spiking = {"area": "spiking", "method": "er", "backbone": "spiking-mlp", **QUICK}
    continual.train(**spiking, neuron={"reset": "hard"}, out=folder / "hard")
    continual.train(**spiking, out=folder / "delayed")
    continual.train(area="continual", method="er", backbone="mlp", **QUICK, out=folder / "ordinary")
    return folder


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["mlp", "resnet"])
def test_a_graph_read_back_from_its_file_gives_the_same_spikes_and_logits(kind, decay, learnable, tmp_path):
    built = network(kind, decay=decay, learnable=learnable)
    x_seq = built.encoder(torch.randn(6, *SHAPE, dtype=torch.float64))
    graph = through_a_file(to_nir(built, SHAPE), tmp_path / "model.nir")
    spikes, logits = spikes_of(built, x_seq)
    outputs = replay(graph, x_seq)
    assert len(spikes) == (2 if kind == "mlp" else 10)
    for name, layer in spikes.items():
        assert 0 < layer.mean() < 1
        assert torch.equal(outputs[name], layer), name
    torch.testing.assert_close(outputs["output"], logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "resnet"])
def test_spikingjelly_reads_the_graph_to_the_same_logits(kind):
    """Its neuron fires at the threshold too; 0.8 is no sum of halves, so no membrane stops there."""
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    built = network(kind, threshold=0.8)
    x_seq = built.encoder(torch.randn(6, *SHAPE, dtype=torch.float64))
    reader = import_from_nir(to_nir(built, SHAPE), dtype=torch.float64)
    state, logits = None, []
    with torch.no_grad():
        for x in x_seq:
            out, state = reader(x) if state is None else reader(x, state)
            logits.append(out)
    torch.testing.assert_close(torch.stack(logits), spikes_of(built, x_seq)[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.3, 0.5, 0.53, 0.9, 0.91, 1.0])
def test_a_spike_of_exactly_the_threshold_does_not_fire(decay):
    """Shortcuts bring whole numbers to a threshold of 1: rounded time constants must not push them over it."""
    graph = to_nir(network("resnet", decay=decay), SHAPE)
    node = graph.nodes["stages_0_1_lif3"]
    alone = nir.NIRGraph(
        {
            "input": nir.Input(input_type={"input": np.array(node.r.shape)}),
            "lif": node,
            "output": nir.Output(output_type={"output": np.array(node.r.shape)}),
        },
        [("input", "lif"), ("lif", "output")],
    )
    current = torch.randint(0, 3, (20, 4, *node.r.shape), dtype=torch.float64)
    current[0, 0] = 1.0
    spikes = replay(alone, current)["lif"]
    assert not spikes[0, 0].any()
    assert torch.equal(spikes, lif(current, decay=decay, reset="hard"))


def test_normalisation_is_folded_and_the_encoder_stays_outside(tmp_path):
    graph = through_a_file(to_nir(network("resnet"), SHAPE), tmp_path / "model.nir")
    kinds = {type(node).__name__ for node in graph.nodes.values()}
    assert kinds == {"Input", "Conv2d", "LIF", "AvgPool2d", "Flatten", "Linear", "Output"}
    assert graph.metadata["encoder"] == "static, outside the graph"
    assert (graph.metadata["timesteps"], graph.metadata["dt"]) == (5, 1e-4)
    into = sorted(a for a, b in graph.edges if b == "stages_1_0_lif3")
    assert into == ["stages_1_0_lif2", "stages_1_0_shortcut"]


def test_without_leak_the_neuron_is_an_integrate_and_fire_node():
    graph = to_nir(network("mlp", decay=1.0), SHAPE)
    assert {type(node).__name__ for node in graph.nodes.values()} >= {"IF", "Affine"}


def test_without_memory_an_immediate_reset_is_the_hard_one():
    built = network("mlp", decay=0.0, reset="immediate")
    x_seq = built.encoder(torch.randn(6, *SHAPE, dtype=torch.float64))
    outputs = replay(to_nir(built, SHAPE), x_seq)
    for name, layer in spikes_of(built, x_seq)[0].items():
        assert torch.equal(outputs[name], layer)


@pytest.mark.parametrize(
    ("neuron", "reason", "cure"),
    [
        ({"reset": "delayed"}, "neuron.reset=delayed subtracts the threshold one step later", "neuron.reset=hard"),
        ({"reset": "immediate"}, "neuron.reset=immediate subtracts the threshold at once", "neuron.reset=hard"),
        ({"backend": "spikingjelly"}, "fires at the threshold", "neuron.backend=auto"),
    ],
)
@pytest.mark.parametrize(("kind", "first"), [("mlp", "layer lifs.0 "), ("resnet", "layer stem_lif ")])
def test_neurons_that_nir_has_not_are_refused_with_layer_reason_and_cure(kind, first, neuron, reason, cure):
    with pytest.raises(UserError) as refusal:
        to_nir(network(kind, **neuron), SHAPE)
    message = str(refusal.value)
    assert message.startswith(first)
    assert reason in message
    assert f"--set {cure}" in message
    assert "\n" not in message


def test_a_learnt_decay_outside_its_range_is_refused_at_its_own_layer():
    built = network("resnet", learnable=True)
    with torch.no_grad():
        built.network.stages[0][1].lif2.lif.decay.fill_(1.25)
    with pytest.raises(UserError, match=r"layer stages\.0\.1\.lif2 .* decay 1\.25 is outside 0\.\.1"):
        to_nir(built, SHAPE)


class Unheard(SpikingNetwork):
    """A network that the export does not know."""

    def features(self, x_seq):
        return x_seq


def test_a_network_of_another_layout_is_refused():
    with pytest.raises(UserError, match="Unheard has no NIR export"):
        to_nir(SpikingClassifier(Unheard(), Encoder(2)), SHAPE)


def test_the_network_itself_is_not_changed():
    built = network("mlp")
    before = {name: value.clone() for name, value in built.state_dict().items()}
    to_nir(built, SHAPE)
    assert all(value.dtype == before[name].dtype for name, value in built.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())
    assert all(parameter.requires_grad for parameter in built.parameters())


def test_a_replay_refuses_what_it_cannot_read():
    shape = np.array([2])
    ends = {"input": nir.Input(input_type={"input": shape}), "output": nir.Output(output_type={"output": shape})}
    leaky = nir.LI(tau=np.ones(2), r=np.ones(2), v_leak=np.zeros(2))
    graph = nir.NIRGraph({**ends, "leaky": leaky}, [("input", "leaky"), ("leaky", "output")])
    with pytest.raises(ValueError, match="leaky is a LI"):
        replay(graph, torch.zeros(1, 1, 2))
    weights = nir.Linear(np.eye(2))
    loop = nir.NIRGraph(
        {**ends, "again": weights}, [("input", "again"), ("again", "again"), ("again", "output")], type_check=False
    )
    with pytest.raises(ValueError, match="the graph has a loop through output, again"):
        replay(loop, torch.zeros(1, 1, 2))


def test_a_run_is_written_checked_on_test_items_and_written_again(runs):
    written = export_run(runs / "hard")
    assert written.path == runs / "hard" / "model.nir"
    assert (written.layers, written.checked_steps) == (2, 16 * 4)
    assert written.checked_neurons == 64 * (128 + 128)
    assert 0 < written.spikes < written.checked_neurons
    graph = nir.read(written.path)
    assert graph.metadata["dataset"] == "seq-digits"
    assert graph.metadata["classes"].split(", ") == [str(digit) for digit in range(10)]
    written.path.write_bytes(b"an older export")
    assert export_run(runs / "hard").path.stat().st_size > 10_000


def test_another_file_is_never_overwritten(runs, tmp_path):
    other = tmp_path / "mine.nir"
    assert export_run(runs / "hard", other).path == other
    other.write_bytes(b"precious")
    with pytest.raises(UserError, match="exists; choose another --out"):
        export_run(runs / "hard", other)
    assert other.read_bytes() == b"precious"
    with pytest.raises(UserError, match="is not a folder"):
        export_run(runs / "hard", tmp_path / "absent" / "model.nir")


def test_a_refused_run_leaves_no_file(runs):
    with pytest.raises(UserError, match=r"layer lifs\.0 cannot be written as NIR"):
        export_run(runs / "delayed")
    with pytest.raises(UserError, match="trained mlp, a network without spikes"):
        export_run(runs / "ordinary")
    with pytest.raises(UserError, match="is not a run folder"):
        export_run(runs / "nothing")
    assert not list((runs / "delayed").glob("*nir*"))


def test_without_the_package_the_command_to_install_it_is_named(runs):
    # None in sys.modules is how Python itself marks a module that cannot be imported
    program = (
        "import sys; sys.modules['nir'] = None; sys.argv = ['neurocl', 'spiking', 'export', sys.argv[1]];"
        "from neurocl.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(runs / "hard")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "pip install 'neurocl[nir]'" in done.stderr
