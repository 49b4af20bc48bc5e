"""Processes that are killed, interrupted, starved of disk or given damaged files lose nothing."""

import json
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from neurocl.runs import RunFolder
from tests.cli.conftest import QUICK, assert_one_line

RUN = ("spiking", "train", "--quiet", "--threads", 1, "--buffer-size", 20, "--set", "checkpoint_seconds=0.05")
RUN = (*RUN, "--epochs", 3, "--set", "max_train_per_class=40", "--set", "max_test_per_class=20")


def numbers(run: Path) -> list:
    document = json.loads((run / "result.json").read_text())
    return [document["status"], document["accuracy"], document["metrics"], document["checkpoint_sha256"]]


def wait_for_checkpoint(process, run: Path) -> None:
    """Wait until the run has written a checkpoint (or ended)."""
    deadline = time.monotonic() + 60
    while not (run / "checkpoint" / "state.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run, never interrupted."""
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("whole") / "run"
    command = [sys.executable, "-m", "neurocl", *map(str, RUN), "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_killed_again_and_again_ends_with_the_same_numbers(start, neurocl, tmp_path, whole, seed):
    run = tmp_path / "run"
    rng = random.Random(seed)
    process = start(*RUN, "--out", run)
    wait_for_checkpoint(process, run)
    kills = 0
    for _ in range(3):
        time.sleep(rng.uniform(0.0, 0.5))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        process = start("spiking", "train", "--quiet", "--resume", run)
        time.sleep(rng.uniform(1.5, 2.5))
    process.kill()
    process.wait()
    assert kills >= 1
    result = neurocl("spiking", "train", "--quiet", "--resume", run)
    assert result.returncode == 0, result.stderr
    assert numbers(run) == numbers(whole)
    assert (run / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    leftovers = [path.name for path in (run / "checkpoint").iterdir() if path.name != "state.json"]
    assert len(leftovers) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_writes_a_checkpoint_and_exits_130(start, neurocl, tmp_path, whole, number):
    run = tmp_path / "run"
    process = start(*RUN, "--out", run)
    wait_for_checkpoint(process, run)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert f"--resume {run}" in stderr.strip().splitlines()[-1]
    assert json.loads((run / "result.json").read_text())["status"] == "interrupted"
    result = neurocl("spiking", "resume", run, "--quiet")
    assert result.returncode == 0, result.stderr
    assert numbers(run) == numbers(whole)


@pytest.mark.slow
def test_a_killed_series_of_seeds_goes_on_where_it_was(start, neurocl, tmp_path):
    arguments = ("continual", "train", *QUICK, "--method", "er", "--seeds", "0,1,2")
    assert neurocl(*arguments, "--out", "whole").returncode == 0
    process = start(*arguments, "--out", "cut")
    wait_for_checkpoint(process, tmp_path / "cut" / "seed-1")
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = neurocl("continual", "train", "--quiet", "--resume", "cut")
    assert result.returncode == 0, result.stderr
    for seed in (0, 1, 2):
        assert numbers(tmp_path / "cut" / f"seed-{seed}") == numbers(tmp_path / "whole" / f"seed-{seed}")


def test_two_processes_cannot_work_in_one_run(start, neurocl, tmp_path):
    run = tmp_path / "run"
    process = start(*RUN, "--epochs", 200, "--out", run)
    wait_for_checkpoint(process, run)
    assert_one_line(neurocl("spiking", "train", "--resume", run), 2, "in use by another process")
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_line_and_keeps_what_was_saved(neurocl, tmp_path):
    run = tmp_path / "run"
    assert neurocl(*RUN, "--out", run, "--stop-after-task", 2).returncode == 0
    before = {path: path.read_bytes() for path in (run / "checkpoint").iterdir()}

    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    result = neurocl("spiking", "train", "--quiet", "--resume", run, preexec_fn=small_files_only)
    assert_one_line(result, 1, "cannot write", "what was saved before is intact")
    assert {path: path.read_bytes() for path in (run / "checkpoint").iterdir()} == before
    assert neurocl("spiking", "train", "--quiet", "--resume", run).returncode == 0


@pytest.fixture
def stopped(inside, tmp_path):
    run = tmp_path / "run"
    assert inside("continual", "train", *QUICK, "--out", run, "--stop-after-task", 1).returncode == 0
    return run


def tensors_of(run: Path) -> Path:
    (path,) = (run / "checkpoint").glob("*.safetensors")
    return path


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_left_alone(inside, stopped):
    path = tensors_of(stopped)
    good = path.read_bytes()
    result_before = (stopped / "result.json").read_bytes()
    for bad, words in (
        (good[:-10], ("truncated", f"{len(good) - 10} of {len(good)} bytes")),
        (good[:-1] + bytes([good[-1] ^ 1]), ("SHA-256",)),
    ):
        path.write_bytes(bad)
        assert_one_line(inside("continual", "train", "--resume", stopped, "--quiet"), 2, path.name, *words)
        assert path.read_bytes() == bad
        assert (stopped / "result.json").read_bytes() == result_before
    path.unlink()
    assert_one_line(inside("continual", "train", "--resume", stopped, "--quiet"), 2, path.name, "missing")
    path.write_bytes(good)
    state = stopped / "checkpoint" / "state.json"
    text = state.read_text()
    for bad_text in ("{", "[]", '{"schema": 1}'):
        state.write_text(bad_text)
        assert_one_line(inside("continual", "train", "--resume", stopped, "--quiet"), 2, "state.json")
    state.write_text(text)
    assert inside("continual", "train", "--resume", stopped, "--quiet").returncode == 0


def test_a_checkpoint_of_another_network_is_refused(inside, stopped, tmp_path):
    other = tmp_path / "other"
    arguments = ("--backbone", "mlp", "--out", other, "--stop-after-task", 1)
    assert inside("continual", "train", *QUICK, *arguments).returncode == 0
    shutil.rmtree(stopped / "checkpoint")
    shutil.copytree(other / "checkpoint", stopped / "checkpoint")
    assert_one_line(inside("continual", "train", "--resume", stopped, "--quiet"), 2, "another configuration")


def test_a_run_folder_is_never_overwritten(inside, stopped):
    before = (stopped / "result.json").read_bytes()
    assert_one_line(inside("continual", "train", *QUICK, "--out", stopped), 2, "holds a run already", "--resume")
    (stopped.parent / "notes").mkdir()
    (stopped.parent / "notes" / "mine.txt").write_text("keep")
    assert_one_line(inside("continual", "train", *QUICK, "--out", "notes"), 2, "not an empty folder")
    assert (stopped / "result.json").read_bytes() == before


def test_a_truncated_data_file_is_named(inside, tmp_path):
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"{name}-ubyte").write_bytes(b"\x00\x00\x08\x03\x00\x00\x00\x05")
    result = inside("spiking", "train", "--smoke", "--dataset", "seq-mnist", "--data-dir", tmp_path / "data")
    assert_one_line(result, 2, "ubyte")


def test_nan_in_the_loss_is_one_line_and_exit_code_1(inside, tmp_path):
    arguments = ("--method", "sgd", "--set", "optimizer.name=sgd", "--lr", "1e30", "--epochs", 5, "--out", "run")
    result = inside("continual", "train", "--quiet", *arguments)
    assert_one_line(result, 1, "the loss is not finite", "learning rate")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


def test_what_a_killed_process_left_half_written_is_removed_by_the_next_checkpoint(tmp_path):
    folder = RunFolder.create(tmp_path / "run", stem="run")
    folder.save_checkpoint({"a": torch.zeros(2)}, {"step": 1})
    for name in (".state.json.77.tmp", ".tensors-5.safetensors.tmp", "tensors-5.safetensors"):
        (folder.path / "checkpoint" / name).write_bytes(b"half")
    folder.save_checkpoint({"a": torch.ones(2)}, {"step": 2})
    kept = {path.name for path in (folder.path / "checkpoint").iterdir()}
    assert len(kept) == 2
    assert "state.json" in kept
    assert folder.load_checkpoint().state["step"] == 2
