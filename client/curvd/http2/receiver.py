"""The receiving half of a connection: frames, and data into its place."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from socket import socket
from typing import Any, Protocol

from curvd.errors import CurvdError
from curvd.http2 import frames
from curvd.http2.frames import Code, Kind
from curvd.http2.rules import KNOWN, check_head
from curvd.http2.sockets import counts_bytes, wake_after
from curvd.http2.stream import ProtocolError, Stream

_SCRATCH_BYTES = 1 << 16
_DIRECT_BYTES = 1 << 12
"""Bytes from which on data is received where it belongs; fewer come with what follows."""
_BUFFERED_BYTES = 1 << 19
"""Longest frame without data that is received as a whole: more than all headers that
any end accepts, so `Blocks` says that they are too many."""
_MOST_STEPS = 64
"""Frames, pieces of data and reads of the socket in one `pull`."""
_MOST_BYTES = 4 << 20
"""Bytes after which one `pull` returns, however many the socket still has."""
_WORTH_WAKING_BYTES = 1 << 20
"""Data of a long frame that is left in the socket until there is so much of it. A sender
is slower than memory, so whoever reads what has come finds 64 KiB, and again 64 KiB.
Shorter frames are read as they come: their sender is done before a wait would pay."""
_NOTHING = memoryview(bytearray())
_threads = threading.local()


class FrameHandler(Protocol):
    """What is told of frames."""

    def frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        """Take a frame that is not data."""

    def data(
        self, number: int, length: int, padding: int, *, ends: bool
    ) -> Stream | None:
        """Take note of data that comes; say whose it is, None if nobody's."""

    def ended(self, stream: Stream) -> None:
        """Take note that a stream's last data came."""


class Receiver:
    """Cuts what comes into frames.

    Small things pass through scratch memory. The data of a large message goes from the
    socket to the reader's target.

    Args:
        sock: Non-blocking.
        handler: Is told of frames.
        introduced: False if the peer has to say first that it speaks HTTP/2.
    """

    def __init__(
        self, sock: socket, handler: FrameHandler, *, introduced: bool
    ) -> None:
        self._sock, self._handler, self._introduced = sock, handler, introduced
        self._counts_bytes, self._wakes_after = counts_bytes(sock), 1
        self._tls = sock if isinstance(sock, ssl.SSLSocket) else None
        self._scratch = _NOTHING  # while nobody pulls
        self._start = self._stop = 0
        self._rest = b""  # of a frame that is cut, while nobody pulls
        self._steps_left = 0
        self._is_cut = False  # the scratch memory may hold another whole frame
        self._data_left = self._pad_left = 0
        self._data_ends = self._is_long = False
        self._stream: Stream | None = None
        self.bytes_received = 0
        """Bytes that came."""
        self.drained = True
        """Whether the last `pull` left nothing in the socket."""
        self.farewell = "the connection was closed"
        """What to say when the peer closes the connection."""

    @property
    def more(self) -> bool:
        """Whether `pull` has something to do although the socket shows nothing."""
        pending = self._tls is not None and self._tls.pending() > 0
        return self._is_cut or pending

    def spend(self, steps: int) -> None:
        """Take note that a frame took as long as so many others.

        Args:
            steps: How many.
        """
        self._steps_left -= steps

    def pull(self) -> None:
        """Receive what the socket has, or until parts are there to be taken.

        It returns after so many frames or bytes, so that no peer keeps the caller from
        its other connections; `more` tells whether to come back.

        Raises:
            ProtocolError: If the peer is gone, or breaks the protocol.
            OSError: If the connection is gone.
        """
        self._borrow()
        try:
            self._pull()
        finally:
            self._give_back()
        self._rest_until_worth_it()

    def _pull(self) -> None:
        self._steps_left, self.drained = _MOST_STEPS, False
        most = self.bytes_received + _MOST_BYTES
        done = self._is_cut and self._parsed(0)
        while not done and self._steps_left > 0 and self.bytes_received < most:
            self._steps_left -= 1
            place = self._place()
            direct = place is not None
            if place is None:
                place = self._scratch[self._stop :]
            count = self._receive(place)
            if count is None:
                self.drained = True
                return
            done = self._landed(count) if direct else self._parsed(count)
            if count < place.nbytes and self._rests:
                self.drained = True  # one more call would say so, or find a crumb
                return

    @property
    def _rests(self) -> bool:
        """Whether much is still to come for certain, and may come together."""
        return self._counts_bytes and self._is_long and self._data_left > 0

    def _rest_until_worth_it(self) -> None:
        """Have the socket wake its reader when much of a frame has come, or its end."""
        if not self._is_long and self._wakes_after == 1:
            return  # short frames, as most are
        wanted = min(self._data_left, _WORTH_WAKING_BYTES) if self._rests else 1
        if wanted != self._wakes_after:
            self._wakes_after = wanted
            wake_after(self._sock, wanted)

    def _borrow(self) -> None:
        """Take the scratch memory, unless a long frame needed memory of its own."""
        if self._scratch.nbytes:
            return
        self._scratch, self._stop = _common_scratch(), len(self._rest)
        self._scratch[: self._stop] = self._rest

    def _give_back(self) -> None:
        """Hold no memory but the rest of a frame: most connections are idle."""
        rest = self._scratch[self._start : self._stop]
        if rest.nbytes and self._scratch.nbytes > _SCRATCH_BYTES:
            return
        self._rest, self._scratch = bytes(rest), _NOTHING
        self._start = self._stop = 0

    def _receive(self, place: memoryview) -> int | None:
        try:
            count = self._sock.recv_into(place)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        if not count:
            raise ProtocolError(self.farewell, Code.NO_ERROR)
        self.bytes_received += count
        return count

    def _place(self) -> memoryview | None:
        """Find the place of the data that comes next, if a call of its own is worth it."""
        reader = None if self._stream is None else self._stream.reader
        if reader is None or self._stop or self._data_left < _DIRECT_BYTES:
            return None
        if reader.target.nbytes < _DIRECT_BYTES:
            return None
        return reader.target[: self._data_left]

    def _landed(self, count: int) -> bool:
        """Take note of data that is in its place; tell whether a part is complete."""
        stream = self._stream
        assert stream is not None and stream.reader is not None
        self._data_left -= count
        before = len(stream.inbox)
        _take(stream, stream.reader.filled, count)
        self._conclude_data()
        return len(stream.inbox) > before or stream.reader is None

    def _parsed(self, count: int) -> bool:
        """Take what is in the scratch memory; tell whether parts came."""
        self._stop += count
        stream = None
        self._is_cut = False
        while self._step():
            stream = self._stream or stream
            self._steps_left -= 1
            if self._steps_left <= 0:
                self._is_cut = self._start < self._stop
                break
        if self._is_cut:
            return stream is not None and bool(stream.inbox)
        rest = self._stop - self._start
        if rest and self._start:
            self._scratch[:rest] = bytes(self._scratch[self._start : self._stop])
        self._start, self._stop = 0, rest
        return stream is not None and bool(stream.inbox)

    def _step(self) -> bool:
        """Take one frame, or the data that is here; tell whether that was possible."""
        here = self._scratch[self._start : self._stop]
        if not here.nbytes:
            return False
        if not self._introduced:
            return self._introduce(here)
        if self._data_left:
            self._feed(here[: self._data_left])
            return True
        if self._pad_left:
            self._skip(min(self._pad_left, here.nbytes))
            return True
        if here.nbytes < frames.HEAD_BYTES:
            return False
        length, kind, flags, number = frames.read_head(here[: frames.HEAD_BYTES])
        if kind >= KNOWN:  # it is skipped, however long
            self._start += frames.HEAD_BYTES
            self._stream, self._data_ends, self._pad_left = None, False, length
            self._handler.frame(kind, flags, number, b"")
            return True
        check_head(kind, flags, number, length)
        if kind == Kind.DATA:
            return self._begin_data(here, length, flags, number)
        if length > _BUFFERED_BYTES:
            msg = f"a {Kind(kind).name} frame of {length} bytes"
            raise ProtocolError(msg, Code.ENHANCE_YOUR_CALM)
        end = frames.HEAD_BYTES + length
        if here.nbytes < end:
            self._make_room(end)
            return False
        self._start += end
        self._handler.frame(kind, flags, number, bytes(here[frames.HEAD_BYTES : end]))
        return True

    def _make_room(self, nbytes: int) -> None:
        """Let the scratch memory hold a frame that is longer than frames usually are."""
        if nbytes > self._scratch.nbytes:
            larger = memoryview(bytearray(nbytes))
            larger[: self._scratch.nbytes] = self._scratch
            self._scratch = larger

    def _introduce(self, here: memoryview) -> bool:
        size = min(here.nbytes, len(frames.PREFACE))
        if here[:size] != frames.PREFACE[:size]:
            msg = "the preface is missing: this is not HTTP/2"
            raise ProtocolError(msg)
        self._introduced = size == len(frames.PREFACE)
        self._start += size if self._introduced else 0
        return self._introduced

    def _begin_data(
        self, here: memoryview, length: int, flags: int, number: int
    ) -> bool:
        head, padding = frames.HEAD_BYTES, 0
        if flags & frames.PADDED:
            if here.nbytes < head + 1:
                return False
            padding = here[head] + 1
            head += 1
        if padding > length:
            msg = "more padding than frame"
            raise ProtocolError(msg)
        ends = bool(flags & frames.END_STREAM)
        self._stream = self._handler.data(number, length, padding, ends=ends)
        self._start += head
        self._data_left, self._pad_left = length - padding, max(0, padding - 1)
        self._data_ends, self._is_long = ends, length >= _WORTH_WAKING_BYTES
        self._conclude_data()
        return True

    def _feed(self, data: memoryview) -> None:
        self._start += data.nbytes
        self._data_left -= data.nbytes
        stream = self._stream
        if stream is not None and stream.reader is not None:
            _take(stream, stream.reader.feed, data)
        self._conclude_data()

    def _skip(self, count: int) -> None:
        self._start += count
        self._pad_left -= count
        self._conclude_data()

    def _conclude_data(self) -> None:
        if self._data_left or self._pad_left:
            return
        stream, self._stream = self._stream, None
        if self._data_ends and stream is not None:
            self._handler.ended(stream)


def _common_scratch() -> memoryview:
    """Find the scratch memory of this thread; a pull is over before another begins."""
    scratch: memoryview | None = getattr(_threads, "scratch", None)
    if scratch is None:
        scratch = _threads.scratch = memoryview(bytearray(_SCRATCH_BYTES))
    return scratch


def _take(stream: Stream, take: Callable[[Any], None], data: Any) -> None:
    """Let the reader take data; a message that cannot be read ends the call only."""
    try:
        take(data)
    except CurvdError as error:
        # Its frames refer to the memory of what came, and the stream stays until the next.
        stream.failure, stream.reader = error.with_traceback(None), None
