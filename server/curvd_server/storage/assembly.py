"""One state out of pieces: the parts of an update, or the files of a checkpoint.

A piece is a box of a tensor. All is judged by shapes before anything is allocated; then one
tensor after the other is put together, so that a state never is in memory twice.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvd.errors import InvalidTensors, LimitExceeded
from curvd.tensors import Box, Header, chunks, load_boxes, safetensors_header
from curvd.tensors.safetensors_header import ITEM_BYTES
from curvd_server.storage.blobs import Blob


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, whose values are read when they are needed."""

    name: str
    dtype: str
    """safetensors element type."""
    box: Box
    sizes: tuple[int, ...]
    """Of the box's axes."""
    read: Callable[[], NDArray[Any]]
    """Gives the values, of these sizes; BF16 as uint16 bits."""

    @property
    def place(self) -> tuple[slice, ...]:
        """Its indices in the whole tensor."""
        return tuple(
            slice(start, start + size)
            for start, size in zip(self.box.start, self.sizes, strict=True)
        )


@dataclass(frozen=True)
class Whole:
    """A safetensors file that is made of pieces, written anew whenever it is walked."""

    header: Header
    pieces: Mapping[str, Sequence[Piece]]
    """Those of each tensor, in the order of the header."""

    @property
    def total_bytes(self) -> int:
        """Of the file."""
        head = len(safetensors_header.dump_header(self.header))
        return head + safetensors_header.payload_bytes(self.header)

    def digest(self) -> str:
        """Put it together once, to hash it.

        Returns:
            SHA-256 of the file.

        Raises:
            InvalidTensors: If pieces overlap.
        """
        sha = hashlib.sha256()
        for segment in self.segments():
            sha.update(segment)
        return sha.hexdigest()

    def segments(self) -> Iterator[memoryview]:
        """Put it together.

        Yields:
            Its bytes, header first.
        """
        yield memoryview(safetensors_header.dump_header(self.header))
        for name, tensor in self.header.items():
            yield chunks.bytes_of(_joined(tensor.shape, self.pieces[name]))


def pieces_of(blob: Blob) -> Iterator[Piece]:
    """Take a part of an update apart.

    Args:
        blob: Its tensors, boxes or whole.

    Yields:
        A piece for each.

    Raises:
        InvalidTensors: If what it says of boxes does not fit its tensors.
    """
    boxes = load_boxes(blob.metadata)
    unknown = sorted(boxes.keys() - blob.header.keys())
    if unknown:
        msg = f"boxes of tensors that are not in the part: {', '.join(unknown)[:200]}"
        raise InvalidTensors(msg)
    for name, tensor in blob.header.items():
        box = boxes.get(name, Box(tensor.shape, (0,) * len(tensor.shape)))
        read = functools.partial(blob.arrays.__getitem__, name)
        yield Piece(name, tensor.dtype, box, tensor.shape, read)


def assembled(pieces: Iterable[Piece], *, limit_bytes: int) -> Whole:
    """Judge whether pieces make whole tensors.

    Args:
        pieces: In any order.
        limit_bytes: Of all tensors together.

    Returns:
        The file that they make, tensors sorted by name.

    Raises:
        InvalidTensors: If one is out of its tensor's bounds, pieces of one tensor differ
            in shape or type, or their elements are not as many as the tensor has.
        LimitExceeded: If they make more bytes than allowed.
    """
    by_name: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        _check_place(piece)
        by_name[piece.name].append(piece)
    header, start = {}, 0
    for name in sorted(by_name):
        shape, dtype = _agreed(name, by_name[name])
        header[name] = safetensors_header.TensorHeader(dtype, shape, start)
        start = header[name].stop
    if start > limit_bytes:
        msg = (
            f"the tensors have {start} bytes together; the limit of this server is "
            f"{limit_bytes} (upload_bytes)"
        )
        raise LimitExceeded(msg, total_bytes=start, limit=limit_bytes)
    return Whole(header, {name: by_name[name] for name in header})


def _check_place(piece: Piece) -> None:
    box, sizes = piece.box, piece.sizes
    fits = len(box.shape) == len(box.start) == len(sizes) and all(
        start + size <= whole
        for whole, start, size in zip(box.shape, box.start, sizes, strict=True)
    )
    if not fits:
        msg = (
            f"tensor {piece.name!r}: a box of sizes {list(sizes)} at {list(box.start)} is "
            f"not within shape {list(box.shape)}"
        )
        raise InvalidTensors(msg, tensor=piece.name)


def _agreed(name: str, pieces: Sequence[Piece]) -> tuple[tuple[int, ...], str]:
    """Find the shape and type that all pieces of a tensor name."""
    shapes = sorted({piece.box.shape for piece in pieces})
    types = sorted({piece.dtype for piece in pieces})
    if len(shapes) > 1 or len(types) > 1:
        msg = (
            f"the parts disagree about tensor {name!r}: shapes "
            f"{', '.join(str(list(s)) for s in shapes)}, types {', '.join(types)}"
        )
        raise InvalidTensors(msg, tensor=name)
    if types[0] not in ITEM_BYTES:
        msg = f"tensor {name!r} has element type {types[0]}; known: {', '.join(ITEM_BYTES)}"
        raise InvalidTensors(msg, tensor=name, dtype=types[0])
    elements, wanted = sum(math.prod(p.sizes) for p in pieces), math.prod(shapes[0])
    if elements != wanted:
        why = "a part is missing" if elements < wanted else "parts overlap"
        msg = (
            f"the parts have {elements} elements of tensor {name!r} of shape "
            f"{list(shapes[0])}, which has {wanted}: {why}"
        )
        raise InvalidTensors(msg, tensor=name, elements=elements, expected=wanted)
    return shapes[0], types[0]


def _joined(shape: tuple[int, ...], pieces: Sequence[Piece]) -> NDArray[Any]:
    """Put one tensor together.

    As many elements as it has are there, so that none is missing if none comes twice.
    """
    first = pieces[0].read()
    if len(pieces) == 1 or not math.prod(shape):
        return first
    whole, written = np.empty(shape, first.dtype), np.zeros(shape, bool)
    for piece in pieces:
        if written[piece.place].any():
            msg = (
                f"the parts overlap: tensor {piece.name!r} has elements from "
                f"{list(piece.box.start)} on that another part has too"
            )
            raise InvalidTensors(msg, tensor=piece.name)
        whole[piece.place], written[piece.place] = piece.read(), True
    return whole
