"""STAER's step: the loss pieces against a reference step, and what the step must and must not do."""

import numpy as np
import pytest
import torch
from torch import nn

from neurocl.continual.der import Derpp, DerppConfig
from neurocl.continual.losses import cross_entropy
from neurocl.continual.method import Batch, Setting
from neurocl.data.augment import Augment
from neurocl.errors import UserError
from neurocl.spiking.network import spiking_mlp, spiking_resnet_small
from neurocl.spiking.staer import Staer, StaerConfig, alignment_loss
from tests.conftest import reference_cases


def make_setting(**changes):
    values = {
        "task_sizes": (2,) * 5,
        "input_shape": (1, 4, 4),
        "augment": Augment("none", None, None),
        "buffer_size": 20,
        "batch_size": 6,
        "replay_batch": 6,
        "epochs": 1,
        "per_step_loss": False,
        "make_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "augment_generator": torch.Generator().manual_seed(0),
        "seed": 0,
    }
    return Setting(**{**values, **changes})


def make_batch(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    y = torch.randint(10, (count,), generator=generator)
    return Batch(raw.float() / 255, y, raw, torch.arange(count))


def make_staer(timesteps=4, network=None, setting=None, **options):
    torch.manual_seed(0)
    network = network or spiking_mlp((1, 4, 4), 10, timesteps=timesteps, hidden=(16,))
    return Staer(network, setting or make_setting(), StaerConfig(**options)).train()


@pytest.mark.parametrize("case", [c for c in reference_cases("staer/staer_step") if not c["buffer_empty"]])
def test_loss_pieces_and_gradients_equal_the_reference_step(case):
    main, full, half = (
        torch.from_numpy(case[name]).requires_grad_()
        for name in ("main_logits", "buf_logits_full", "buf_logits_half_batch")
    )
    labels = torch.from_numpy(np.concatenate([case["labels"], case["buf_labels"]]))
    ce = cross_entropy(main, labels, per_step=bool(case["temp_sep"]))
    pieces = alignment_loss(
        full,
        half,
        *(torch.from_numpy(case[f"past_{name}"]) for name in ("half", "same", "double")),
        alpha1=float(case["alpha1"]),
        alpha2=float(case["alpha2"]),
        gamma=float(case["gamma"]),
        normalize=bool(case["normalize"]),
    )
    loss = ce + float(case["beta"]) * pieces.total
    loss.backward()
    close = {"rtol": 1e-6, "atol": 1e-8}
    np.testing.assert_allclose(ce.item(), case["ce_term"], **close)
    np.testing.assert_allclose(pieces.same.item(), case["sdtw_same"], **close)
    if case["alpha1"]:
        np.testing.assert_allclose(pieces.half.item(), case["sdtw_half"], **close)
    if case["alpha2"]:
        np.testing.assert_allclose(pieces.double.item(), case["sdtw_double"], **close)
    np.testing.assert_allclose(loss.item(), case["loss"], **close)
    np.testing.assert_allclose(main.grad.numpy(), case["grad_main"], **close)
    np.testing.assert_allclose(full.grad.numpy(), case["grad_buf_full"], **close)
    np.testing.assert_allclose(half.grad.numpy(), case["grad_buf_half_batch"], **close)


class Scripted(nn.Module):
    """A sequence network that answers with given outputs and notes what it was asked."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = list(outputs)
        self.asked = []

    def forward(self, x_seq):
        self.asked.append(tuple(x_seq.shape[:2]))
        return self.outputs.pop(0)


@pytest.mark.parametrize("case", reference_cases("staer/staer_step"))
def test_the_whole_step_calls_stores_and_sums_as_the_reference(case):
    steps, batch_size, classes = int(case["T"]), int(case["B"]), int(case["K"])
    network = spiking_mlp((1, 4, 4), classes, timesteps=steps)
    options = {name: float(case[name]) for name in ("alpha1", "alpha2", "beta", "gamma")}
    setting = make_setting(
        task_sizes=(classes,),
        batch_size=batch_size,
        replay_batch=batch_size,
        buffer_size=batch_size,
        per_step_loss=bool(case["temp_sep"]),
    )
    method = make_staer(network=network, setting=setting, normalize=bool(case["normalize"]), memory="split", **options)
    method = method.double()
    empty = bool(case["buffer_empty"])
    batch = make_batch(batch_size)
    batch = Batch(batch.x, torch.from_numpy(case["labels"]), batch.raw, batch.index)
    outputs = [case["main_logits"], case["out_half"], case["out_same"], case["out_double"]]
    if not empty:
        series = {name: torch.from_numpy(case[f"past_{name}"]) for name in ("half", "same", "double")}
        method.memory.add(image=batch.raw, label=torch.from_numpy(case["buf_labels"]))
        method.series_memory.add(image=batch.raw, label=torch.from_numpy(case["buf_labels"]), **series)
        # draws come in stored order, so that the scripted outputs belong to the stored series
        for memory in (method.memory, method.series_memory):
            memory.sample = lambda count, memory=memory: {n: memory.field(n)[:count].clone() for n in memory.names}
        outputs += [case["buf_logits_full"], case["buf_logits_half_batch"]]
    scripted = Scripted([torch.from_numpy(output).requires_grad_() for output in outputs])
    main = scripted.outputs[0]
    network.network = scripted
    terms = method.loss(batch)
    total = torch.stack([term.double() for term in terms.values()]).sum()
    total.backward()
    np.testing.assert_allclose(total.item(), case["loss"], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(main.grad.numpy(), case["grad_main"], rtol=1e-6, atol=1e-8)
    assert [list(shape) for shape in scripted.asked] == case["net_call_shapes_TB"].tolist()[: len(scripted.asked)]
    for name in ("half", "same", "double"):
        stored = method._stream_series[name].numpy()
        np.testing.assert_allclose(stored, case[f"stored_{name}"], rtol=1e-6, atol=1e-6)
        assert not method._stream_series[name].requires_grad


@pytest.mark.parametrize("case", reference_cases("staer/sderpp_step"))
def test_spiking_derpp_equals_the_reference_step(case):
    steps, batch_size, classes = case["logits"].shape
    network = Scripted(
        torch.from_numpy(case[name]).requires_grad_() for name in ("logits", "buf_logits_mse", "buf_logits_ce")
    )
    inputs = list(network.outputs)
    setting = make_setting(
        task_sizes=(classes,),
        buffer_size=batch_size,
        replay_batch=batch_size,
        per_step_loss=bool(case["temp_sep"]),
    )
    config = DerppConfig(alpha=float(case["alpha"]), beta=float(case["beta"]))
    method = Derpp(network, setting, config).double()
    batch = make_batch(batch_size)
    batch = Batch(batch.x.expand(steps, *batch.x.shape), torch.from_numpy(case["labels"]), batch.raw, batch.index)
    stored = torch.from_numpy(case["stored_logits"]).mean(dim=1)
    method.memory.add(image=batch.raw, label=torch.from_numpy(case["buf_labels"]), logits=stored)
    method.memory.sample = lambda count: {n: method.memory.field(n)[:count].clone() for n in method.memory.names}
    total = torch.stack(list(method.loss(batch).values())).sum()
    total.backward()
    np.testing.assert_allclose(total.item(), case["loss"], rtol=1e-6, atol=1e-8)
    for given, name in zip(inputs, ("logits", "mse", "ce"), strict=True):
        gradient = np.zeros_like(case[f"grad_{name}"]) if given.grad is None else given.grad.numpy()
        np.testing.assert_allclose(gradient, case[f"grad_{name}"], rtol=1e-6, atol=1e-8)
    written = torch.from_numpy(case["written_logits"]).mean(dim=1)
    torch.testing.assert_close(method._stream_logits, written, rtol=1e-6, atol=1e-8)


def test_stored_series_are_those_of_forward_passes_before_the_update():
    method = make_staer()
    batch = make_batch()
    twin = spiking_mlp((1, 4, 4), 10, timesteps=4, hidden=(16,))
    twin.load_state_dict(method.network.state_dict())
    x_seq = method.network.encoder(batch.x)
    terms = method.loss(batch)
    with torch.no_grad():
        expected = [twin.network(x_seq[:1].expand(steps, *batch.x.shape)) for steps in (2, 4, 8)]
    sum(terms.values()).backward()
    torch.optim.SGD(method.parameters(), lr=1.0).step()
    method.after_step(batch)
    for name, value in zip(("half", "same", "double"), expected, strict=True):
        assert torch.equal(method.memory.field(name), value.transpose(0, 1))


def test_storage_passes_build_no_graph():
    method = make_staer()
    method.loss(make_batch())
    assert all(not series.requires_grad for series in method._stream_series.values())


@pytest.mark.parametrize("storage_bn", ["track", "frozen"])
def test_storage_passes_update_statistics_only_if_asked(storage_bn):
    method = make_staer(storage_bn=storage_bn)
    method.loss(make_batch())
    updates = 4 if storage_bn == "track" else 1
    assert int(method.network.network.lifs[0].norm.num_batches_tracked) == updates


def test_two_memories_hold_different_images_and_one_memory_one_set():
    split, shared = make_staer(memory="split"), make_staer(memory="shared")
    for seed in range(30):
        for method in (split, shared):
            batch = make_batch(seed=seed)
            method._stream_series = method.storage_series(batch, method.network.encoder(batch.x))
            method.after_step(batch)
    assert not torch.equal(split.memory.field("image"), split.series_memory.field("image"))
    assert shared.series_memory is None
    assert set(shared.memory.names) == {"image", "label", "half", "same", "double"}


@pytest.mark.parametrize(
    "options",
    [
        {"alignment": "same"},
        {"alignment": "contraction"},
        {"alignment": "expansion"},
        {"alignment": "stepwise"},
        {"alignment": "time-mean"},
        {"alignment": "none"},
        {"storage_passes": "single", "half_forward": "slice"},
        {"storage_view": "raw"},
        {"memory": "split", "storage_bn": "frozen"},
    ],
)
def test_every_variant_takes_steps(options):
    method = make_staer(**options)
    for seed in range(3):
        batch = make_batch(seed=seed)
        terms = method.loss(batch)
        sum(terms.values()).backward()
        method.after_step(batch)
    assert all(torch.isfinite(term) for term in terms.values())
    assert ("alignment" in terms) == (options.get("alignment") != "none")


@pytest.mark.parametrize("timesteps", [1, 3])
def test_odd_numbers_of_steps_are_refused_in_one_line(timesteps):
    with pytest.raises(UserError, match=f"even number of timesteps, at least 2, got {timesteps}"):
        make_staer(timesteps=timesteps)


def test_a_batch_of_one_and_a_memory_smaller_than_a_batch_work():
    method = make_staer(setting=make_setting(buffer_size=2, batch_size=1))
    for seed in range(4):
        batch = make_batch(count=1, seed=seed)
        terms = method.loss(batch)
        sum(terms.values()).backward()
        method.after_step(batch)
    assert torch.isfinite(terms["alignment"])


def test_a_static_image_passes_the_stem_once_whatever_the_number_of_steps():
    network = spiking_resnet_small((1, 4, 4), 10, timesteps=4)
    method = make_staer(network=network)
    rows = []
    network.network.stem.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    method.loss(make_batch())
    assert rows == [6, 6, 6, 6]
