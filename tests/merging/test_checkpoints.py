"""Reading safetensors by position: right values, and one sentence for every kind of damage."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from neurocl.errors import UserError
from neurocl.merging.checkpoints import DTYPE_NAMES, FileSource, header_bytes, read_header
from neurocl.merging.parameters import TensorSpec
from tests.merging.models import content_sha256, save_folder, small_models


def all_types():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 2, (3, 5), generator=generator)
    return {f"tensor.{name}": values.to(dtype) for dtype, name in DTYPE_NAMES.items()} | {"scalar": torch.tensor(2.5)}


def text_of(header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def whole(source):
    return {n: source.read(n, 0, s.numel).clone().view(s.shape) for n, s in source.tensors.items()}


def test_every_type_is_read_as_the_safetensors_library_reads_it(tmp_path):
    save_file(all_types(), tmp_path / "a.safetensors", metadata={"who": "me"})
    source = FileSource.open(tmp_path / "a.safetensors")
    expected = load_file(tmp_path / "a.safetensors")
    assert source.metadata == {"who": "me"}
    assert source.tensors.keys() == expected.keys()
    for name, value in whole(source).items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value.double(), expected[name].double())
    source.close()


def test_slices_are_read_from_their_place(tmp_path):
    save_file({"a": torch.arange(7), "b": torch.arange(100, 120)}, tmp_path / "a.safetensors")
    source = FileSource.open(tmp_path / "a.safetensors")
    assert source.read("b", 3, 6).tolist() == [103, 104, 105]
    assert source.read("b", 6, 6).numel() == 0


def test_a_written_header_is_read_by_the_safetensors_library(tmp_path):
    tensors = all_types()
    specs = [(name, TensorSpec(value.dtype, tuple(value.shape))) for name, value in tensors.items()]
    data = b"".join(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for value in tensors.values())
    header = header_bytes(specs, {"text": "äöü €"})
    assert len(header) % 8 == 0
    (tmp_path / "a.safetensors").write_bytes(header + data)
    for name, value in load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(value.double(), tensors[name].double())
    placed, metadata = read_header(tmp_path / "a.safetensors")
    assert metadata == {"text": "äöü €"}
    assert list(placed) == list(tensors)


def test_shards_and_a_single_file_are_one_model(tmp_path):
    base, _ = small_models(1)
    single = FileSource.open(save_folder(tmp_path / "single", base))
    sharded = FileSource.open(save_folder(tmp_path / "sharded", base, shards=3))
    assert single.tensors == sharded.tensors
    for name, value in whole(sharded).items():
        assert torch.equal(value, base[name])
    assert single.digest({}) == sharded.digest({}) == content_sha256(base)


def test_more_shards_than_files_may_be_open_are_read(tmp_path):
    base = {f"t{index:02d}": torch.full((2,), float(index)) for index in range(40)}
    source = FileSource.open(save_folder(tmp_path / "m", base, shards=40))
    for _ in range(2):
        for name, value in base.items():
            assert torch.equal(source.read(name, 0, 2), value)


def test_the_digest_is_taken_while_slices_are_read_even_twice_or_broken_off(tmp_path):
    base, _ = small_models(1)
    source = FileSource.open(save_folder(tmp_path / "m", base))
    source.hashing = True
    source.read("blocks.0.weight", 0, 10)
    source.read("blocks.1.weight", 0, 3)
    for name, spec in source.tensors.items():
        for start in range(0, spec.numel, 5):
            for _ in range(3):
                source.read(name, start, min(spec.numel, start + 5))
    known = dict(source.digests)
    assert known.keys() == {name for name, spec in source.tensors.items() if spec.numel}
    assert source.digest(known) == content_sha256(base)


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
DAMAGED = {
    "empty": (b"", "its header is cut off"),
    "seven bytes": (b"1234567", "its header is cut off"),
    "huge header": (struct.pack("<Q", 1 << 60) + b"{}", "its header is cut off"),
    "no header": (struct.pack("<Q", 0), "its header is cut off"),
    "header cut": (text_of(GOOD)[:-3], "its header is cut off"),
    "not JSON": (text_of(b"{nonsense}"), "not JSON"),
    "not UTF-8": (text_of(b"\xff\xfe\xfd{}"), "not JSON"),
    "deep": (text_of(b"[" * 100_000), "not JSON"),
    "a list": (text_of([1, 2]), "not a table"),
    "entry a number": (text_of({"a": 3}), "entry of tensor 'a' is damaged"),
    "entry without shape": (text_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), "tensor 'a' is damaged"),
    "three offsets": (text_of({"a": GOOD["a"] | {"data_offsets": [0, 8, 9]}}), "tensor 'a' is damaged"),
    "negative": (text_of({"a": GOOD["a"] | {"data_offsets": [-8, 0]}}) + bytes(8), "tensor 'a' is damaged"),
    "true as size": (text_of({"a": GOOD["a"] | {"shape": [True, 2]}}) + bytes(8), "tensor 'a' is damaged"),
    "endless number": (text_of({"a": GOOD["a"] | {"shape": [10**4000] * 2}}), "tensor 'a' is damaged"),
    "unknown type": (text_of({"a": GOOD["a"] | {"dtype": "F3"}}) + bytes(8), "tensor 'a' has type 'F3'"),
    "type a list": (text_of({"a": GOOD["a"] | {"dtype": ["F32"]}}) + bytes(8), "tensor 'a' has type"),
    "wrong size": (text_of({"a": GOOD["a"] | {"shape": [3]}}) + bytes(8), "tensor 'a' of shape [3]"),
    "truncated": (text_of(GOOD) + bytes(7), "truncated: tensor 'a' ends at byte"),
    "overlap": (
        text_of(GOOD | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}) + bytes(12),
        "tensor 'b' overlaps 'a'",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named_with_the_tensor(tmp_path, kind):
    data, words = DAMAGED[kind]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        FileSource.open(path)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=10,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "BOOL", "F4"]) | JSON,
        "shape": st.lists(st.integers(-1, 5) | JSON, max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), max_size=3) | JSON,
    },
)
HEADER = st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), ENTRY | JSON, max_size=4) | JSON


def never_anything_but_a_user_error(path, data):
    path.write_bytes(data)
    try:
        placed, metadata = read_header(path)
    except UserError:
        return
    assert all(place.begin + place.spec.nbytes <= len(data) for place in placed.values())
    assert all(isinstance(value, str) for value in metadata.values())


@settings(max_examples=150, deadline=None)
@given(header=HEADER, tail=st.binary(max_size=40))
def test_a_header_of_any_content_is_read_or_refused(tmp_path_factory, header, tail):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    never_anything_but_a_user_error(path, text_of(header) + tail)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=80), length=st.none() | st.integers(0, 80))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data, length):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    never_anything_but_a_user_error(path, data if length is None else struct.pack("<Q", length) + data)


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 500), value=st.integers(0, 255))
def test_any_one_byte_changed_is_read_or_refused(tmp_path_factory, place, value):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    base, _ = small_models(1)
    save_file(base, path)
    data = bytearray(path.read_bytes())
    data[place] = value
    never_anything_but_a_user_error(path, bytes(data))


def refused(path, *words):
    with pytest.raises(UserError) as caught:
        FileSource.open(path)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_without_a_readable_model_say_what_is_wrong(tmp_path):
    base, _ = small_models(1)
    refused(tmp_path / "nothing", "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no safetensors file in that folder")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    refused(tmp_path / "pickled", "pytorch_model.bin", "pickle", "save the model as safetensors")
    for suffix in ("bin", "pt", "pth", "ckpt"):
        path = tmp_path / f"model.{suffix}"
        path.write_bytes(b"\x80\x02")
        refused(path, str(path), "pickle")
    many = save_folder(tmp_path / "many", base)
    (many / "model.safetensors").rename(many / "a.safetensors")
    assert FileSource.open(many).tensors
    save_file(base, many / "b.safetensors")
    refused(many, "2 safetensors files but no model.safetensors.index.json")
    save_file({}, tmp_path / "none.safetensors")
    refused(tmp_path / "none.safetensors", "holds no tensors")


@pytest.mark.parametrize(
    "name", ["meta-llama/Llama-3", "gpt2", "https://huggingface.co/gpt2", "hf://org/model/sub/folder"]
)
def test_names_of_remote_models_are_refused_with_the_reason(name):
    from pathlib import Path

    refused(Path(name), "no such file or folder", "download it first")


def test_shards_that_do_not_agree_with_their_index_are_named(tmp_path):
    base, _ = small_models(1)

    def fresh(name):
        folder = save_folder(tmp_path / name, base, shards=3)
        return folder, folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))

    folder, _, shards = fresh("missing")
    shards[1].unlink()
    refused(folder, "the shard model-00002-of-00003.safetensors is missing (1 of 3 are)")
    folder, index, _ = fresh("promised")
    document = json.loads(index.read_text())
    document["weight_map"]["ghost.weight"] = "model-00003-of-00003.safetensors"
    index.write_text(json.dumps(document))
    refused(folder, "model-00003-of-00003.safetensors", "'ghost.weight' is missing from it, the index promises it")
    folder, _, shards = fresh("twice")
    save_file(dict(base), shards[2])
    refused(folder, shards[1].name.replace("00002", "00003"), "is stored in another shard too")
    folder, _, shards = fresh("truncated")
    shards[0].write_bytes(shards[0].read_bytes()[:-5])
    refused(folder, shards[0].name, "truncated")
    for text, words in (("{", "not valid JSON"), ("[]", "no table weight_map"), ('{"weight_map": {"a": 1}}', "table")):
        index.write_text(text)
        refused(index.parent, "index.json", words)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    base, _ = small_models(1)
    save_file(base, tmp_path / "outside.safetensors")
    folder = save_folder(tmp_path / "model", base, shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(base, "../outside.safetensors")}))
    refused(folder, "the shard outside.safetensors is missing")


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    source = FileSource.open(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"a\.safetensors: truncated: tensor 'a' is not complete"):
        source.read("a", 0, 1000)


def test_the_fingerprint_changes_when_a_file_is_replaced(tmp_path):
    base, models = small_models(1)
    folder = save_folder(tmp_path / "m", base)
    before = FileSource.open(folder).fingerprint()
    assert FileSource.open(folder).fingerprint() == before
    save_file(models[0], folder / "model.safetensors")
    assert FileSource.open(folder).fingerprint() != before
