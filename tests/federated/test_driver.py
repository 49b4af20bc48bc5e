"""A federated run is a function of its configuration, whatever goes wrong and however often it is resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neurocl.errors import RunError, UserError
from neurocl.federated.driver import resume_federated, run_federated
from neurocl.federated.exchange import Fault
from neurocl.federated.fedavg import FedAvg
from neurocl.federated.method import Reply
from neurocl.federated.payload import Payload, encode, num_bytes
from neurocl.federated.pretraining import _keep
from neurocl.runs import RunFolder
from tests.federated.small_problem import config, in_memory


def test_the_same_configuration_gives_the_same_model_and_bytes() -> None:
    first, second = in_memory(config())[0], in_memory(config())[0]
    one, two = first.run(), second.run()
    assert encode(first.state) == encode(second.state)
    assert (one["metrics"], one["bytes"]) == (two["metrics"], two["bytes"])
    other = in_memory(config(seed=1))[0]
    other.run()
    assert encode(other.state) != encode(first.state)


def test_bytes_are_those_of_the_messages() -> None:
    run, log = in_memory(config())
    result = run.run()
    rounds = [record for record in log if record["event"] == "round"]
    state = num_bytes(run.method.initial_state())
    assert result["bytes"]["down"] == 4 * 3 * state == sum(record["bytes_down"] for record in rounds)
    # A reply says besides how many samples stand behind it.
    arrays = sum(array.nbytes for array in run.state.arrays.values())
    assert all(0 < record["bytes_up"] - 3 * arrays < 3 * 20 for record in rounds)


def test_a_lost_reply_counts_for_nothing_and_is_told() -> None:
    faults = [Fault("raise", client=1, task=0, round=1), Fault("shape", client=2, task=1, round=0)]
    run, log = in_memory(config(max_repeats=0), *faults)
    result = run.run()
    rounds = [record for record in log if record["event"] == "round"]
    assert [record["clients"] for record in rounds] == [[0, 1, 2], [0, 2], [0, 1], [0, 1, 2]]
    assert result["failures"] == {"raised": 1, "malformed": 1}
    assert rounds[1]["failures"][0][1:] == ["raised", "RuntimeError: planned fault"]
    assert "shape" in rounds[2]["failures"][0][2]


def test_in_a_round_with_too_few_replies_those_who_did_not_answer_are_asked_again() -> None:
    run, log = in_memory(config(min_clients=3), Fault("drop", client=0, task=0, round=0))
    unbroken = in_memory(config(min_clients=3))[0]
    run.run()
    unbroken.run()
    assert encode(run.state) == encode(unbroken.state)
    first = next(record for record in log if record["event"] == "round")
    assert first["clients"] == [0, 1, 2]
    assert first["failures"] == [[0, "dropped", "planned fault"]]
    assert first["bytes_down"] == (3 + 1) * num_bytes(run.method.initial_state())


def test_lost_rounds_leave_the_server_as_it_was_and_three_in_a_row_end_the_run() -> None:
    everybody = [Fault("drop", client, task=0, round=1) for client in range(3)]
    run, log = in_memory(config(max_repeats=0), *everybody)
    run.run()
    assert [record["clients"] for record in log if record["event"] == "round"][1] == []
    lost = [Fault("raise", client, task, round_) for client in range(3) for task in (0, 1) for round_ in (0, 1)]
    with pytest.raises(RunError, match=r"3 rounds in a row without enough replies \(client 0 raised"):
        in_memory(config(max_repeats=0), *lost)[0].run()


def test_the_order_of_clients_does_not_matter_to_the_average() -> None:
    run, _ = in_memory(config())
    method = run.method
    state = method.initial_state()
    rng = np.random.default_rng(0)
    replies = [
        Reply(
            client,
            Payload({name: rng.normal(size=a.shape).astype(a.dtype) for name, a in state.arrays.items()}, {"n": n}),
        )
        for client, n in enumerate((5, 0, 7))
    ]
    place = next(iter(run._schedule()))[1]
    found = method.aggregate(state, place, replies)
    for name, array in found.arrays.items():
        wanted = (5 * replies[0].payload.arrays[name].astype(float) + 7 * replies[2].payload.arrays[name]) / 12
        np.testing.assert_allclose(array, wanted, rtol=1e-6, atol=1e-7)
    same = [Reply(client, replies[0].payload) for client in range(3)]
    for name, array in method.aggregate(state, place, same).arrays.items():
        np.testing.assert_allclose(array, replies[0].payload.arrays[name], rtol=1e-6)


def test_part_of_the_clients_take_part_by_a_stream_of_their_own() -> None:
    run, log = in_memory(config(participation=0.6, rounds=4))
    run.run()
    took = [record["clients"] for record in log if record["event"] == "round"]
    assert all(len(clients) == 2 for clients in took)
    assert len({tuple(clients) for clients in took}) > 1
    per_task, log = in_memory(config(participation=0.6, rounds=4, participation_per="task"))
    per_task.run()
    took = [record["clients"] for record in log if record["event"] == "round"]
    assert len({tuple(clients) for clients in took[:4]}) == len({tuple(clients) for clients in took[4:]}) == 1


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    mistakes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"method": "fedavgg"}, "did you mean 'fedavg'"),
        ({"options": {"weigths": "equal"}}, "unknown key 'weigths'"),
        ({"dataset": "digit"}, "did you mean 'digits'"),
        ({"classes_per_task": 11}, "has 10 classes"),
        ({"partition": {"num_clients": 900}}, "not enough to give every client"),
    )
    for number, (changes, words) in enumerate(mistakes):
        with pytest.raises(UserError, match=words):
            run_federated(config(**changes), out=tmp_path / str(number))


COMMAND = [sys.executable, "-m", "neurocl", "federated", "run", "--quiet", "--clients", "4", "--local-epochs", "4"]


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_like_an_unbroken_one(tmp_path: Path) -> None:
    subprocess.run([*COMMAND, "--out", tmp_path / "whole"], check=True, capture_output=True)
    whole = RunFolder.open(tmp_path / "whole")
    broken = tmp_path / "broken"
    rng = np.random.default_rng(0)
    arguments = [*COMMAND, "--out", str(broken)]
    log = broken / "metrics.jsonl"
    # Killed a moment after its second, fifth and eighth record, wherever in a round that may be.
    for records in (2, 5, 8):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < records):
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, 0.15)))
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        arguments = [sys.executable, "-m", "neurocl", "federated", "run", "--quiet", "--resume", str(broken)]
    resume_federated(broken)
    run = RunFolder.open(broken)
    wanted, found = whole.read_result(), run.read_result()
    for key in ("accuracy", "metrics", "bytes", "failures"):
        assert found[key] == wanted[key]
    one, two = whole.load_checkpoint(), run.load_checkpoint()
    assert one.state["sha256"] == two.state["sha256"]
    strip = ("seconds",)
    logs = [
        [{key: value for key, value in record.items() if key not in strip} for record in folder.read_metrics()]
        for folder in (whole, run)
    ]
    assert logs[0] == logs[1]


def test_an_interrupted_run_says_so_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*COMMAND, "--rounds", "30", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "checkpoint" / "state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped after round" in errors
    state = json.loads((out / "checkpoint" / "state.json").read_text())
    assert state["progress"]["step"] >= 1


def test_the_base_method_is_pure(tmp_path: Path) -> None:
    run, _ = in_memory(config())
    assert isinstance(run.method, FedAvg)
    state = run.method.initial_state()
    before = encode(state)
    place = next(iter(run._schedule()))[1]
    outcome = run.exchange(place, dict.fromkeys(range(3), run.method.message(state, place)), 0)
    first = run.method.aggregate(state, place, outcome.replies)
    assert encode(state) == before
    assert encode(run.method.aggregate(state, place, outcome.replies)) == encode(first)


def test_what_a_client_stored_counts_only_if_its_reply_did() -> None:
    run, _ = in_memory(config())
    for client in (0, 1):
        run.stores.write(client, {"a": np.array([1])})
    run.stores.discard([1])
    run.stores.commit()
    assert np.array_equal(run.stores.read(0)["a"], [1])
    assert run.stores.read(1) == {}
    fault = Fault("shape", client=1, task=0, round=0)
    livar, _ = in_memory(config(method="livar", rounds=1, classes_per_task=(2,), max_repeats=0), fault)
    livar.run()
    assert livar.stores.read(0)
    assert livar.stores.read(1) == {}


def test_what_never_began_leaves_no_folder_in_the_way(tmp_path: Path) -> None:
    for wrong in ({"method": "nope"}, {"device": "nope"}, {"device": "cuda:99"}, {"options": {"nope": 1}}):
        with pytest.raises(UserError) as caught:
            run_federated(config(**wrong), out=tmp_path / "run")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        _keep(tmp_path / "file" / "federated" / "weights.safetensors", {"x": torch.zeros(1)})
