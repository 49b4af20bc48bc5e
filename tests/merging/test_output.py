"""Writing a merged model: layout, journal, and what happens when writing was broken off."""

import json
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file

from neurocl.errors import RunError, UserError
from neurocl.merging.checkpoints import FileSource
from neurocl.merging.engine import Step
from neurocl.merging.output import ModelWriter, shard_layout
from neurocl.merging.parameters import TensorSpec

VALUES = {f"t{index}": torch.arange(4, dtype=torch.float32) + index for index in range(5)}
STEPS = [Step(name, TensorSpec(value.dtype, tuple(value.shape)), "vector", "merge") for name, value in VALUES.items()]


def writer_of(folder, *, fingerprint="abc", shard_bytes=1 << 20, steps=STEPS):
    return ModelWriter(folder, steps, shard_bytes=shard_bytes, metadata={"x": "0000"}, fingerprint=fingerprint)


def write_all(writer, names=VALUES):
    for name in names:
        writer.write(name, 0, VALUES[name][:3])
        writer.write(name, 3, VALUES[name][3:])
        writer.complete(name, {"m": "digest"})


def test_a_tensor_larger_than_a_shard_gets_its_own_file():
    sizes = {"a": 3, "b": 3, "big": 100, "c": 3}
    specs = {name: TensorSpec(torch.uint8, (size,)) for name, size in sizes.items()}
    assert list(shard_layout(specs, 6).values()) == [["a", "b"], ["big"], ["c"]]
    assert list(shard_layout(specs, 6)) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert shard_layout(specs, 1000) == {"model.safetensors": list(sizes)}


@pytest.mark.parametrize("shard_bytes", [1, 33, 1 << 20])
def test_what_is_written_is_read_back_and_nothing_else_remains(tmp_path, shard_bytes):
    writer = writer_of(tmp_path / "out.partial", shard_bytes=shard_bytes)
    write_all(writer)
    writer.finish({"x": "done"})
    writer.appear_as(tmp_path / "out")
    writer.close()
    source = FileSource.open(tmp_path / "out")
    assert source.metadata == {"x": "done"}
    for name, value in VALUES.items():
        assert torch.equal(source.read(name, 0, 4), value)
    expected = set(writer.layout) | ({"model.safetensors.index.json"} if len(writer.layout) > 1 else set())
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_more_shards_than_files_may_be_open_are_written(tmp_path):
    steps = [Step(f"s{index:03d}", TensorSpec(torch.float32, (2,)), "vector", "merge") for index in range(60)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 30, hard))
    try:
        writer = writer_of(tmp_path / "out.partial", shard_bytes=1, steps=steps)
        for index, step in enumerate(steps):
            writer.write(step.name, 0, torch.full((2,), float(index)))
        writer.finish({"x": "done"})
        writer.appear_as(tmp_path / "out")
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert load_file(tmp_path / "out" / "model-00042-of-00060.safetensors")["s041"].tolist() == [41, 41]


def test_an_index_names_every_tensor_and_the_total_size(tmp_path):
    writer = writer_of(tmp_path / "out.partial", shard_bytes=40)
    write_all(writer)
    writer.finish({"x": "done"})
    index = json.loads((tmp_path / "out.partial" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in VALUES.values())
    assert index["weight_map"] == {name: file for file, names in writer.layout.items() for name in names}
    writer.close()


def test_a_writer_that_died_is_followed_by_one_that_knows_what_is_done(tmp_path):
    first = writer_of(tmp_path / "p")
    write_all(first, ["t0", "t1"])
    first.sync()
    write_all(first, ["t2"])  # never synced
    first.close()
    second = writer_of(tmp_path / "p")
    assert second.finished == {"t0": {"m": "digest"}, "t1": {"m": "digest"}}
    write_all(second, ["t2", "t3", "t4"])
    second.finish({"x": "done"})
    second.close()
    for name, value in load_file(tmp_path / "p" / "model.safetensors").items():
        assert torch.equal(value, VALUES[name])


def test_a_torn_line_of_the_journal_costs_that_line_only_and_only_once(tmp_path):
    first = writer_of(tmp_path / "p")
    write_all(first, ["t0", "t1"])
    first.sync()
    first.close()
    journal = tmp_path / "p" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    second = writer_of(tmp_path / "p")
    assert list(second.finished) == ["t0"]
    write_all(second, ["t1", "t2"])
    second.sync()
    second.close()
    third = writer_of(tmp_path / "p")
    assert list(third.finished) == ["t0", "t1", "t2"]
    third.close()


def test_a_file_of_another_size_starts_the_merge_anew(tmp_path):
    first = writer_of(tmp_path / "p")
    write_all(first, ["t0"])
    first.sync()
    first.close()
    path = tmp_path / "p" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        second = writer_of(tmp_path / "p")
        assert second.finished == {}
        second.close()


def test_the_folder_of_another_merge_is_refused_and_left_alone(tmp_path):
    first = writer_of(tmp_path / "p")
    write_all(first, ["t0"])
    first.sync()
    first.close()
    before = {path.name: path.read_bytes() for path in (tmp_path / "p").iterdir()}
    with pytest.raises(UserError, match="holds an interrupted merge of other models or options"):
        writer_of(tmp_path / "p", fingerprint="other")
    assert {path.name: path.read_bytes() for path in (tmp_path / "p").iterdir()} == before
    assert list(writer_of(tmp_path / "p").finished) == ["t0"]


def test_a_folder_of_the_user_is_refused_and_left_alone(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is in the way and no interrupted merge"):
        writer_of(tmp_path / "p")
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["thesis.txt"]


def test_two_writers_cannot_share_a_folder(tmp_path):
    first = writer_of(tmp_path / "p")
    with pytest.raises(UserError, match="in use by another merge"):
        writer_of(tmp_path / "p")
    first.close()
    writer_of(tmp_path / "p").close()


def test_an_output_that_came_into_being_meanwhile_is_not_replaced(tmp_path):
    writer = writer_of(tmp_path / "p")
    (tmp_path / "out").mkdir()
    (tmp_path / "file.safetensors").write_text("mine")
    with pytest.raises(UserError, match="out exists already"):
        writer.appear_as(tmp_path / "out")
    with pytest.raises(UserError, match=r"file\.safetensors exists already"):
        writer.appear_as_file(tmp_path / "file.safetensors", {})
    assert (tmp_path / "file.safetensors").read_text() == "mine"
    writer.close()


def test_metadata_of_another_length_than_announced_is_a_programmers_mistake(tmp_path):
    writer = writer_of(tmp_path / "p")
    with pytest.raises(ValueError, match="were reserved"):
        writer.finish({"x": "much longer than announced"})
    writer.close()


def test_a_full_disk_shows_before_anything_is_computed_and_the_folder_can_be_finished_later(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(RunError, match="may not grow that large"):
            writer_of(tmp_path / "p")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    writer = writer_of(tmp_path / "p")
    write_all(writer)
    writer.finish({"x": "done"})
    writer.close()
    assert torch.equal(load_file(tmp_path / "p" / "model.safetensors")["t4"], VALUES["t4"])
