"""Header blocks: put together from frames, decoded (HPACK, RFC 7541) and remembered."""

from __future__ import annotations

from collections.abc import Callable

import hpack

from curvd.http2 import frames
from curvd.http2.fields import Malformed, Pairs
from curvd.http2.frames import Code, Kind
from curvd.http2.rules import check_dependency
from curvd.http2.stream import ProtocolError

Reading = Callable[[Pairs], dict[str, str]]
"""Makes fields of names and values: `fields.request`, `response` or `trailers`."""

_MOST_BLOCKS, _REMEMBERED_BYTES = 16, 1 << 12
"""Blocks that are not decoded again, and how long they are."""
_MOST_RESIZINGS = 2
"""Changes of the table's size that one block may begin with (RFC 7541, 4.2)."""
_SMALL_BLOCK = 256
"""Bytes of headers that count as the frame they came in."""
_BYTES_PER_STEP = 4
"""Decoding so many bytes of headers takes as long as handling a frame."""
_FIELDS_PER_STEP = 8
"""Likewise so many fields: one byte each is enough for those that a table remembers."""


class Blocks:
    """Puts together and decodes the header blocks of one peer.

    Args:
        longest: Bytes of a block, and of the fields that come out of it.
        spend: Is told how long a block took, in frames.
    """

    def __init__(self, longest: int, spend: Callable[[int], None]) -> None:
        self._longest, self._spend = longest, spend
        self._block = bytearray()
        self._ends = False
        self.open_on: int | None = None
        """Stream whose block is not complete; nothing else may come."""
        self._decoder = hpack.Decoder(max_header_list_size=longest)
        self._known: dict[tuple[Reading, bytes], dict[str, str] | Malformed] = {}

    def begin(
        self, flags: int, number: int, payload: bytes
    ) -> tuple[bytes, bool] | None:
        """Take a HEADERS frame.

        Args:
            flags: Its flags.
            number: Its stream.
            payload: The payload, of a length that suits the flags.

        Returns:
            The block, if that is all of it, and whether it ends the stream.

        Raises:
            ProtocolError: If padding or priority are wrong, or there is too much of it.
        """
        if flags & (frames.PADDED | frames.PRIORITISED):
            payload = _bare(flags, number, payload)
        ends = bool(flags & frames.END_STREAM)
        if flags & frames.END_HEADERS and len(payload) <= self._longest:
            return payload, ends
        self.open_on, self._ends = number, ends
        return self.go_on(flags, payload)

    def go_on(self, flags: int, piece: bytes) -> tuple[bytes, bool] | None:
        """Take a CONTINUATION frame.

        Args:
            flags: Its flags.
            piece: Its payload.

        Returns:
            As `begin`.

        Raises:
            ProtocolError: If there is too much of it.
        """
        self._block += piece
        if len(self._block) > self._longest:
            msg = f"more than {self._longest} bytes of headers"
            raise ProtocolError(msg, Code.ENHANCE_YOUR_CALM)
        if not flags & frames.END_HEADERS:
            return None
        block, self.open_on = bytes(self._block), None
        self._block.clear()
        return block, self._ends

    def check_continued(self, kind: int, number: int) -> None:
        """Check that a frame continues the block that is not complete.

        Args:
            kind: Type of the frame.
            number: Its stream.

        Raises:
            ProtocolError: If it does not.
        """
        if (kind, number) != (Kind.CONTINUATION, self.open_on):
            msg = "headers that were not continued"
            raise ProtocolError(msg)

    def decode(self, block: bytes, reading: Reading) -> dict[str, str] | Malformed:
        """Decode a block; not twice, as long as it means the same each time.

        Args:
            block: All of it.
            reading: What it begins or ends.

        Returns:
            Its fields, or why there are none.

        Raises:
            ProtocolError: If it cannot be decoded: then no later block can be, either.
        """
        known = self._known.get((reading, block))
        if known is not None:
            return known
        resizes = _resizes(block)
        try:
            pairs = list(self._decoder.decode(block, raw=True))
        except hpack.OversizedHeaderListError as error:
            msg = f"too many headers: {error}"
            raise ProtocolError(msg, Code.ENHANCE_YOUR_CALM) from error
        except hpack.HPACKError as error:
            msg = f"headers that cannot be read: {error}"
            raise ProtocolError(msg, Code.COMPRESSION_ERROR) from error
        steps = len(block) // _BYTES_PER_STEP if len(block) > _SMALL_BLOCK else 0
        self._spend(max(steps, len(pairs) // _FIELDS_PER_STEP))
        found: dict[str, str] | Malformed
        try:
            found = reading((bytes(name), bytes(value)) for name, value in pairs)
        except Malformed as error:
            found = Malformed(*error.args)  # without what it was raised from
        stateful = resizes or bool(self._decoder.header_table.dynamic_entries)
        if stateful or len(self._known) >= _MOST_BLOCKS:
            self._known.clear()
        if not stateful and len(block) <= _REMEMBERED_BYTES:
            self._known[reading, block] = found
        return found


def _bare(flags: int, number: int, payload: bytes) -> bytes:
    """Take padding and priority off."""
    start, end = 0, len(payload)
    if flags & frames.PADDED:
        start, end = 1, end - payload[0]
    if flags & frames.PRIORITISED:
        check_dependency(number, payload[start : start + 5])
        start += 5
    if start > end:
        msg = "more padding than headers"
        raise ProtocolError(msg)
    return payload[start:end]


def _resizes(block: bytes) -> bool:
    """Tell whether a block changes the size of the table.

    Raises:
        ProtocolError: If it does so more often than there is a reason to.
    """
    at = resizings = 0
    while at < len(block) and block[at] & 0xE0 == 0x20:
        resizings += 1
        if resizings > _MOST_RESIZINGS:
            msg = f"headers that resize their table more than {_MOST_RESIZINGS} times"
            raise ProtocolError(msg, Code.COMPRESSION_ERROR)
        more = block[at] & 0x1F == 0x1F
        at += 1
        while more and at < len(block):
            more = bool(block[at] & 0x80)
            at += 1
    return resizings > 0
