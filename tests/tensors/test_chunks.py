"""The bytes: pinned, inverse to each other, and closed to hostile ones."""

import json

import numpy as np
import pytest
import safetensors.numpy

from curvd.errors import InvalidTensors, LimitExceeded
from curvd.tensors import chunks as wire
from curvd.tensors import safetensors_header

GOLDEN = (
    b"\x78\0\0\0\0\0\0\0"
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"I64","shape":[],"data_offsets":[8,16]}}'
    b"             "
    b"\0\0\x80?\0\0\0@\x03\0\0\0\0\0\0\0"
)
DTYPES = ["?", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8", ">f4", ">i8"]
LAYOUTS = {
    "C": lambda a: a,
    "F": np.asfortranarray,
    "slice": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "reversed": lambda a: a[::-1, ::-1][::-1, ::-1],
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
}


def file_of(arrays, **options):
    return b"".join(wire.chunks(arrays, **options))


def framed(entries, payload=b""):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + payload


def entry(start, stop, dtype="U8", shape=None):
    shape = [stop - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def load(data, *, step=7, max_bytes=1 << 20):
    cut = (memoryview(data)[i : i + step] for i in range(0, len(data), step))
    return wire.load(cut, max_bytes=max_bytes)


def test_the_bytes_are_pinned():
    arrays = {"a": np.array([1, 2], np.float32), "b": np.array(3)}
    assert file_of(arrays) == GOLDEN


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_and_type_comes_back_and_the_library_agrees(layout, dtype):
    array = LAYOUTS[layout]((np.arange(12).reshape(3, 4) % 5).astype(dtype))
    data = file_of({"x": array, "empty": array[:0]}, chunk_bytes=5)
    for loaded in (load(data), safetensors.numpy.load(data)):
        np.testing.assert_array_equal(loaded["x"], array)
        assert loaded["x"].dtype == array.dtype.newbyteorder("<")
        assert loaded["empty"].shape == (0, 4)


@pytest.mark.parametrize("step", [1, 8, 9, 1000])
def test_boundaries_of_chunks_mean_nothing(step):
    np.testing.assert_array_equal(load(GOLDEN, step=step)["a"], [1, 2])


def test_the_header_is_a_chunk_of_its_own_and_payloads_are_aligned():
    first, *rest = wire.chunks({"x": np.ones(3)})
    assert first.nbytes % 64 == 0
    assert [r.nbytes for r in rest] == [24]


def test_large_arrays_are_not_copied_and_small_ones_travel_together():
    large, small = np.zeros(1000, np.uint8), [np.full(3, i, np.uint8) for i in range(9)]
    arrays = {"large": large, **{str(i): a for i, a in enumerate(small)}}
    _, *chunks = wire.chunks(arrays, chunk_bytes=250)
    assert [c.nbytes for c in chunks] == [250, 250, 250, 250, 27]
    assert np.shares_memory(np.frombuffer(chunks[0], np.uint8), large)


def test_nothing_is_sent_for_nothing():
    assert list(wire.packed([])) == []
    assert load(file_of({})) == {}


def test_pieces_arrive_while_later_bytes_are_on_their_way():
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    assembler = wire.Assembler(lambda header: 16, max_bytes=48)
    arrived = []
    for chunk in wire.chunks({"v": rows}, chunk_bytes=20):
        arrived.append([p.view(np.float32).tolist() for p in assembler.feed(chunk)])
    assert arrived == [[], [[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10, 11]]]
    assert assembler.finish()["v"].shape == (3, 4)


def test_bytes_are_received_in_place():
    target = np.empty(3)
    assembler = wire.Assembler(max_bytes=24, allocate=lambda n: target.view(np.uint8))
    for chunk in wire.chunks({"v": np.array([1.0, 2.0, 3.0])}, chunk_bytes=7):
        list(assembler.feed(chunk))
    np.testing.assert_array_equal(target, [1, 2, 3])


def test_what_lands_is_looked_at_once_and_in_order():
    looked, rng = [], np.random.default_rng(0)
    assembler = wire.Assembler(
        lambda header: 5_000_000,
        max_bytes=20_000_000,
        arrived=lambda piece, start, stop: looked.append((
            piece.ctypes.data,
            start,
            stop,
        )),
    )
    header, *chunks = wire.chunks({"v": np.zeros(12_000_000, np.uint8)})
    list(assembler.feed(header))
    pieces = []
    for chunk in chunks:
        place = assembler.buffer_for(chunk.nbytes)
        at = 0
        while place is not None and at < chunk.nbytes:
            at = min(chunk.nbytes, at + int(rng.integers(1, 700_000)))
            assembler.landed(at)
        pieces += assembler.feed(chunk if place is None else place)
    assert {stop - start for _, start, stop in looked[:-1]} - {2 << 20}  # as it lands
    for piece in pieces:
        ranges = [r[1:] for r in looked if r[0] == piece.ctypes.data]
        ends = [0, *(stop for _, stop in ranges)]
        assert [start for start, _ in ranges] == ends[:-1]
        assert ends[-1] == piece.nbytes


def test_bfloat16_arrives_as_its_bits():
    data = framed({"x": entry(0, 4, "BF16", [2])}, b"\x80\x3f\0\x40")
    assert load(data)["x"].tolist() == [0x3F80, 0x4000]


HOSTILE = {
    "not JSON": (framed(b"{"), "not a JSON object"),
    "not text": (framed(b"\xff\xfe"), "not a JSON object"),
    "not an object": (framed([1]), "not a JSON object"),
    "deep": (framed(b"[" * 100_000), "not a JSON object"),
    "twice": (framed(b'{"a":{},"a":{}}'), "a name occurs twice"),
    "no entry": (framed({"a": 1}), "needs dtype, shape and data_offsets"),
    "extra key": (framed({"a": {**entry(0, 1), "x": 1}}), "and nothing else"),
    "type": (framed({"a": entry(0, 1, "F8")}), "element type 'F8'"),
    "type of type": (framed({"a": entry(0, 1, 3)}), "element type 3"),
    "type unhashable": (framed({"a": entry(0, 1, [])}), "element type \\[\\]"),
    "negative": (framed({"a": entry(0, 1, shape=[-1])}), "must be natural numbers"),
    "fraction": (framed({"a": entry(0, 1, shape=[1.0])}), "must be natural numbers"),
    "bool": (framed({"a": entry(0, 1, shape=[True])}), "must be natural numbers"),
    "one offset": (
        framed({"a": {"dtype": "U8", "shape": [], "data_offsets": [0]}}),
        "must be natural numbers",
    ),
    "lying": (
        framed({"a": entry(0, 4, shape=[5])}),
        "has 5 bytes, but its offsets span 4",
    ),
    "overlap": (
        framed({"a": entry(0, 4), "b": entry(2, 6)}),
        "overlaps the one before",
    ),
    "gap": (framed({"a": entry(0, 4), "b": entry(5, 6)}), "leaves a gap before it"),
    "late start": (framed({"a": entry(1, 4)}), "starts at byte 1, expected 0"),
    "truncated": (framed({"a": entry(0, 4)}, b"abc"), "after 3 of 4 bytes"),
    "too long": (framed({"a": entry(0, 4)}, b"abcde"), "more than the 4 bytes"),
    "header only begun": (b"\x10\0\0\0\0\0\0\0{}", "within the header"),
    "nothing": (b"", "after 0 bytes"),
    "UTF-16": (framed("{}".encode("utf-16")), "not a JSON object"),
    "a surrogate in bytes": (framed(b'{"\xed\xa0\x80":{}}'), "not a JSON object"),
    "a surrogate escaped": (framed(b'{"\\ud800":{}}'), "is Unicode text"),
    "a name without end": (
        framed({"a" * 1025: entry(0, 0)}),
        "at most 1024 characters",
    ),
    "empty and endless": (
        framed({"a": entry(0, 0, shape=[0, 2**63])}),
        "no array can have it",
    ),
    "empty and larger than memory": (
        framed({"a": entry(0, 0, "F64", [2**31, 0, 2**30])}),
        "no array can have it",
    ),
    "beyond 64 bits": (framed({"a": entry(0, 0, shape=[0, 2**70])}), "no array"),
    "more axes than arrays have": (
        framed({"a": entry(0, 1, shape=[1] * 33)}),
        "at most 32 axes",
    ),
}


@pytest.mark.parametrize(("data", "text"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_bytes_are_refused_with_a_reason(data, text):
    with pytest.raises(InvalidTensors, match=text):
        load(data)


def test_sizes_are_checked_before_anything_is_allocated():
    def allocate(nbytes):
        raise AssertionError("allocated")

    huge = framed({"a": entry(0, 1 << 50)})
    assembler = wire.Assembler(max_bytes=1 << 20, allocate=allocate)
    with pytest.raises(LimitExceeded, match=f"payload of {1 << 50} bytes exceeds"):
        list(assembler.feed(memoryview(huge)))
    with pytest.raises(LimitExceeded, match="header announces"):
        load((1 << 62).to_bytes(8, "little") + b"{}")


def test_a_file_in_one_piece_is_taken_apart_where_it_lies():
    array = np.arange(5, dtype="f4")
    file = memoryview(b"".join(wire.chunks({"v": array})))
    header, payload = wire.whole(file)
    assert header["v"].shape == (5,)
    assert payload.obj is file.obj
    np.testing.assert_array_equal(np.frombuffer(payload, "f4"), array)


@pytest.mark.parametrize("cut", [0, 5, 8, 40, -1])
def test_what_is_not_one_whole_file_is_not_taken_apart(cut):
    file = b"".join(wire.chunks({"v": np.arange(5, dtype="f4")}))
    assert wire.whole(memoryview(file[:cut] if cut >= 0 else file + b"x")) is None
    assert wire.whole(memoryview(b"\xff" * 16)) is None


def test_values_are_copied_only_if_they_are_not_aligned_or_not_ours():
    copies = []

    def allocate(nbytes):
        copies.append(nbytes)
        return np.empty(nbytes, np.uint8)

    array = np.arange(5, dtype="f8")
    ours = bytearray(8 + 40)
    for start in (0, 4):
        ours[start : start + 40] = array.tobytes()
        view = memoryview(ours)[start : start + 40]
        values = wire.values_of(view, array.dtype, allocate)
        np.testing.assert_array_equal(values, array)
        assert np.shares_memory(values, np.frombuffer(ours, np.uint8)) is (start == 0)
    values = wire.values_of(memoryview(array.tobytes()), array.dtype, allocate)
    assert values.flags.writeable and values.flags.aligned
    assert copies == [40, 40]


def test_a_type_that_cannot_travel_is_named():
    with pytest.raises(
        InvalidTensors, match="tensor 'x' has dtype complex128; known: BOOL"
    ):
        safetensors_header.header_of({"x": np.ones(2, complex)})


def test_the_digest_is_that_of_the_file():
    import hashlib

    arrays = {"a": np.array([1, 2], np.float32), "b": np.array(3)}
    assert wire.digest(arrays) == (hashlib.sha256(GOLDEN).hexdigest(), len(GOLDEN))


@pytest.mark.parametrize("metadata", [{"a": 1}, {"a": None}, [], "text", 3])
def test_metadata_that_is_no_map_of_strings_is_refused_as_the_library_does(metadata):
    data = framed({"__metadata__": metadata, "x": entry(0, 2)}, b"ab")
    with pytest.raises(safetensors.SafetensorError):
        safetensors.numpy.load(data)
    with pytest.raises(InvalidTensors, match="a map of strings to strings"):
        load(data)
    data = framed({"__metadata__": {"a": "b"}, "x": entry(0, 2)}, b"ab")
    assert load(data)["x"].tolist() == [97, 98]
