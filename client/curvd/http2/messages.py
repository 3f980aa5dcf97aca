"""Messages of gRPC in the data of a stream: five bytes of prefix, then protobuf.

A chunk's payload is received where it belongs, if the receiver has offered that place,
and sent from where it is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any, Protocol

import numpy as np
from google.protobuf.message import DecodeError

from curvd.contract import BYTES_TAG, read_varint
from curvd.errors import Internal, ResourceExhausted

BufferProvider = Callable[[int], "memoryview | None"]
"""Finds the place for a chunk of so many bytes, or None if any place will do."""


Landed = Callable[[int], None]
"""Is told how many bytes of a chunk have come to its place; raises to refuse them."""


def not_looked_at(nbytes: int) -> None:
    """Look at nothing of what came."""


class ReceivesInPlace:
    """Parts whose chunks are received where they belong."""

    buffer_for: BufferProvider
    """Finds the place of the next chunk, when all before were taken."""
    landed: Landed
    """Looks at what came to that place, while it is in the processor's cache."""


_PREFIX_BYTES = 5
_CHUNK_HEAD_BYTES = 6
"""Field tag and length of a chunk."""
_ALIGNMENT = 64
_QUICK_BYTES = 1 << 20
_QUICK_BYTES_PER_S = 100e6
"""Who takes chunks as quickly as this, and of such a size, gets longer ones."""


class _Step(Enum):
    """What is being received."""

    PREFIX = 0
    CHUNK_HEAD = 1
    CHUNK = 2
    MESSAGE = 3


class Format(Protocol):
    """How the messages of one direction are written; `curvd.contract.rpcs.Codec` is one."""

    @property
    def bulk(self) -> bool:
        """Whether a message may be a chunk."""

    def load(self, data: Any) -> Any:
        """Parse a message."""

    def views(self, part: Any) -> tuple[memoryview, ...]:
        """Serialise a part, its large bytes where they are."""


def framed(format_: Format, part: Any) -> list[memoryview]:
    """Write a message.

    Args:
        format_: How.
        part: What.

    Returns:
        Its bytes with the prefix, in order; large ones are not copied.
    """
    first, *rest = format_.views(part)
    size = first.nbytes + sum([view.nbytes for view in rest])
    prefix = b"\0" + size.to_bytes(4, "big")
    if first.nbytes > 1 << 12:
        return [memoryview(prefix), first, *rest]
    return [memoryview(b"".join((prefix, first))), *rest]


def joined(
    parts: Iterable[Any],
    longest: Callable[[], int],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Any]:
    """Let chunks that follow one another travel as one, as long as they leave quickly.

    A file is cut anywhere, so it makes no difference to who joins its chunks. Those of a
    slow line stay short: each has to come in time.

    Args:
        parts: Messages and chunks.
        longest: Bytes of a chunk that the peer takes; it may become known on the way.
        clock: Seconds, monotonic.

    Yields:
        The same; a tuple of chunks in place of several. How long whoever takes it needs
        for the next one tells how quickly it left.
    """
    rest = iter(parts)
    part, quick = next(rest, None), False
    while part is not None:
        chunks, following = [part], next(rest, None) if quick else None
        nbytes = part.nbytes if isinstance(part, memoryview) else 0
        while nbytes and isinstance(following, memoryview):
            nbytes += following.nbytes
            if nbytes > longest():
                nbytes -= following.nbytes
                break
            chunks.append(following)
            following = next(rest, None)
        since_s = clock()
        yield part if len(chunks) == 1 else tuple(chunks)
        took_s, asked = clock() - since_s, quick
        quick = nbytes >= _QUICK_BYTES and nbytes >= _QUICK_BYTES_PER_S * took_s
        part = following if asked else next(rest, None)


class Reader:
    """Cuts the data of a stream into parts.

    What comes next belongs at `target`; `filled` says how much has come.

    Args:
        format_: How the messages are written.
        longest: Bytes of a message that are accepted.
        inbox: Receives each part, and the bytes it took on the wire.
        buffer_for: Finds the place of a chunk. It is asked only when all parts before were
            taken out of the inbox: they belong before it.
        longest_chunk: Bytes of a chunk that are accepted, if more.
        landed: Told what came to a place that was found for a chunk.
    """

    def __init__(
        self,
        format_: Format,
        longest: int,
        inbox: deque[tuple[Any, int]],
        buffer_for: BufferProvider,
        *,
        longest_chunk: int = 0,
        landed: Landed = not_looked_at,
    ) -> None:
        self._format, self._longest = format_, longest
        # What a message is shows behind its prefix.
        chunk = longest_chunk + _CHUNK_HEAD_BYTES if format_.bulk else 0
        self._longest_of_any = max(longest, chunk)
        self._inbox, self._buffer_for = inbox, buffer_for
        self._landed, self._is_landing = landed, False
        self._head = memoryview(bytearray(_PREFIX_BYTES + _CHUNK_HEAD_BYTES))
        self._size = 0
        self._place = memoryview(b"")
        self.target = self._head[:_PREFIX_BYTES]
        self._step = _Step.PREFIX

    @property
    def between(self) -> bool:
        """Whether no message is under way."""
        return self._step is _Step.PREFIX and self.target.nbytes == _PREFIX_BYTES

    def filled(self, count: int) -> None:
        """Take note of bytes that have come.

        Args:
            count: How many; at most as `target` has.

        Raises:
            ResourceExhausted: If the message is too long.
            Internal: If it is compressed, or malformed.
            CurvdError: If what came to its place is refused there.
        """
        self.target = self.target[count:]
        if self._is_landing:
            self._landed(self._place.nbytes - self.target.nbytes)
        while not self.target.nbytes:
            if self._step is _Step.PREFIX:
                self._prefix_done()
            elif self._step is _Step.CHUNK_HEAD:
                self._chunk_head_done()
            else:
                self._message_done()

    def feed(self, data: memoryview) -> None:
        """Copy bytes to where they belong.

        Args:
            data: What has come.
        """
        while data.nbytes:
            count = min(data.nbytes, self.target.nbytes)
            self.target[:count] = data[:count]
            self.filled(count)
            data = data[count:]

    def _begin(self) -> None:
        self._step, self.target = _Step.PREFIX, self._head[:_PREFIX_BYTES]

    def _prefix_done(self) -> None:
        self._size = int.from_bytes(self._head[1:_PREFIX_BYTES], "big")
        if self._head[0]:
            msg = "a compressed message, and no compression was agreed on"
            raise Internal(msg)
        self._check_size(self._longest_of_any)
        if self._format.bulk and self._size >= _CHUNK_HEAD_BYTES:
            self._step, self.target = _Step.CHUNK_HEAD, self._head[_PREFIX_BYTES:]
        else:
            self._receive(_Step.MESSAGE, _fresh(self._size), b"")

    def _chunk_head_done(self) -> None:
        beginning = bytes(self._head[_PREFIX_BYTES:])
        if beginning[:1] == BYTES_TAG:
            start, size = read_varint(beginning, 1)
            if start + size == self._size:
                place = None if self._inbox else self._buffer_for(size)
                self._receive(_Step.CHUNK, place or _fresh(size), beginning[start:])
                self._is_landing = place is not None
                return
        self._check_size(self._longest)
        self._receive(_Step.MESSAGE, _fresh(self._size), beginning)

    def _check_size(self, longest: int) -> None:
        if self._size > longest:
            msg = (
                f"a message of {self._size} bytes; at most {longest} are accepted. "
                "Send larger tensors in chunks"
            )
            raise ResourceExhausted(msg, nbytes=self._size, limit=longest)

    def _receive(self, step: _Step, place: memoryview, early: bytes) -> None:
        place[: len(early)] = early
        self._step, self._place, self.target = step, place, place[len(early) :]

    def _message_done(self) -> None:
        place, self._place = self._place, memoryview(b"")
        self._is_landing = False
        chunk = self._step is _Step.CHUNK
        self._begin()
        try:
            part = place if chunk else self._format.load(place)
        except DecodeError as error:
            msg = f"a message that is none of its kind: {error}"
            raise Internal(msg) from error
        self._inbox.append((part, self._size + _PREFIX_BYTES))


def _fresh(nbytes: int) -> memoryview:
    """Find memory whose end is aligned: a vector ends with its message, if it has one.

    So its values are aligned, too, wherever in the message they begin.
    """
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    address: int = memory.__array_interface__["data"][0]
    start = -(address + nbytes) % _ALIGNMENT
    return memory[start : start + nbytes].data
