"""Arrays <-> one safetensors file cut into chunks: both halves, side by side.

`chunks` and `Assembler` are inverses. `chunks` yields the header (8-byte length and
JSON) and then views of the arrays' own memory; `Assembler` checks the header before it
allocates anything and receives the payload in place. The library's own `save` and
`load` are not used on this path: `save` scrambles arrays that are not contiguous, and
`load` takes only ``bytes`` and copies them (both measured with safetensors 0.8).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvd.errors import InvalidTensors, LimitExceeded
from curvd.tensors.buffer_pool import Buffer
from curvd.tensors.safetensors_header import (
    MAX_HEADER_BYTES,
    Header,
    dump_header,
    header_of,
    load_header,
    payload_bytes,
)

CHUNK_BYTES = 2 << 20
"""Payload per message: 1-4 MiB is best, and 4 MiB breaks gRPC's default limit. Where both
ends are ours, several travel as one."""
_LANDED_BYTES = 1 << 20
"""Bytes that are looked at together on their way: few calls, and they are in the cache."""


def chunks(
    arrays: Mapping[str, NDArray[np.generic]], *, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[memoryview]:
    """Cut arrays into the chunks of one safetensors file.

    Args:
        arrays: Name to array. Contiguous ones are not copied.
        chunk_bytes: Payload per chunk.

    Yields:
        The header, then the payload.
    """
    yield memoryview(dump_header(header_of(arrays)))
    yield from packed(map(bytes_of, arrays.values()), chunk_bytes=chunk_bytes)


def packed(
    views: Iterable[memoryview], *, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[memoryview]:
    """Cut and join bytes into chunks.

    A message costs about as much as copying 100 kB, so a model's many small tensors
    travel together; what fills a chunk by itself is not copied.

    Args:
        views: The bytes, in order.
        chunk_bytes: Largest chunk.

    Yields:
        The same bytes.
    """
    waiting: list[memoryview] = []
    size = 0
    for view in views:
        for piece in pieces(view, chunk_bytes=chunk_bytes):
            if size + piece.nbytes > chunk_bytes:
                yield _joined(waiting)
                waiting, size = [], 0
            waiting.append(piece)
            size += piece.nbytes
    if waiting:
        yield _joined(waiting)


def pieces(data: memoryview, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """Cut bytes into chunks without copying.

    Args:
        data: What to cut.
        chunk_bytes: Size of all chunks but the last.

    Yields:
        Views, one after the other.
    """
    for start in range(0, data.nbytes, chunk_bytes):
        yield data[start : start + chunk_bytes]


def bytes_of(array: NDArray[np.generic]) -> memoryview:
    """Look at an array's memory, row-major and little-endian.

    Args:
        array: Any layout; copied only if it is not contiguous or byte-swapped.

    Returns:
        Its bytes.
    """
    plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return plain.reshape(-1).view(np.uint8).data


def digest(arrays: Mapping[str, NDArray[np.generic]]) -> tuple[str, int]:
    """Hash the safetensors file that `chunks` would produce.

    Args:
        arrays: Name to array.

    Returns:
        SHA-256 as lower-case hexadecimal digits, and the file's size in bytes.
    """
    sha, total = hashlib.sha256(), 0
    for chunk in chunks(arrays, chunk_bytes=16 << 20):
        sha.update(chunk)
        total += chunk.nbytes
    return sha.hexdigest(), total


class Assembler:
    """Receives one safetensors file, in place.

    The payload is delivered in pieces of `piece_bytes`, each in a buffer of its own,
    so that the first columns of a matrix can be used before the last have arrived.

    Args:
        accept: Called once with the checked header, before anything is allocated;
            returns the bytes per piece (0 for the whole payload in one piece), or
            raises to refuse what is announced.
        max_bytes: Largest payload that is accepted.
        allocate: Returns a buffer of so many bytes.
        offset: Bytes at the start of the payload that are left out, because they are
            there already; nothing is allocated for them.
        arrived: Called with a piece and the range of its bytes that came in last, while
            they are in the processor's cache; raises to refuse them.
    """

    def __init__(
        self,
        accept: Callable[[Header], int] = lambda header: 0,
        *,
        max_bytes: int,
        allocate: Callable[[int], Buffer] = lambda n: np.empty(n, np.uint8),
        offset: int = 0,
        arrived: Callable[[Buffer, int, int], None] = lambda piece, start, stop: None,
    ) -> None:
        self._offset, self._arrived = offset, arrived
        self._accept, self._max_bytes, self._allocate = accept, max_bytes, allocate
        self._prefix = bytearray()
        self._header: Header | None = None
        self._total = self._received = self._piece_bytes = self._filled = 0
        self._piece: Buffer = np.empty(0, np.uint8)
        self._offered: memoryview | None = None
        self._looked_at = 0
        self._feeding = False

    @property
    def header(self) -> Header | None:
        """The header, once it has arrived."""
        return self._header

    @property
    def received_bytes(self) -> int:
        """Payload that has arrived, without what was left out."""
        return self._received

    def buffer_for(self, nbytes: int) -> memoryview | None:
        """Find the place of the next chunk, so that it can be received there.

        Args:
            nbytes: Its size. Chunks before it must have been fed.

        Returns:
            The place, to be fed when it is filled; None if it would be no single one.
        """
        left = self._piece.nbytes - self._filled
        if self._header is None or self._feeding or not 0 < nbytes <= left:
            return None
        self._offered = self._piece[self._filled : self._filled + nbytes].data
        return self._offered

    def landed(self, nbytes: int) -> None:
        """Look at what came to the place that was found last, as soon as it is much.

        Args:
            nbytes: How many of its bytes are there; the rest is looked at when it is fed.

        Raises:
            CurvdError: If they are refused.
        """
        stop = self._filled + nbytes
        if self._offered is not None and stop - self._looked_at >= _LANDED_BYTES:
            self._arrived(self._piece, self._looked_at, stop)
            self._looked_at = stop

    def feed(self, chunk: memoryview) -> Iterator[Buffer]:
        """Take the next bytes of the file.

        Args:
            chunk: Any number of bytes; not copied if they are where they belong.

        Yields:
            The pieces that these bytes completed, in order.

        Raises:
            InvalidTensors: If the header is malformed or bytes follow the payload.
            LimitExceeded: If the header or the payload is larger than accepted.
        """
        in_place, self._offered = chunk is self._offered, None
        self._feeding = True
        if self._header is None:
            chunk = self._feed_header(chunk)
            if self._header is None:
                self._feeding = False
                return
        if self._received + chunk.nbytes > self._total:
            msg = f"more than the {self._total} bytes of payload that the header announces"
            raise InvalidTensors(msg, payload_bytes=self._total)
        self._received += chunk.nbytes
        while chunk.nbytes:
            take = min(chunk.nbytes, self._piece.nbytes - self._filled)
            if not in_place:
                self._piece[self._filled : self._filled + take] = np.frombuffer(
                    chunk[:take], np.uint8
                )
            stop = self._filled + take
            if stop > self._looked_at:
                self._arrived(self._piece, self._looked_at, stop)
            self._filled = self._looked_at = stop
            chunk = chunk[take:]
            if self._filled == self._piece.nbytes:
                done = self._piece
                self._next_piece(self._total - self._received + chunk.nbytes)
                yield done
        self._feeding = False

    def finish(self) -> Header:
        """Make sure that nothing is missing.

        Returns:
            The header.

        Raises:
            InvalidTensors: If the file ended early.
        """
        if self._header is None:
            msg = f"the stream ended after {len(self._prefix)} bytes, within the header"
            raise InvalidTensors(msg, received=len(self._prefix))
        if self._received < self._total:
            msg = f"the stream ended after {self._received} of {self._total} bytes of payload"
            raise InvalidTensors(msg, received=self._received, announced=self._total)
        return self._header

    def _feed_header(self, chunk: memoryview) -> memoryview:
        """Collect the header; return the bytes after it."""
        have = len(self._prefix)
        self._prefix += chunk[: max(0, 8 - have)]
        if len(self._prefix) < 8:
            return memoryview(b"")
        size = int.from_bytes(self._prefix[:8], "little")
        if size > MAX_HEADER_BYTES:
            msg = (
                f"the safetensors header announces {size} bytes; the limit is "
                f"{MAX_HEADER_BYTES}. Send fewer tensors, or flatten them into one"
            )
            raise LimitExceeded(msg, header_bytes=size, limit=MAX_HEADER_BYTES)
        taken = len(self._prefix) - have
        self._prefix += chunk[taken : 8 + size - have]
        if len(self._prefix) < 8 + size:
            return memoryview(b"")
        header = load_header(bytes(self._prefix[8:]))
        self._total = payload_bytes(header)
        if self._total > self._max_bytes:
            msg = f"a payload of {self._total} bytes exceeds the limit of {self._max_bytes}"
            raise LimitExceeded(msg, payload_bytes=self._total, limit=self._max_bytes)
        self._piece_bytes = self._accept(header) or self._total
        self._header = header
        self._total -= min(self._offset, self._total)
        self._next_piece(self._total)
        return chunk[8 + size - have :]

    def _next_piece(self, remaining: int) -> None:
        size = min(self._piece_bytes, remaining)
        self._filled = self._looked_at = 0
        self._piece = self._allocate(size) if size else np.empty(0, np.uint8)


def load(
    parts: Iterator[memoryview], *, max_bytes: int
) -> dict[str, NDArray[np.generic]]:
    """Join the chunks of one safetensors file into arrays; the inverse of `chunks`.

    Args:
        parts: The chunks.
        max_bytes: Largest payload that is accepted.

    Returns:
        Name to array; all are views of one buffer. BF16 comes as uint16 bits.

    Raises:
        InvalidTensors: If the bytes are not the file they claim to be.
        LimitExceeded: If it is larger than accepted.
    """
    assembler = Assembler(max_bytes=max_bytes)
    payload = np.empty(0, np.uint8)
    for part in parts:
        for piece in assembler.feed(part):
            payload = piece
    return {name: tensor.view(payload) for name, tensor in assembler.finish().items()}


def values_of(
    payload: memoryview, dtype: np.dtype[Any], allocate: Callable[[int], Buffer]
) -> NDArray[Any]:
    """See bytes as values that may be written to, copied only if they must be.

    Args:
        payload: The bytes of whole values, little-endian.
        dtype: Type of the values.
        allocate: Finds memory for a copy: of bytes that are not aligned, or not ours.

    Returns:
        [n]
    """
    values = np.frombuffer(payload, dtype)
    if values.flags.aligned and values.flags.writeable:
        return values
    copy = allocate(payload.nbytes)
    copy[:] = np.frombuffer(payload, np.uint8)
    return copy.view(dtype)


def whole(file: memoryview) -> tuple[Header, memoryview] | None:
    """Take a file apart that is in one piece, without copying.

    Args:
        file: All of its bytes.

    Returns:
        The header and the payload; None if it is not exactly one file, of which
        `Assembler` tells what is wrong.

    Raises:
        InvalidTensors: If the header is malformed.
    """
    start = 8 + int.from_bytes(file[:8], "little")
    if not 8 < start <= min(file.nbytes, MAX_HEADER_BYTES):
        return None
    header, payload = load_header(bytes(file[8:start])), file[start:]
    return (header, payload) if payload.nbytes == payload_bytes(header) else None


def _joined(views: list[memoryview]) -> memoryview:
    return views[0] if len(views) == 1 else memoryview(b"".join(views))
