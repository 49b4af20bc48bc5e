"""Messages: every payload survives encoding, every other byte string is refused, nothing is believed unchecked."""

import json
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_st

from neurocl.errors import RunError
from neurocl.federated.payload import (
    MAX_HEADER_BYTES,
    Payload,
    PayloadError,
    arrays_of,
    check_finite,
    decode,
    encode,
    num_bytes,
    tensors,
)

DTYPES = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"]
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(codec="utf-8"))
SCALARS = st.one_of(*(kind | st.lists(kind, max_size=4) for kind in (st.booleans(), INTEGERS, FLOATS, TEXTS)))
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda name: arrays_st.arrays(name, arrays_st.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)


def assert_same(left: Payload, right: Payload) -> None:
    assert left.meta == right.meta
    assert [type(value) for value in left.meta.values()] == [type(value) for value in right.meta.values()]
    assert list(left.arrays) == list(right.arrays)
    for name, array in left.arrays.items():
        other = right.arrays[name]
        assert (array.dtype.name, array.shape) == (other.dtype.name, other.shape)
        assert np.ascontiguousarray(array).tobytes() == np.ascontiguousarray(other).tobytes()


def sample() -> Payload:
    rng = np.random.default_rng(0)
    return Payload(
        {
            "layer.b": rng.normal(size=(5, 3)).astype(np.float32),
            "layer.gram": rng.normal(size=(3, 3)),
            "mask": np.array([True, False, True]),
            "count": np.array(7),
            "nothing": np.empty((0, 4), np.int16),
        },
        {"client": 3, "loss": 0.25, "phase": "round", "classes": [1, 2], "done": False},
    )


def forged(header: object, body: bytes = b"") -> bytes:
    """A message with any header and right checksums, as an attacker would make it."""
    if isinstance(header, dict) and "arrays" in header:
        header = {"crc32": zlib.crc32(body), "meta": {}, **header}
    text = header if isinstance(header, bytes) else json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    prefix = struct.pack("<4sIII", b"NCLP", 1, len(text), zlib.crc32(text))
    return prefix + text + bytes(-len(prefix + text) % 8) + body


def entry(**changes: object) -> dict[str, object]:
    return {"name": "a", "dtype": "float32", "shape": [2], "offset": 0, **changes}


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, ARRAYS, max_size=5), st.dictionaries(NAMES, SCALARS, max_size=5))
def test_every_payload_survives_encoding(arrays, meta):
    payload = Payload(arrays, meta)
    data = encode(payload)
    assert_same(decode(data), payload)
    assert encode(decode(data)) == data


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4)])
def test_every_type_and_shape_survives(dtype, shape):
    array = (np.arange(np.prod(shape, dtype=int)) % 2).reshape(shape).astype(dtype)
    assert_same(decode(encode(Payload({"a": array}))), Payload({"a": array}))


def test_nan_infinity_and_minus_zero_in_arrays_survive_bit_by_bit():
    array = np.array([np.nan, np.inf, -np.inf, -0.0])
    assert_same(decode(encode(Payload({"a": array}))), Payload({"a": array}))


def test_non_contiguous_and_big_endian_arrays_arrive_in_order():
    base = np.arange(24.0).reshape(4, 6)
    for array in (base.T, base[::2, ::-3], base.astype(">f8"), np.broadcast_to(base[0], (3, 6))):
        received = decode(encode(Payload({"a": array}))).arrays["a"]
        np.testing.assert_array_equal(received, array)
        assert received.flags.c_contiguous


def test_the_order_of_names_never_matters():
    payload = sample()
    backwards = Payload(dict(reversed(payload.arrays.items())), dict(reversed(payload.meta.items())))
    assert list(backwards.arrays) == sorted(payload.arrays)
    assert encode(backwards) == encode(payload)


def test_numpy_scalars_in_meta_become_plain_ones():
    payload = Payload(meta={"n": np.int64(3), "x": np.float32(0.5), "flag": np.bool_(True), "all": [np.int8(1)]})
    assert payload.meta == {"n": 3, "x": 0.5, "flag": True, "all": [1]}
    assert [type(value) for value in payload.meta.values()] == [list, bool, int, float]


def test_decoded_arrays_are_read_only_views_of_the_message():
    data = encode(sample())
    for name, array in decode(data).arrays.items():
        assert not array.flags.writeable, name
        assert array.flags.aligned, name
        if array.size:
            assert np.shares_memory(array, np.frombuffer(data, np.uint8)), name


def test_an_unaligned_buffer_gives_the_same_arrays():
    data = encode(sample())
    for shift in range(1, 8):
        received = decode(memoryview(bytes(shift) + data)[shift:])
        assert_same(received, sample())
        assert all(array.flags.aligned and not array.flags.writeable for array in received.arrays.values())


@pytest.mark.parametrize("view", [bytearray, lambda data: memoryview(np.frombuffer(data, np.uint8))])
def test_other_buffers_are_read_too(view):
    assert_same(decode(view(encode(sample()))), sample())


def test_a_payload_error_is_a_failure_of_the_run():
    assert issubclass(PayloadError, RunError)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (torch.zeros(2, dtype=torch.bfloat16), "bfloat16.*float"),
        (torch.zeros(2), "arrays_of"),
        (np.array([{}, None]), "object"),
        (np.array(["a"]), "<U1"),
        (np.zeros(2, np.complex64), "complex64"),
        (np.zeros(2, np.uint16), "uint16"),
        (np.zeros(2, "datetime64[s]"), "datetime64"),
        ([1.0, 2.0], "list"),
    ],
)
def test_arrays_of_other_types_are_refused_by_name(array, says):
    with pytest.raises(PayloadError, match=f"'weights'.*{says}"):
        Payload({"weights": array})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "NoneType"),
        ({"a": 1}, "dict"),
        ([1, "a"], "int and str"),
        ([1, True], "bool and int"),
        ([[1]], "list"),
        ((1, 2), "tuple"),
        (b"x", "bytes"),
        (float("nan"), "0-d array"),
        ([1.0, float("-inf")], "0-d array"),
        (2**63, "64 bits"),
        ("\ud800", "surrogate"),
    ],
)
def test_values_that_not_every_runtime_can_carry_are_refused_by_name(value, says):
    with pytest.raises(PayloadError, match=f"'loss'.*{says}"):
        Payload(meta={"loss": value})


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2J", "x" * 513, 3, "\ud800"])
def test_names_are_short_printable_text(name):
    with pytest.raises(PayloadError, match="printable"):
        Payload({name: np.zeros(1)})
    with pytest.raises(PayloadError, match="printable"):
        Payload(meta={name: 1})


def test_what_was_put_into_a_payload_later_is_checked_too():
    payload = Payload({"a": np.zeros(1)})
    payload.arrays["b"] = np.array([None])
    with pytest.raises(PayloadError, match="'b'"):
        encode(payload)


def test_meta_larger_than_any_header_is_refused_when_encoding():
    with pytest.raises(PayloadError, match="use arrays"):
        encode(Payload(meta={"a": "x" * MAX_HEADER_BYTES}))


def test_every_cut_is_refused():
    data = encode(sample())
    for length in range(len(data)):
        with pytest.raises(PayloadError):
            decode(data[:length])


def test_every_changed_byte_is_refused():
    data = bytearray(encode(sample()))
    for position in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            data[position] ^= flip
            with pytest.raises(PayloadError):
                decode(data)
            data[position] ^= flip
    assert_same(decode(data), sample())


@pytest.mark.parametrize("extra", [b"\x00", b"\x00" * 8, b"more"])
def test_bytes_after_the_end_are_refused(extra):
    with pytest.raises(PayloadError):
        decode(encode(sample()) + extra)


def test_a_message_larger_than_allowed_is_refused_before_it_is_read():
    data = encode(sample())
    decode(data, max_bytes=len(data))
    with pytest.raises(PayloadError, match=f"at most {len(data) - 1}"):
        decode(data, max_bytes=len(data) - 1)


def test_a_forged_message_that_is_right_is_read():
    body = np.array([1, 2], "<f4").tobytes()
    np.testing.assert_array_equal(decode(forged({"arrays": [entry()]}, body)).arrays["a"], [1, 2])


@pytest.mark.parametrize(
    ("entries", "body", "says"),
    [
        ([entry(shape=[-2])], bytes(8), "shape"),
        ([entry(shape=[-1, -2])], bytes(8), "shape"),
        ([entry(shape=[2**62])], bytes(8), "impossible"),
        ([entry(shape=[2**31, 2**31])], bytes(8), "impossible"),
        ([entry(shape=[2**40])], bytes(8), "cut short"),
        ([entry(shape=[0, 2**61])], b"", "impossible"),
        ([entry(shape=[2**64])], bytes(8), "shape"),
        ([entry(shape=[True, 2])], bytes(8), "shape"),
        ([entry(shape=[2.0])], bytes(8), "shape"),
        ([entry(shape=2)], bytes(8), "shape"),
        ([entry(shape=[1] * 33)], bytes(8), "shape"),
        ([entry(dtype="object")], bytes(16), "object"),
        ([entry(dtype=["float32"])], bytes(8), "type"),
        ([entry(dtype="bool")], b"\x01\x02", "0 and 1"),
        ([entry(offset=4)], bytes(16), "begin at byte 0"),
        ([entry(offset=-8)], bytes(8), "begin at byte 0"),
        ([entry(offset=False)], bytes(8), "begin at byte 0"),
        ([entry(), entry(name="b", offset=0)], bytes(8), "begin at byte 8"),
        ([entry(), entry(name="b", offset=4)], bytes(16), "begin at byte 8"),
        ([entry(), entry(name="a", offset=8)], bytes(16), "repeated"),
        ([entry(name="b"), entry(name="a", offset=8)], bytes(16), "order"),
        ([entry(shape=[1]), entry(name="b", offset=8)], b"1234" + b"\x00\x00\x00\x01" + bytes(8), "not zero"),
        ([entry(name=["a"])], bytes(8), "printable"),
        ([entry(name="\x1b[2J")], bytes(8), "printable"),
        ([entry(more=1)], bytes(8), "exactly"),
        ([{"name": "a"}], bytes(8), "exactly"),
        (["a"], bytes(8), "exactly"),
        ([entry()], bytes(7), "cut short"),
        ([entry()], bytes(9), "follow"),
        ([], bytes(8), "follow"),
    ],
)
def test_a_forged_array_is_refused_in_words(entries, body, says):
    with pytest.raises(PayloadError, match=says):
        decode(forged({"arrays": entries}, body))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[" * 200_000,
        b'{"arrays":[],"crc32":0,"meta":{"a":NaN}}',
        b'{"arrays":[],"crc32":0,"meta":{"a":1e999}}',
        b'{"arrays":[],"crc32":0,"meta":{"a":' + b"9" * 5000 + b"}}",
        b'{"arrays":[],"crc32":0,"meta":{"a":9223372036854775808}}',
        b'{"arrays":[],"crc32":0,"meta":{"a":1,"a":2}}',
        b'{"arrays":[],"crc32":0,"meta":{"b":1,"a":2}}',
        b'{"arrays":[],"crc32":0, "meta":{}}',
        b'{"arrays":[],"crc32":0,"meta":{"a":"\xc3\xa9"}}',
        b'{"arrays":[],"crc32":0,"meta":{"a":"\\ud800"}}',
        b'{"arrays":[],"crc32":0,"meta":{"a":null}}',
        b'{"arrays":[],"crc32":0,"meta":{"a":[1,"b"]}}',
        b'{"arrays":[],"crc32":0,"meta":[]}',
        b'{"arrays":{},"crc32":0,"meta":{}}',
        b'{"arrays":[],"crc32":false,"meta":{}}',
        b'{"arrays":[],"crc32":1,"meta":{}}',
        b'{"arrays":[],"meta":{}}',
        b"[]",
        b"null",
    ],
)
def test_a_forged_header_is_refused(header):
    with pytest.raises(PayloadError):
        decode(forged(header))


def test_a_header_longer_than_allowed_is_refused():
    with pytest.raises(PayloadError, match="header of"):
        decode(forged(b" " * (MAX_HEADER_BYTES + 1)))


def test_a_message_of_another_version_is_refused_by_number():
    data = bytearray(encode(sample()))
    data[4] = 9
    with pytest.raises(PayloadError, match="version 9"):
        decode(data)


def test_random_damage_never_does_more_than_raise_a_payload_error():
    rng = np.random.default_rng(1)
    original = encode(sample())
    for _ in range(3000):
        data = np.frombuffer(original, np.uint8).copy()
        places = rng.integers(len(data), size=rng.integers(1, 6))
        data[places] = rng.integers(256, size=len(places))
        damaged = data[: rng.integers(len(data) + 1)] if rng.random() < 0.3 else data
        try:
            assert_same(decode(damaged.tobytes()), sample())
        except PayloadError:
            continue
        assert damaged.tobytes() == original


def test_damaged_headers_with_right_checksums_never_do_more_than_raise_a_payload_error():
    rng = np.random.default_rng(2)
    original = encode(sample())
    length = struct.unpack_from("<I", original, 8)[0]
    header, body = original[16 : 16 + length], original[16 + length + -length % 8 :]
    alphabet = np.frombuffer(b'0123456789-+.eE[]{},:"\\ truefalsn\x00\xff', np.uint8)
    read = 0
    for _ in range(5000):
        text = np.frombuffer(header, np.uint8).copy()
        places = rng.integers(len(text), size=rng.integers(1, 4))
        text[places] = rng.choice(alphabet, size=len(places))
        try:
            payload = decode(forged(text.tobytes(), body))
        except PayloadError:
            continue
        read += 1
        assert sum(array.nbytes for array in payload.arrays.values()) <= len(body)
    assert read  # some changes, as of a digit in meta, make another right message


def test_a_small_message_cannot_make_us_allocate_much():
    lies = [
        forged({"arrays": [entry(shape=[2**40])]}, bytes(8)),
        forged({"arrays": [entry(shape=[2**30] * 2)]}, bytes(8)),
        struct.pack("<4sIII", b"NCLP", 1, 2**32 - 1, 0),
        struct.pack("<4sIII", b"NCLP", 1, MAX_HEADER_BYTES, 0),
        forged({"arrays": [entry(offset=2**40)]}, bytes(8)),
    ]
    tracemalloc.start()
    try:
        for data in lies:
            with pytest.raises(PayloadError):
                decode(data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_decoding_allocates_nothing_for_the_arrays():
    data = encode(Payload({f"a{index}": np.ones(100_000, np.float32) for index in range(5)}))
    tracemalloc.start()
    try:
        payload = decode(data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert len(payload.arrays) == 5


def test_num_bytes_counts_arrays_and_canonical_meta_but_not_names():
    payload = Payload(
        {"a": np.zeros((3, 4), np.float32), "a.long.name": np.zeros((), np.int64), "b": np.zeros((0, 5))},
        {"phase": "round", "n": 12},
    )
    assert num_bytes(payload) == 3 * 4 * 4 + 8 + 0 + len('{"n":12,"phase":"round"}')
    assert num_bytes(Payload()) == len("{}")
    assert num_bytes(decode(encode(payload))) == num_bytes(payload)


def test_num_bytes_of_lorm_equals_the_formula_of_the_protocol():
    # A round of B factors for ViT-B/16, r = 16, 100 classes: 82 944 r + 64 512 + 768^2 + 768 * 100 + 100 floats.
    shapes = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}
    arrays = {}
    for block in range(12):
        for layer, (rows, columns) in shapes.items():
            arrays[f"{block}.{layer}.b"] = np.zeros((rows, 16), np.float32)
            arrays[f"{block}.{layer}.gram"] = np.zeros(columns, np.float32)
    arrays |= {"head.gram": np.zeros((768, 768), np.float32), "head.weight": np.zeros((100, 768), np.float32)}
    arrays["head.bias"] = np.zeros(100, np.float32)
    assert num_bytes(Payload(arrays)) == 4 * (82_944 * 16 + 64_512 + 768**2 + 768 * 100 + 100) + 2


def test_check_finite_names_the_first_bad_array():
    arrays = {"c": np.array(np.inf), "b": np.array([1, np.nan], np.float16), "a": np.array([1, 2])}
    assert check_finite(Payload(arrays)) == "b"
    assert check_finite(Payload({"a": arrays["a"], "e": np.empty(0)})) is None


def test_tensors_and_arrays_are_inverse_and_share_no_memory():
    state = {
        "w": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).T.requires_grad_(),
        "n": torch.tensor(5),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 2, dtype=torch.float16),
    }
    arrays = arrays_of(state, "model.")
    payload = decode(encode(Payload(arrays | {"other.w": np.zeros(1)})))
    received = tensors(payload, "model.")
    assert received.keys() == state.keys()
    for name, tensor in state.items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor)
        received[name].zero_()
        arrays["model." + name].fill(1)
    assert torch.equal(state["n"], torch.tensor(5))
    assert torch.equal(tensors(payload, "model.")["n"], torch.tensor(5))


def test_tensors_of_bfloat16_are_refused_with_the_way_out():
    with pytest.raises(PayloadError, match=r"'w' is bfloat16.*\.float\(\)"):
        arrays_of({"w": torch.zeros(2, dtype=torch.bfloat16)})


def test_nine_megabytes_encode_and_decode_in_thirty_milliseconds():
    payload = Payload({f"layer{index}": np.ones((768, 64), np.float32) for index in range(48)})
    times = []
    for _ in range(15):
        start = time.thread_time()
        decode(encode(payload))
        times.append(time.thread_time() - start)
    assert min(times) < 0.030
