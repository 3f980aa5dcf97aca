"""One HTTP/2 connection on a socket that never waits.

It carries one stream at a time, as long as the peer likes: a call with large vectors has
a connection to itself, and nothing needs to be interleaved. What a peer may do at any
time is understood all the same: windows, pings, padding, continued headers, going away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from socket import socket

import hpack

from curvd.http2 import frames
from curvd.http2.frames import Code, Kind, Setting
from curvd.http2.intake import Intake
from curvd.http2.outlet import Outlet
from curvd.http2.stream import Broken, Headers, Stream

SERVER_WINDOW = 32 << 20
"""What a client may send before the server has used it. It is memory of the server."""
CLIENT_WINDOW = 1 << 30
"""Clients read when they are ready, and TCP holds the server back until then."""
_HEADER_BYTES = 256 << 10
"""Longest block of headers: an error may name very many tensors."""
_MOST_BLOCKS, _REMEMBERED_BYTES = 16, 1 << 12
"""Blocks of headers that are not decoded again, and how long they are."""
_MOST_RESETS = 1000
"""Calls that one client may begin only to give them up, before it must connect anew."""


class Line:
    """One connection.

    Args:
        sock: Connected, non-blocking; TLS already spoken.
        client: Whether this end makes the calls.
        accept: Called on a server with a stream whose headers came.
    """

    def __init__(
        self,
        sock: socket,
        *,
        client: bool,
        accept: Callable[[Stream], None] = lambda stream: None,
    ) -> None:
        self.sock, self._client, self._accept = sock, client, accept
        self._outlet = Outlet(sock)
        self._intake = Intake(sock, self, introduced=client)
        self._decoder = hpack.Decoder()
        self._decoder.max_header_list_size = _HEADER_BYTES
        self._blocks: dict[bytes, dict[str, str]] = {}
        self._block = bytearray()
        self._block_of: tuple[int, int] | None = None
        self._first_window = frames.DEFAULT_WINDOW
        self._share = CLIENT_WINDOW if client else SERVER_WINDOW
        self._unused = self._used = 0
        self._last = -1 if client else 0
        self._resets = 0
        self.stream: Stream | None = None
        self.leaving = False
        """No further call."""
        self._greet()

    # What this end does

    def open(self, headers: Headers) -> Stream:
        """Begin a call.

        Args:
            headers: Of the request.

        Returns:
            Its stream.
        """
        self._last += 2
        self._settle()
        self.stream = Stream(self._last, self._first_window)
        self.send_headers(self.stream, headers)
        return self.stream

    def send_headers(
        self, stream: Stream, headers: Headers, *, end: bool = False
    ) -> None:
        """Send headers or trailers, after what waits already.

        Args:
            stream: Where.
            headers: Names and values.
            end: Whether nothing follows.
        """
        block, flags = frames.literals(tuple(headers)), frames.END_STREAM if end else 0
        longest = self._outlet.longest
        stream.outbox.append(frames.header_frames(stream.number, block, flags, longest))
        stream.closed = stream.closed or end

    def send_data(
        self, stream: Stream, views: Iterable[memoryview], *, end: bool = False
    ) -> None:
        """Send bytes from where they are; they must not change before they are sent.

        Args:
            stream: Where.
            views: The bytes.
            end: Whether nothing follows.
        """
        stream.outbox.extend(view for view in views if view.nbytes)
        if end and stream.outbox and isinstance(stream.outbox[-1], memoryview):
            stream.finishing = stream.closed = True
        elif end:
            last = frames.frame(Kind.DATA, frames.END_STREAM, stream.number)
            stream.outbox.append(last)
            stream.closed = True

    def give_up(self, stream: Stream, code: Code) -> None:
        """Tell the peer, after what waits, that no more is wanted from it."""
        payload = frames.number(code)
        stream.outbox.append(frames.frame(Kind.RST_STREAM, 0, stream.number, payload))
        stream.closed = stream.ended = True
        stream.reader = None

    def leave(self, code: Code = Code.NO_ERROR) -> None:
        """Tell the peer that there will be no further call."""
        last = self.stream.number if self.stream and not self._client else 0
        payload = frames.number(last) + frames.number(code)
        self._outlet.control(frames.frame(Kind.GOAWAY, 0, 0, payload))

    def ping(self) -> None:
        """Ask for a sign of life."""
        self._outlet.control(frames.frame(Kind.PING, 0, 0, b"curvd  ?"))

    def used(self, stream: Stream, nbytes: int) -> None:
        """Let the peer send more, because a part was used.

        Args:
            stream: Where it came from.
            nbytes: What it took on the wire.
        """
        stream.used += nbytes
        if stream.used >= self._share // 4 and not stream.ended:
            self._outlet.widen(stream.number, stream.used)
            stream.used = 0
        self._spend(nbytes)

    def push(self) -> bool:
        """Send what the socket and the windows take.

        Returns:
            Whether the socket took everything that the windows allow.

        Raises:
            OSError: If the connection is gone.
        """
        return self._outlet.push(self.stream)

    def pull(self) -> None:
        """Receive what the socket has, or until parts are there to be taken.

        Raises:
            Broken: If the peer is gone, or breaks the protocol.
            OSError: If the connection is gone.
        """
        try:
            self._intake.pull()
        except hpack.HPACKError as error:
            msg = f"headers that cannot be read: {error}"
            raise Broken(msg, Code.COMPRESSION_ERROR) from error

    @property
    def more(self) -> bool:
        """Whether `pull` has something to do although the socket shows nothing."""
        return self._intake.more

    @property
    def heard(self) -> int:
        """Bytes that came; keepalive looks whether they move."""
        return self._intake.heard

    # What the peer does

    def frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        """Take a frame that is not data."""
        stream = self._of(number)
        if self._block_of and (kind, number) != (Kind.CONTINUATION, self._block_of[0]):
            msg = "headers that were not continued"
            raise Broken(msg)
        if kind == Kind.HEADERS:
            self._headers(flags, number, _unpadded(payload, flags))
        elif kind == Kind.CONTINUATION and self._block_of is not None:
            self._headers(flags | self._block_of[1], number, payload)
        elif kind == Kind.SETTINGS and not flags & frames.ACK:
            self._settings(payload)
        elif kind == Kind.PING and not flags & frames.ACK:
            self._outlet.control(frames.frame(Kind.PING, frames.ACK, 0, payload[:8]))
        elif kind == Kind.WINDOW_UPDATE:
            self._widened(stream, number, payload)
        elif kind == Kind.RST_STREAM and stream is not None:
            self._reset(stream, payload)
        elif kind == Kind.GOAWAY:
            self.leaving = True
        elif kind in (Kind.PUSH_PROMISE, Kind.CONTINUATION):
            msg = f"a frame of type {kind} that nobody asked for"
            raise Broken(msg)

    def data(self, number: int, length: int, padding: int) -> Stream | None:
        """Take note of data that comes; say whose it is, None if nobody's."""
        stream = self._of(number)
        if number > self._last or not number or (stream and stream.ended_by_peer):
            msg = f"data for stream {number}, which is not open"
            raise Broken(msg)
        self._unused += length
        if self._unused > self._share:
            msg = f"more than the window of {self._share} bytes"
            raise Broken(msg, Code.FLOW_CONTROL_ERROR)
        unwanted = stream is None or stream.reader is None
        self._spend(length if unwanted else padding)
        return stream

    def _of(self, number: int) -> Stream | None:
        stream = self.stream
        return stream if stream is not None and stream.number == number else None

    def _headers(self, flags: int, number: int, payload: bytes) -> None:
        self._block += payload
        if len(self._block) > _HEADER_BYTES:
            msg = f"more than {_HEADER_BYTES} bytes of headers"
            raise Broken(msg, Code.ENHANCE_YOUR_CALM)
        if not flags & frames.END_HEADERS:
            self._block_of = (number, flags & frames.END_STREAM)
            return
        block, self._block_of = bytes(self._block), None
        self._block.clear()
        self._arrived(number, self._decoded(block), end=bool(flags & frames.END_STREAM))

    def _decoded(self, block: bytes) -> dict[str, str]:
        """Decode headers; not twice, as long as a block means the same each time."""
        found = self._blocks.get(block)
        if found is not None:
            return found
        pairs = self._decoder.decode(block)
        found = {str(name): str(value) for name, value in pairs}
        stateful = bool(self._decoder.header_table.dynamic_entries)
        if stateful or len(self._blocks) >= _MOST_BLOCKS:
            self._blocks.clear()
        if not stateful and len(block) <= _REMEMBERED_BYTES:
            self._blocks[block] = found
        return found

    def _arrived(self, number: int, found: dict[str, str], *, end: bool) -> None:
        stream = self._of(number)
        if stream is not None:
            if stream.headers is None:
                stream.headers = found
            else:
                stream.trailers = found
            if end:
                stream.trailers = found  # also if there was no answer before it
                stream.end()
            return
        if self._client or number <= self._last:
            return  # of a call that was given up
        self._last = number
        if self.stream is not None and not self.stream.over:
            code = frames.number(Code.REFUSED_STREAM)
            self._outlet.control(frames.frame(Kind.RST_STREAM, 0, number, code))
            return
        self._settle()
        self.stream = stream = Stream(number, self._first_window)
        stream.headers = found
        stream.ended = stream.ended_by_peer = end
        self._accept(stream)

    def _reset(self, stream: Stream, payload: bytes) -> None:
        stream.give_up(int.from_bytes(payload[:4], "big"))
        self._resets += 1
        if self._resets > _MOST_RESETS:
            msg = f"more than {_MOST_RESETS} calls were given up"
            raise Broken(msg, Code.ENHANCE_YOUR_CALM)

    def _settings(self, payload: bytes) -> None:
        for name, value in frames.read_settings(payload):
            if name == Setting.INITIAL_WINDOW_SIZE:
                if value > frames.LARGEST_WINDOW:
                    msg = f"an initial window of {value}"
                    raise Broken(msg, Code.FLOW_CONTROL_ERROR)
                if self.stream is not None:
                    self.stream.window += value - self._first_window
                self._first_window = value
            elif name == Setting.MAX_FRAME_SIZE:
                if not frames.DEFAULT_LONGEST <= value <= frames.LONGEST:
                    msg = f"a longest frame of {value}"
                    raise Broken(msg)
                self._outlet.longest = value
        self._outlet.control(frames.frame(Kind.SETTINGS, frames.ACK, 0))

    def _widened(self, stream: Stream | None, number: int, payload: bytes) -> None:
        increment = int.from_bytes(payload[:4], "big") & frames.LARGEST_WINDOW
        if not number:
            self._outlet.window += increment
        elif stream is not None:
            stream.window += increment
        most = max(self._outlet.window, stream.window if stream else 0)
        if not increment or most > frames.LARGEST_WINDOW:
            msg = f"a window widened by {increment}"
            raise Broken(msg, Code.FLOW_CONTROL_ERROR)

    # Accounts

    def _spend(self, nbytes: int) -> None:
        """Give back what came and is used, when it is much."""
        self._used += nbytes
        if self._used >= self._share // 4:
            self._outlet.widen(0, self._used)
            self._unused -= self._used
            self._used = 0

    def _settle(self) -> None:
        """Give back what the last stream left unused."""
        self._spend(self._unused - self._used)

    def _greet(self) -> None:
        ours = {
            Setting.INITIAL_WINDOW_SIZE: self._share,
            Setting.MAX_FRAME_SIZE: frames.LONGEST,
            Setting.MAX_HEADER_LIST_SIZE: _HEADER_BYTES,
        }
        if self._client:
            self._outlet.control(frames.PREFACE)
            ours |= {Setting.ENABLE_PUSH: 0, Setting.DIRECT: 1}
        else:
            ours[Setting.MAX_CONCURRENT_STREAMS] = 1
        self._outlet.control(frames.settings(ours))
        self._outlet.widen(0, self._share - frames.DEFAULT_WINDOW)


def _unpadded(payload: bytes, flags: int) -> bytes:
    """Take padding and priority off a block of headers."""
    start, end = 0, len(payload)
    if flags & frames.PADDED:
        start, end = 1, end - (payload[0] if payload else 0)
    if flags & frames.PRIORITISED:
        start += 5
    if start > end:
        msg = "more padding than headers"
        raise Broken(msg)
    return payload[start:end]
