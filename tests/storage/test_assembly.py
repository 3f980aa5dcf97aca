"""Parts become the tensors that they are boxes of, or are refused by their shapes."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from curvd.errors import InvalidTensors, LimitExceeded
from curvd.tensors import Box, dump_boxes, load_boxes, safetensors_header
from curvd.tensors.boxes import KEY
from curvd_server.storage.assembly import Piece, assembled, pieces_of
from curvd_server.storage.blobs import Blob

WHOLE = np.arange(24, dtype=np.float32).reshape(4, 6)


def piece(array, start, shape=(4, 6), name="w", dtype="F32"):
    return Piece(name, dtype, Box(shape, start), array.shape, lambda: array)


def cut(rows, columns):
    """The pieces of `WHOLE` between these rows and columns."""
    edges = [[0, *sorted(rows), 4], [0, *sorted(columns), 6]]
    return [
        piece(WHOLE[a:b, c:d], (a, c))
        for a, b in zip(edges[0], edges[0][1:], strict=False)
        for c, d in zip(edges[1], edges[1][1:], strict=False)
    ]


def file_of(pieces, limit_bytes=1 << 20):
    return b"".join(assembled(pieces, limit_bytes=limit_bytes).segments())


@given(
    st.sets(st.integers(0, 4)),
    st.sets(st.integers(0, 6)),
    st.randoms(use_true_random=False),
)
def test_any_grid_of_pieces_in_any_order_makes_the_tensor(rows, columns, random):
    pieces = [*cut(rows, columns), piece(np.ones(2), (0,), (2,), "b", "F64")]
    random.shuffle(pieces)
    data = file_of(pieces)
    found = load(data)
    assert list(found) == ["b", "w"] or set(found) == {"b", "w"}
    np.testing.assert_array_equal(found["w"], WHOLE)
    whole = assembled(pieces, limit_bytes=1 << 20)
    assert whole.digest() == hashlib.sha256(data).hexdigest()
    assert whole.total_bytes == len(data)


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (
            [piece(WHOLE[:3], (0, 0))],
            "18 elements of tensor 'w' .* has 24: a part is mis",
        ),
        ([piece(WHOLE, (0, 0))] * 2, "48 elements of tensor 'w' .*: parts overlap"),
        (
            [piece(WHOLE[:2], (0, 0)), piece(WHOLE[:2], (1, 0))],
            r"the parts overlap: tensor 'w' has elements from \[1, 0\] on",
        ),
        ([piece(WHOLE, (1, 0))], r"sizes \[4, 6\] at \[1, 0\] is not within shape"),
        ([piece(WHOLE, (0,))], "is not within shape"),
        (
            [piece(WHOLE[:2], (0, 0)), piece(WHOLE[2:], (2, 0), (4, 7))],
            r"disagree about tensor 'w': shapes \[4, 6\], \[4, 7\]",
        ),
        (
            [piece(WHOLE[:2], (0, 0)), piece(WHOLE[2:], (2, 0), dtype="BF16")],
            "types BF16, F32",
        ),
        # Nothing of this size is ever allocated.
        ([piece(WHOLE, (0, 0), (1 << 40, 1 << 20))], "has 1152921504606846976: a part"),
    ],
)
def test_what_does_not_make_a_tensor_is_refused(pieces, text):
    with pytest.raises(InvalidTensors, match=text):
        file_of(pieces)


def test_tensors_that_are_too_large_together_are_refused():
    with pytest.raises(LimitExceeded, match=r"96 bytes together; the limit .* is 95"):
        file_of(cut((), ()), limit_bytes=95)


def test_tensors_without_elements_are_whole():
    empty = np.empty((0, 3), np.float32)
    assert load(file_of([piece(empty, (0, 0), (0, 3))]))["w"].shape == (0, 3)


def blob_of(data):
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length]
    header = safetensors_header.load_header(text)
    payload = np.frombuffer(data[8 + length :], np.uint8)
    arrays = {name: tensor.view(payload) for name, tensor in header.items()}
    metadata = safetensors_header.load_metadata(text)
    return Blob("0" * 64, header, arrays, len(data), metadata)


def test_boxes_travel_in_the_metadata_that_safetensors_writes():
    boxes = {"w": Box((4, 6), (2, 0))}
    parts = [
        blob_of(save({"w": WHOLE[2:]}, dump_boxes(boxes))),
        blob_of(
            save(
                {"w": WHOLE[:2], "b": np.ones(3)},
                dump_boxes({"w": Box((4, 6), (0, 0))}),
            )
        ),
    ]
    found = load(file_of(p for part in parts for p in pieces_of(part)))
    np.testing.assert_array_equal(found["w"], WHOLE)
    np.testing.assert_array_equal(found["b"], np.ones(3))


def test_a_file_of_safetensors_has_no_boxes():
    assert blob_of(save({"w": WHOLE}, {"format": "pt"})).metadata == {"format": "pt"}
    assert load_boxes({"format": "pt"}) == {}
    with pytest.raises(
        InvalidTensors, match="boxes of tensors that are not in the part: x"
    ):
        list(pieces_of(blob_of(save({"w": WHOLE}, dump_boxes({"x": Box((1,), (0,))})))))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[1]",
        '{"w": 1}',
        '{"w": [[1]]}',
        '{"w": [[1], [-1]]}',
        '{"w": [[1], [true]]}',
        '{"w": [[1], [0], [0]]}',
        '{"w": [[9999999999999999999], [0]]}',
        "[" * 100_000,
    ],
)
def test_boxes_that_are_none_are_refused(text):
    with pytest.raises(
        InvalidTensors, match=r"must be a JSON object from names to \[shape"
    ):
        load_boxes({KEY: text})
