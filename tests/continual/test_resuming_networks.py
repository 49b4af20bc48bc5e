"""Resuming in the middle of a task with networks whose weights are not laid out contiguously."""

import json

import pytest
import torch

from neurocl import continual
from neurocl.continual.optimizer import restore_layouts
from neurocl.continual.progress import Progress
from neurocl.errors import UserError
from neurocl.runs import RunFolder

QUICK = {"epochs": 2, "max_train_per_class": 12, "max_test_per_class": 6, "buffer_size": 16, "threads": 1}
SMALL = {"backbone_options": {"stem": 8, "channels": [8, 16]}}


class StopAt(Progress):
    """Dies right after so many steps; with checkpoint_seconds=0 the step before was saved."""

    def __init__(self, steps):
        self.left = steps

    def step(self, *args):
        self.left -= 1
        if self.left == 0:
            raise MemoryError


@pytest.mark.parametrize(
    ("area", "method", "optimizer"),
    [
        ("spiking", "staer", {"name": "adamw", "lr": 3e-3}),
        ("spiking", "derpp", {"name": "sgd", "lr": 0.1, "momentum": 0.9}),
        ("continual", "er", {"name": "adam", "lr": 3e-3}),
    ],
)
def test_moments_return_to_their_weights(tmp_path, area, method, optimizer):
    backbone = "spiking-resnet-small" if area == "spiking" else "resnet-small"
    values = {"area": area, "method": method, "backbone": backbone, "optimizer": optimizer, **SMALL, **QUICK}
    whole = continual.train(out=tmp_path / "whole", **values)
    with pytest.raises(MemoryError):
        continual.train(out=tmp_path / "cut", checkpoint_seconds=0, progress=StopAt(4), **values)
    position = json.loads((tmp_path / "cut" / "checkpoint" / "state.json").read_text())["position"]
    assert position["begun"]
    config = tmp_path / "cut" / "config.yaml"
    config.write_text(config.read_text().replace("checkpoint_seconds: 0.0", "checkpoint_seconds: 60.0"))
    resumed = continual.resume(tmp_path / "cut")
    assert resumed.document["checkpoint_sha256"] == whole.document["checkpoint_sha256"]
    assert resumed.document["accuracy"] == whole.document["accuracy"]


def test_layouts_are_restored_value_by_value():
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    before = {name: value.clone() for name, value in state.items()}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = state[name].contiguous()
    restore_layouts(optimizer)
    for name, value in optimizer.state[weight].items():
        assert torch.equal(value, before[name])
        assert value.shape != weight.shape or value.stride() == weight.stride()


@pytest.fixture
def stopped(tmp_path):
    continual.train(area="continual", method="er", out=tmp_path / "run", stop_after_task=1, **QUICK)
    return tmp_path / "run"


def test_a_changed_configuration_is_refused_and_nothing_is_touched(stopped):
    config = stopped / "config.yaml"
    text = config.read_text()
    files = [path for path in stopped.rglob("*") if path.is_file() and path != config]
    before = {path: path.read_bytes() for path in files}
    for old, new in (("seed: 0", "seed: 7"), ("buffer_size: 16", "buffer_size: 20"), ("epochs: 2", "epochs: 3")):
        config.write_text(text.replace(old, new))
        with pytest.raises(UserError, match="belongs to another configuration"):
            continual.resume(stopped)
        assert {path: path.read_bytes() for path in files} == before
    config.write_text(text.replace("threads: 1", "threads: 2"))
    assert continual.resume(stopped, threads=1).status == "finished"


def test_a_finished_run_is_returned_as_it_is(stopped):
    first = continual.resume(stopped)
    written = (stopped / "result.json").read_bytes()
    again = continual.resume(stopped)
    assert again.document == {"schema": 1, **first.document}
    assert (stopped / "result.json").read_bytes() == written


def test_a_run_that_died_before_its_first_checkpoint_logs_every_epoch_once(tmp_path):
    with pytest.raises(MemoryError):
        continual.train(area="continual", method="er", out=tmp_path / "run", progress=StopAt(3), **QUICK)
    assert not RunFolder(tmp_path / "run").has_checkpoint()
    continual.resume(tmp_path / "run")
    records = RunFolder(tmp_path / "run").read_metrics()
    assert len([record for record in records if record["event"] == "epoch"]) == 10


def test_mistakes_leave_no_run_folder(tmp_path):
    for values in (
        {"method": "icarl", "buffer_size": 3},
        {"task_sizes": (9, 9)},
        {"backbone_options": {"hidden": [-1]}},
    ):
        with pytest.raises(UserError):
            continual.train(out=tmp_path / "run", **values)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["sgd", "er", "ewc-online", "icarl"])
def test_a_last_batch_of_one_item_joins_the_one_before(method):
    changes = {**QUICK, "max_train_per_class": 8, "batch_size": 3, "epochs": 1}
    network = {"backbone": "resnet18", "backbone_options": {"width": 0.1}, "optimizer": {"lr": 0.01}}
    result = continual.train(area="continual", method=method, keep=False, **network, **changes)
    assert result.status == "finished"
    if method == "sgd":
        assert result.document["steps"] == 5 * 5  # 16 items in batches of 3, 3, 3, 3, 4


def test_ewc_measures_colour_pictures_of_a_resnet(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 16), ("test", 8)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 3, 12, 12), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 4
    np.savez(tmp_path / "own.npz", **arrays)
    result = continual.train(
        area="continual",
        method="ewc-online",
        dataset=str(tmp_path / "own.npz"),
        backbone="resnet-small",
        keep=False,
        **SMALL,
        **{**QUICK, "epochs": 1},
    )
    assert result.status == "finished"


def test_gdumb_walks_the_stream_once_and_keeps_no_duplicates(tmp_path):
    continual.train(
        area="continual",
        method="gdumb",
        options={"fit_epochs": 1},
        out=tmp_path / "run",
        **{**QUICK, "epochs": 5, "buffer_size": 100},
    )
    tensors = RunFolder(tmp_path / "run").load_checkpoint().tensors
    assert int(tensors["method.memory.seen"]) == 120
    images = tensors["method.memory.field_image"].flatten(1)
    assert len(torch.unique(images, dim=0)) >= 99  # digits of 8 x 8 pixels hardly ever coincide


def test_the_time_of_a_method_counts_what_it_does_between_tasks():
    result = continual.train(area="continual", method="gdumb", options={"fit_epochs": 200}, keep=False, **QUICK)
    assert result.document["seconds"]["train"] > 0.5 * result.document["energy"]["seconds"]


def test_the_schedule_of_a_benchmark_can_be_replaced():
    from neurocl.continual.building import resolve

    config = resolve("continual", {"dataset": "seq-cifar100", "schedule": "cosine"})
    assert config.milestones == ()
    assert resolve("continual", {"dataset": "seq-cifar100"}).milestones == (35, 45)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {"name": "adam", "betas": (2, 0.9)}}, "betas must lie in"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr"),
        ({"seed": 2**32}, "seed: input should be less than"),
        ({"area": "spiking", "method": "lwf", "temporal_separation": True}, "no meaning for lwf"),
        ({"area": "spiking", "neuron": {"backend": "spikingjelly", "reset": "hard", "decay": 0}}, "decay above 0"),
    ],
)
def test_values_that_cannot_work_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        continual.train(keep=False, **values)
