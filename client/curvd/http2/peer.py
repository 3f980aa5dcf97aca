"""What a peer does on a connection, and which of it is an error (RFC 9113)."""

from __future__ import annotations

from collections.abc import Callable
from socket import socket

from curvd.errors import Internal
from curvd.http2 import fields, frames
from curvd.http2.closed import Closed
from curvd.http2.fields import Malformed
from curvd.http2.frames import Code, Kind, Setting, named
from curvd.http2.glitches import RESET_GLITCHES, Glitches
from curvd.http2.header_blocks import Blocks
from curvd.http2.receiver import Receiver
from curvd.http2.rules import check_dependency, check_setting, check_window
from curvd.http2.sender import Sender
from curvd.http2.stream import ProtocolError, Stream

SERVER_WINDOW = 32 << 20
"""What a client may send before the server has used it. It is memory of the server."""
CLIENT_WINDOW = 1 << 30
"""Clients read when they are ready, and TCP holds the server back until then."""
SERVER_HEADER_BYTES = 64 << 10
"""Longest block of headers of a request, unless the server says otherwise."""
CLIENT_HEADER_BYTES = 256 << 10
"""Longest block of headers of a response: an error may name very many tensors."""
LONGEST_CHUNK = 10 << 20
"""Bytes of a chunk that either end takes in one message. Each message costs as much as
copying 200 kB. With what was not given back yet it has to fit into the window."""
_TINY_BYTES = 64
"""Data that is a glitch if there is more of it to come."""


class Incoming:
    """The receiving side of a connection.

    Args:
        sock: Connected, non-blocking; TLS already spoken.
        client: Whether this end makes the calls.
        accept: Called on a server with a stream whose headers came.
        glitches: Counts what the peer sends for nothing.
        header_bytes: Longest block of headers that is accepted.
    """

    def __init__(
        self,
        sock: socket,
        *,
        client: bool,
        accept: Callable[[Stream], None],
        glitches: Glitches | None,
        header_bytes: int | None,
    ) -> None:
        self._client, self._accept = client, accept
        self._glitches = glitches or Glitches()
        self._sender = Sender(sock, self._glitches)
        self._receiver = Receiver(sock, self, introduced=client)
        usual = CLIENT_HEADER_BYTES if client else SERVER_HEADER_BYTES
        self._header_bytes = header_bytes or usual
        self._blocks = Blocks(self._header_bytes, self._receiver.spend)
        self._first_window = frames.DEFAULT_WINDOW
        self._share = CLIENT_WINDOW if client else SERVER_WINDOW
        self._unused = self._used = 0
        self._last = -1 if client else 0
        self._closed = Closed()
        self._introduced = self._said_goodbye = False
        self.stream: Stream | None = None
        self.longest_chunk = 0
        """Bytes of a chunk that may be sent in one message; 0: the peer did not say."""
        self.is_going_away = False
        """No further call."""

    # Frames

    def frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        """Take a frame that is not data."""
        if self._blocks.open_on is not None:
            self._blocks.check_continued(kind, number)
        if not self._introduced:
            self._introduce(kind, flags)
        if kind == Kind.HEADERS:
            self._headers(number, self._blocks.begin(flags, number, payload))
        elif kind == Kind.WINDOW_UPDATE:
            self._widened(number, payload)
        elif kind == Kind.SETTINGS:
            self._settings(flags, payload)
        elif kind == Kind.PING:
            self._glitches.add()
            if not flags & frames.ACK:
                self._sender.control(frames.frame(Kind.PING, frames.ACK, 0, payload))
        elif kind == Kind.CONTINUATION and self._blocks.open_on is not None:
            self._glitches.add()
            self._headers(number, self._blocks.go_on(flags, payload))
        elif kind == Kind.RST_STREAM:
            self._reset(number, payload)
        elif kind == Kind.GOAWAY:
            self._left(payload)
        elif kind in (Kind.PUSH_PROMISE, Kind.CONTINUATION):
            msg = f"a {Kind(kind).name} frame that nobody asked for"
            raise ProtocolError(msg)
        else:
            self._glitches.add()
            if kind == Kind.PRIORITY:
                check_dependency(number, payload)

    def data(
        self, number: int, length: int, padding: int, *, ends: bool
    ) -> Stream | None:
        """Take note of data that comes; say whose it is, None if nobody's."""
        if self._blocks.open_on is not None:
            self._blocks.check_continued(Kind.DATA, number)
        self._unused += length
        if self._unused > self._share:
            msg = f"more than the connection's window of {self._share} bytes"
            raise ProtocolError(msg, Code.FLOW_CONTROL_ERROR)
        if length - padding < _TINY_BYTES and not ends:
            self._glitches.add()
        stream = self.stream
        if (
            stream is None
            or stream.number != number
            or stream.ended_by_peer
            or stream.abandoned
        ):
            self._spend(length)
            self._late(number, "data")
            return None
        stream.credit -= length
        stream.received += length - padding
        if stream.credit < 0:
            self._fail(stream, "more data than its window", Code.FLOW_CONTROL_ERROR)
        elif stream.headers is None:
            self._fail(stream, "data before the headers")
        if stream.reader is None:
            self._spend(length)
        elif padding:
            stream.unacknowledged += padding
            self._spend(padding)
        return stream

    def ended(self, stream: Stream) -> None:
        """Take note that a stream's last data came."""
        if stream.announced is not None and stream.received != stream.announced:
            why = f"{stream.received} bytes of data where {stream.announced} were announced"
            self._fail(stream, why)
        else:
            stream.end()

    # Headers

    def _headers(self, number: int, whole: tuple[bytes, bool] | None) -> None:
        """Take a block of headers, if it is complete, and whether it ends the stream."""
        if whole is None:
            return
        block, ends = whole
        stream = self.stream
        if stream is not None and stream.number == number:
            self._more_headers(stream, block, ends=ends)
        elif number > self._last and number % 2 and not self._client:
            self._begun(number, block, ends=ends)
        else:
            self._blocks.decode(block, fields.trailers)  # later blocks build on it
            self._late(number, "headers")

    def _begun(self, number: int, block: bytes, *, ends: bool) -> None:
        """Take up a call, unless it is malformed or another one is not over."""
        found = self._blocks.decode(block, fields.request)
        before, self._last = self.stream, number
        if isinstance(found, Malformed):
            self._refuse(number, Code.PROTOCOL_ERROR)
            return
        if self._said_goodbye or (before is not None and not before.over):
            self._refuse(number, Code.REFUSED_STREAM)
            return
        self._settle()
        self.stream = stream = Stream(number, self._first_window, self._share)
        stream.headers = found
        if "content-length" in found:
            stream.announced = fields.content_length(found)
        if ends:
            self.ended(stream)
        if stream.reset_code is None:
            self._accept(stream)

    def _refuse(self, number: int, code: Code) -> None:
        self._glitches.add(RESET_GLITCHES)
        self._closed.add(number, excused=True)
        self._sender.reset(number, code)

    def _more_headers(self, stream: Stream, block: bytes, *, ends: bool) -> None:
        """Take the answer's headers, or the trailers of either direction."""
        first = self._client and stream.headers is None
        found = self._blocks.decode(
            block, fields.response if first else fields.trailers
        )
        if stream.ended_by_peer or stream.abandoned:
            self._late(stream.number, "headers")
        elif isinstance(found, Malformed):
            self._fail(stream, str(found))
        elif first:
            self._answered(stream, found, ends=ends)
        elif not ends:
            self._fail(stream, "trailers that do not end the stream")
        else:
            stream.trailers = found
            self.ended(stream)

    def _answered(self, stream: Stream, found: dict[str, str], *, ends: bool) -> None:
        if found[":status"][0] == "1":  # the answer itself is still to come
            self._glitches.add()
            if ends:
                self._fail(
                    stream, f"an answer that ends with status {found[':status']}"
                )
            return
        stream.headers = found
        if "content-length" in found:
            stream.announced = fields.content_length(found)
        if ends:
            stream.trailers = found
            stream.end()

    # Other frames

    def _introduce(self, kind: int, flags: int) -> None:
        if kind != Kind.SETTINGS or flags & frames.ACK:
            msg = "the first frame is no SETTINGS: this is not HTTP/2"
            if kind == frames.HTTP_1:
                msg = "the peer speaks HTTP/1, not HTTP/2"
            raise ProtocolError(msg)
        self._introduced = True

    def _settings(self, flags: int, payload: bytes) -> None:
        self._glitches.add()
        if flags & frames.ACK:
            return
        for name, value in frames.read_settings(payload):
            check_setting(name, value, client=self._client)
            if name == Setting.INITIAL_WINDOW_SIZE:
                stream = self.stream
                if stream is not None:
                    stream.window += value - self._first_window
                    check_window(stream.window, value)
                self._first_window = value
            elif name == Setting.MAX_FRAME_SIZE:
                self._sender.longest = value
            elif name == Setting.LONGEST_CHUNK:
                self.longest_chunk = min(value, LONGEST_CHUNK)
        self._sender.control(frames.frame(Kind.SETTINGS, frames.ACK, 0))

    def _widened(self, number: int, payload: bytes) -> None:
        self._glitches.add()
        increment = int.from_bytes(payload, "big") & frames.LARGEST_WINDOW
        stream = self.stream
        if stream is not None and (stream.number != number or stream.over):
            stream = None
        if not increment and stream is None:
            msg = "a window widened by 0 bytes"
            raise ProtocolError(msg)
        if not number:
            self._sender.window += increment
            check_window(self._sender.window, increment)
        elif stream is None:  # it was sent before the peer could know
            self._check_idle(number, "a WINDOW_UPDATE frame")
        elif not increment:
            self._fail(stream, "its window widened by 0 bytes")
        elif stream.window + increment > frames.LARGEST_WINDOW:
            why = f"its window widened by {increment} bytes"
            self._fail(stream, why, Code.FLOW_CONTROL_ERROR)
        else:
            stream.window += increment

    def _reset(self, number: int, payload: bytes) -> None:
        stream = self.stream
        if stream is None or stream.number != number:
            self._check_idle(number, "a RST_STREAM frame")
            self._glitches.add()
            return
        self._glitches.add(1 if stream.over else RESET_GLITCHES)
        stream.ended_by_peer = True
        stream.reset(int.from_bytes(payload, "big"))

    def _left(self, payload: bytes) -> None:
        """Begin no further call; one that the peer has not taken up is over."""
        self._glitches.add()  # a peer may say it twice (RFC 9113, 6.8), and has said it
        self.is_going_away = True
        last = int.from_bytes(payload[:4], "big") & frames.LARGEST_WINDOW
        code = int.from_bytes(payload[4:8], "big")
        if code != Code.NO_ERROR:
            said = payload[8:208].decode("utf-8", "replace")
            self._receiver.farewell = (
                f"the peer ended the connection: {named(code)} {said!r}"
            )
        stream = self.stream
        if self._client and stream is not None and stream.number > last:
            stream.abandoned = True
            stream.reset(Code.REFUSED_STREAM)

    # Errors of streams

    def _late(self, number: int, what: str) -> None:
        """Take something for a stream that does not expect it.

        Raises:
            ProtocolError: If it was not sent before the peer could know.
        """
        self._glitches.add()
        self._check_idle(number, what)
        stream = self.stream
        if stream is not None and stream.number == number:
            if stream.abandoned:
                return
            if not stream.over:
                self._fail(stream, f"{what} after its end", Code.STREAM_CLOSED)
                return
        elif self._closed.excuses(number):
            return
        unexpected = what == "headers" and not self._was_there(number)
        msg = f"{what} for stream {number}, which is closed"
        raise ProtocolError(
            msg, Code.PROTOCOL_ERROR if unexpected else Code.STREAM_CLOSED
        )

    def _was_there(self, number: int) -> bool:
        current = self.stream is not None and self.stream.number == number
        return current or self._closed.knows(number)

    def _check_idle(self, number: int, what: str) -> None:
        if number > self._last or not number % 2:
            msg = f"{what} for stream {number}, which is not open"
            raise ProtocolError(msg)

    def _fail(self, stream: Stream, why: str, code: Code = Code.PROTOCOL_ERROR) -> None:
        """Cut a call off because of what the peer sent in it."""
        if stream.reset_code is not None:
            return
        self._glitches.add(RESET_GLITCHES)
        msg = f"the peer breaks HTTP/2 on stream {stream.number}: {why}"
        stream.failure, stream.reader = Internal(msg), None
        stream.abandoned = True
        stream.reset(code)
        self._sender.reset(stream.number, code)

    # Windows

    def _spend(self, nbytes: int, *, now: bool = False) -> None:
        """Give back what came and is used, when it is much, or a stream gives back too."""
        self._used += nbytes
        if now or self._used >= self._share // 4:
            self._sender.widen(0, self._used)
            self._unused -= self._used
            self._used = 0

    def _settle(self) -> None:
        """Forget the last stream, and give back what it left unused."""
        self._spend(self._unused - self._used)
        before = self.stream
        if before is not None:
            excused = before.abandoned or not before.ended_by_peer
            self._closed.add(before.number, excused=excused)
            self._glitches.calls += before.reset_code is None
