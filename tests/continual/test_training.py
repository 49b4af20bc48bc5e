"""Whole runs on real digits: outcomes that must hold, same seed same result, and resuming."""

import json

import numpy as np
import pytest
import torch

from neurocl import continual
from neurocl.continual.catalog import METHODS
from neurocl.continual.method import Method
from neurocl.continual.progress import Progress
from neurocl.errors import RunError, UserError
from neurocl.runs import RunFolder

QUICK = {"epochs": 1, "max_train_per_class": 20, "max_test_per_class": 10, "buffer_size": 20, "threads": 1}
PAIRS = [(area, name) for area in ("continual", "spiking") for name in METHODS.names(area)]
OPTIONS = {"gdumb": {"fit_epochs": 3}}


def run(area, method, **changes):
    return continual.train(
        area=area, method=method, options=OPTIONS.get(method, {}), **{"keep": False, **QUICK, **changes}
    )


class StopAfter(Progress):
    """Raises after so many steps, as a crash would."""

    def __init__(self, steps):
        self.left = steps

    def step(self, *args):
        self.left -= 1
        if self.left == 0:
            raise MemoryError("out of luck")


def numbers(result):
    document = result.document
    return json.dumps([document["accuracy"], document["metrics"], document["checkpoint_sha256"]])


@pytest.mark.parametrize(("area", "method"), PAIRS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(area, method, tmp_path):
    whole = run(area, method, keep=True, out=tmp_path / "whole")
    with pytest.raises(MemoryError):
        run(area, method, keep=True, out=tmp_path / "cut", checkpoint_seconds=0, progress=StopAfter(8))
    resumed = continual.resume(tmp_path / "cut")
    assert resumed.status == "finished"
    assert numbers(resumed) == numbers(whole)
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(("area", "method"), [("spiking", "staer"), ("continual", "derpp"), ("continual", "icarl")])
def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(area, method):
    first, second, other = (run(area, method, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.class_il, second.class_il)
    assert first.document["metrics"] == second.document["metrics"]
    assert not np.array_equal(first.class_il, other.class_il, equal_nan=True)


def test_keeping_no_folder_changes_no_number(tmp_path):
    kept, not_kept = run("spiking", "er", keep=True, out=tmp_path / "run"), run("spiking", "er")
    np.testing.assert_array_equal(kept.class_il, not_kept.class_il)


def test_stopping_after_a_task_and_going_on_equals_one_run(tmp_path):
    whole = run("spiking", "staer")
    stopped = run("spiking", "staer", keep=True, out=tmp_path / "run", stop_after_task=1)
    assert stopped.status == "stopped"
    assert stopped.class_il.shape == (2, 5)
    resumed = continual.resume(tmp_path / "run")
    np.testing.assert_array_equal(resumed.class_il, whole.class_il)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = run("continual", "er", keep=True, out=tmp_path / "run")
    again = continual.resume(tmp_path / "run")
    assert numbers(first) == numbers(again)
    assert again.document["steps"] == first.document["steps"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_accumulated_gradients_survive_a_cut(tmp_path, precision):
    changes = {"accumulate": 3, "precision": precision}
    whole = run("spiking", "er", keep=True, out=tmp_path / "whole", **changes)
    with pytest.raises(MemoryError):
        run("spiking", "er", keep=True, out=tmp_path / "cut", checkpoint_seconds=0, progress=StopAfter(7), **changes)
    assert numbers(continual.resume(tmp_path / "cut")) == numbers(whole)


def test_on_digits_sgd_forgets_and_replay_does_not():
    results = {
        method: run("spiking", method, epochs=20, buffer_size=50, max_train_per_class=None, max_test_per_class=None)
        for method in ("sgd", "er", "joint")
    }
    class_il = {method: result.metrics["class_il"]["final_average_accuracy"] for method, result in results.items()}
    task_il = {method: result.metrics["task_il"]["final_average_accuracy"] for method, result in results.items()}
    assert class_il["sgd"] == pytest.approx(20, abs=4)
    assert results["sgd"].class_il[-1, -1] > 95
    assert class_il["er"] >= 70
    assert class_il["joint"] > 97
    assert all(task_il[method] >= class_il[method] for method in results)


def test_more_memory_helps_er_on_digits():
    accuracies = [
        np.mean(
            [
                run(
                    "spiking",
                    "er",
                    epochs=20,
                    buffer_size=size,
                    seed=seed,
                    max_train_per_class=None,
                    max_test_per_class=None,
                ).metrics["class_il"]["final_average_accuracy"]
                for seed in (0, 1)
            ]
        )
        for size in (20, 200)
    ]
    assert accuracies[1] > accuracies[0] + 5


def test_staer_learns_the_digits_stream():
    result = run("spiking", "staer", epochs=20, buffer_size=50, max_train_per_class=None, max_test_per_class=None)
    assert result.metrics["class_il"]["final_average_accuracy"] >= 70
    assert result.metrics["task_il"]["final_average_accuracy"] >= 95


def test_forward_transfer_needs_accuracies_before_training():
    result = run("continual", "er", forward_transfer=True)
    assert "forward_transfer" in result.metrics["class_il"]
    assert not np.isnan(np.diag(result.class_il, k=1)).any()
    assert "forward_transfer" not in run("continual", "er").metrics["class_il"]


def test_lwf_without_distillation_and_warm_up_is_training_on_seen_classes(monkeypatch, tmp_path):
    class SeenClasses(Method):
        def loss(self, batch):
            seen = sum(self.setting.task_sizes[: self.task_index + 1])
            return {"ce": torch.nn.functional.cross_entropy(self.network(batch.x)[:, :seen], batch.y)}

    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    METHODS.register("seen-classes", SeenClasses, "plain training on the classes seen")

    def weights(name, method, **options):
        continual.train(area="continual", method=method, options=options, out=tmp_path / name, **{**QUICK, "epochs": 3})
        tensors = RunFolder(tmp_path / name).load_checkpoint().tensors
        return torch.cat([value.flatten() for key, value in sorted(tensors.items()) if ".network." in key])

    plain = weights("plain", "seen-classes")
    assert torch.equal(weights("zero", "lwf", alpha=0.0, warm_up=False), plain)
    assert not torch.allclose(weights("five", "lwf", alpha=5.0, warm_up=False), plain)


def test_nan_in_the_loss_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    changes = {"optimizer": {"name": "sgd", "lr": 1e30}, "checkpoint_seconds": 0}
    with pytest.raises(RunError, match=r"the loss is not finite in task 1, epoch \d+, step \d+ \(ce = "):
        run("continual", "sgd", keep=True, out=tmp_path / "run", epochs=5, **changes)
    document = json.loads((tmp_path / "run" / "result.json").read_text())
    assert document["status"] == "failed"
    assert "not finite" in document["error"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "stear", "area": "spiking"}, "unknown method 'stear'; did you mean 'staer'"),
        ({"dataset": "seq-digit"}, "seq-digits"),
        ({"backbone": "resnet20"}, "did you mean 'resnet1"),
        ({"epoch": 3}, "unknown key 'epoch'; did you mean 'epochs'"),
        ({"epochs": 0}, "epochs: input should be greater than or equal to 1, got 0"),
        ({"optimizer": {"learning_rate": 1}}, "unknown key 'optimizer.learning_rate'"),
        ({"method": "er", "options": {"beta": 1}}, "options of er: unknown key 'beta'"),
        ({"method": "staer"}, "method 'staer' is for `neurocl spiking`"),
        ({"area": "spiking", "method": "staer", "timesteps": 3}, "even number of timesteps"),
        ({"backbone": "mlp", "backbone_options": {"widht": 3}}, "no option 'widht'"),
        ({"task_sizes": (6, 6)}, "sum to at most 10"),
        ({"permute_classes": True, "class_order": tuple(range(10))}, "exclude each other"),
        ({"method": "icarl", "buffer_size": 5}, "buffer_size must be at least 10, got 5"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"area": "spiking", "dataset": "nowhere.npz"}, "nowhere.npz: no such file"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(UserError, match=message):
        continual.train(keep=False, **values)


def test_a_class_with_one_sample_and_tasks_smaller_than_a_batch_work():
    result = run("spiking", "staer", max_train_per_class=1, batch_size=32)
    assert result.status == "finished"


def test_class_permutation_is_recorded_and_changes_the_stream():
    result = run("continual", "er", permute_classes=True, seed=1)
    order = result.document["protocol"]["class_order"]
    assert sorted(order) == list(range(10))
    assert order != list(range(10))
    old_to_new = np.random.RandomState(1).permutation(10)
    assert [int(old_to_new[old]) for old in order] == list(range(10))


def test_threads_are_set_only_if_configured():
    torch.set_num_threads(2)
    run("continual", "sgd", threads=None)
    assert torch.get_num_threads() == 2
    run("continual", "sgd", threads=1)
    assert torch.get_num_threads() == 1
