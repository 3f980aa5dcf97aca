"""One HTTP/2 connection on a socket that never waits.

It carries one stream at a time, as long as the peer likes: a call with large vectors has
a connection to itself, and nothing needs to be interleaved. What a peer may do at any
time is understood all the same: windows, pings, padding, continued headers, going away.

Payload goes from the caller's memory to the socket and from the socket to the place
that the receiver offered, without a copy in between.
"""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from socket import socket
from typing import Any

import hpack

from curvd.errors import CurvdError
from curvd.http2 import frames
from curvd.http2.frames import Code, Kind, Setting
from curvd.http2.messages import Format, Reader, Room

Headers = Sequence[tuple[str, str]]

SERVER_WINDOW = 32 << 20
"""What a client may send before the server has used it. It is memory of the server."""
CLIENT_WINDOW = 1 << 30
"""Clients read when they are ready, and TCP holds the server back until then."""
_SCRATCH_BYTES = 1 << 16
_DIRECT_BYTES = 1 << 12
"""From here on bytes are received where they belong; fewer come with what follows."""
_CONTROL_BYTES = 1 << 15
"""Longest frame that carries no data."""
_HEADER_BYTES = 256 << 10
"""Longest block of headers: an error may name very many tensors."""
_VIEWS = 32
_TLS_BYTES = 1 << 18
_MOST_ANSWERS = 1000
"""Control frames of ours that wait; a peer that provokes more is hostile."""
_MOST_RESETS = 1000
"""Calls that one client may begin only to give them up, before it must connect anew."""


class Broken(Exception):
    """The connection is of no use any more.

    Args:
        why: For the message.
        code: What the peer is told.
    """

    def __init__(self, why: str, code: Code = Code.PROTOCOL_ERROR) -> None:
        super().__init__(why)
        self.code = code


class Stream:
    """One call on a line.

    Args:
        number: Of the stream.
        window: What may be sent now.
    """

    def __init__(self, number: int, window: int) -> None:
        self.number, self.window = number, window
        self.outbox: deque[memoryview | bytes | _Block] = deque()
        """What waits for its turn: data as views, frames as bytes, and headers."""
        self.used = 0
        """Bytes that were used, and of which the peer was not told yet."""
        self.inbox: deque[tuple[Any, int]] = deque()
        """Parts that came, and their bytes."""
        self.reader: Reader | None = None
        """What cuts the data; None: nobody wants it."""
        self.headers: dict[str, str] | None = None
        self.trailers: dict[str, str] | None = None
        self.ended = self.ended_by_peer = False
        """The peer sends no more, or nobody wants more; and the first of them."""
        self.closed = False
        """We send no more."""
        self.reset: int | None = None
        """Code with which the peer gave up."""
        self.failure: CurvdError | None = None
        """Why what came cannot be read."""

    def read(self, format_: Format, longest: int, room: Room) -> None:
        """Say how to read what comes.

        Args:
            format_: How messages are written.
            longest: Bytes of a message that are accepted.
            room: Finds the place of a chunk.
        """
        self.reader = Reader(format_, longest, self.inbox, room)

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        done = self.ended and self.closed and not self.outbox
        return self.reset is not None or done


@dataclass(frozen=True, slots=True)
class _Block:
    """Headers that wait. They are encoded when they go: HPACK depends on the order."""

    headers: Headers
    end: bool


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
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._encoder, self._decoder = hpack.Encoder(), hpack.Decoder()
        self._decoder.max_header_list_size = _HEADER_BYTES
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._start = self._stop = 0
        self._data_left = self._pad_left = 0
        self._data_ends = False
        self._data_to: Stream | None = None
        self._block = bytearray()
        self._block_of: tuple[int, int] | None = None
        self._out: deque[memoryview] = deque()
        self._window = self._first_window = frames.DEFAULT_WINDOW
        self._longest = frames.DEFAULT_LONGEST
        self._share = CLIENT_WINDOW if client else SERVER_WINDOW
        self._unused = self._used = 0
        self._last = -1 if client else 0
        self._resets = 0
        self._introduced = client
        self.stream: Stream | None = None
        self.greeted = not client
        """The peer's settings are here, so that we know what it takes."""
        self.leaving = False
        """The peer takes no further call."""
        self.heard = 0
        """Counts what came; keepalive looks whether it moves."""
        self._greet()

    # Sending

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
        stream.outbox.append(_Block(headers, end))
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
        if end:
            last = frames.frame(Kind.DATA, frames.END_STREAM, stream.number)
            stream.outbox.append(last)
            stream.closed = True

    def give_up(self, stream: Stream, code: Code) -> None:
        """Tell the peer, after what waits, that no more is wanted from it."""
        stream.outbox.append(
            frames.frame(Kind.RST_STREAM, 0, stream.number, frames.number(code))
        )
        stream.closed = stream.ended = True
        stream.reader = None

    def leave(self, code: Code = Code.NO_ERROR) -> None:
        """Tell the peer that there will be no further call."""
        last = self.stream.number if self.stream and not self._client else 0
        payload = frames.number(last) + frames.number(code)
        self._control(frames.frame(Kind.GOAWAY, 0, 0, payload))

    def ping(self) -> None:
        """Ask for a sign of life."""
        self._control(frames.frame(Kind.PING, 0, 0, b"curvd  ?"))

    def push(self) -> bool:
        """Send what the socket and the windows take.

        Returns:
            Whether the socket took everything that the windows allow.

        Raises:
            OSError: If the connection is gone.
        """
        while self._fill():
            sent = self._send()
            if sent is None:
                return False
            while sent:
                first = self._out[0]
                if sent < first.nbytes:
                    self._out[0] = first[sent:]
                    break
                sent -= first.nbytes
                self._out.popleft()
        return True

    def _fill(self) -> bool:
        """Frame what the windows allow; tell whether anything is to be sent."""
        stream = self.stream
        if stream is None:
            return bool(self._out)
        while stream.outbox and len(self._out) < _VIEWS:
            first = stream.outbox[0]
            if not isinstance(first, memoryview):
                self._out.append(memoryview(self._encoded(stream, first)))
                stream.outbox.popleft()
                continue
            size = min(self._longest, self._window, stream.window)
            if size <= 0:
                break
            taken = self._take(stream, size)
            self._window -= taken
            stream.window -= taken
        return bool(self._out)

    def _encoded(self, stream: Stream, item: bytes | _Block) -> bytes:
        if isinstance(item, bytes):
            return item
        block = self._encoder.encode(item.headers)
        flags = frames.END_STREAM if item.end else 0
        return frames.header_frames(stream.number, block, flags, self._longest)

    def _take(self, stream: Stream, size: int) -> int:
        """Put up to so many bytes of data into one frame."""
        outbox = stream.outbox
        views: list[memoryview] = []
        total = 0
        while outbox and total < size and len(views) < _VIEWS:
            first = outbox[0]
            if not isinstance(first, memoryview):
                break
            piece = first[: size - total]
            if piece.nbytes < first.nbytes:
                outbox[0] = first[piece.nbytes :]
            else:
                outbox.popleft()
            views.append(piece)
            total += piece.nbytes
        head = frames.head(total, Kind.DATA, 0, stream.number)
        if views[0].nbytes < _DIRECT_BYTES:
            views[0] = memoryview(head + views[0])
        else:
            views.insert(0, memoryview(head))
        self._out.extend(views)
        return total

    def _send(self) -> int | None:
        try:
            if self._tls:
                # The same bytes again after "want": that is OpenSSL's rule.
                return self.sock.send(self._out[0][:_TLS_BYTES])
            return self.sock.sendmsg(list(islice(self._out, _VIEWS)))
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None

    def _control(self, frame: bytes) -> None:
        if len(self._out) > _MOST_ANSWERS:
            msg = "the peer provokes answers and does not read them"
            raise Broken(msg, Code.ENHANCE_YOUR_CALM)
        self._out.append(memoryview(frame))

    def _greet(self) -> None:
        ours = {
            Setting.ENABLE_PUSH: 0,
            Setting.INITIAL_WINDOW_SIZE: self._share,
            Setting.MAX_FRAME_SIZE: frames.LONGEST,
            Setting.MAX_HEADER_LIST_SIZE: _HEADER_BYTES,
        }
        if self._client:
            self._out.append(memoryview(frames.PREFACE))
            ours[Setting.DIRECT] = 1
        else:
            del ours[Setting.ENABLE_PUSH]
            ours[Setting.MAX_CONCURRENT_STREAMS] = 1
        self._control(frames.settings(ours))
        self._widen(0, self._share - frames.DEFAULT_WINDOW)

    def _widen(self, stream: int, increment: int) -> None:
        payload = frames.number(increment)
        self._control(frames.frame(Kind.WINDOW_UPDATE, 0, stream, payload))

    # Receiving

    @property
    def more(self) -> bool:
        """Whether `pull` has something to do although the socket shows nothing."""
        return self._tls and self.sock.pending() > 0  # type: ignore[attr-defined]

    def used(self, stream: Stream, nbytes: int) -> None:
        """Let the peer send more, because a part was used.

        Args:
            stream: Where it came from.
            nbytes: What it took on the wire.
        """
        stream.used += nbytes
        if stream.used >= self._share // 4 and not stream.ended:
            self._widen(stream.number, stream.used)
            stream.used = 0
        self._dropped(nbytes)

    def _dropped(self, nbytes: int) -> None:
        self._used += nbytes
        if self._used >= self._share // 4:
            self._widen(0, self._used)
            self._unused -= self._used
            self._used = 0

    def _settle(self) -> None:
        """Forget what the last stream left unused."""
        self._dropped(self._unused - self._used)

    def pull(self) -> None:
        """Receive what the socket has, or up to the end of a large message.

        Raises:
            Broken: If the peer is gone, or breaks the protocol.
            OSError: If the connection is gone.
        """
        while True:
            place = self._direct()
            if place is not None:
                count = self._receive(place)
                if count is None:
                    return
                if self._landed(count):
                    return
                continue
            count = self._receive(self._scratch[self._stop :])
            if count is None:
                return
            self._stop += count
            if self._parse():
                return

    def _receive(self, place: memoryview) -> int | None:
        try:
            count = self.sock.recv_into(place)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        if not count:
            msg = "the connection was closed"
            raise Broken(msg)
        self.heard += 1
        return count

    def _direct(self) -> memoryview | None:
        """The place of the data that comes next, if it is worth a call of its own."""
        if self._start != self._stop or self._data_left < _DIRECT_BYTES:
            return None
        reader = None if self._data_to is None else self._data_to.reader
        if reader is None or reader.target.nbytes < _DIRECT_BYTES:
            return None
        return reader.target[: self._data_left]

    def _landed(self, count: int) -> bool:
        """Take note of data that is in its place; tell whether a message is complete."""
        stream = self._data_to
        assert stream is not None and stream.reader is not None
        self._data_left -= count
        before = len(stream.inbox)
        self._checked(stream, stream.reader.filled, count)
        if not self._data_left and not self._pad_left:
            self._data_done()
        return len(stream.inbox) > before or stream.reader is None

    def _parse(self) -> bool:
        """Take what is in the scratch memory; tell whether parts came."""
        try:
            while self._step():
                pass
        except hpack.HPACKError as error:
            msg = f"headers that cannot be read: {error}"
            raise Broken(msg, Code.COMPRESSION_ERROR) from error
        rest = self._stop - self._start
        if rest and self._start:
            self._scratch[:rest] = bytes(self._scratch[self._start : self._stop])
        self._start, self._stop = 0, rest
        return self.stream is not None and bool(self.stream.inbox)

    def _step(self) -> bool:
        """Take one frame, or the data that is here, from the scratch memory."""
        here = self._scratch[self._start : self._stop]
        if not self._introduced:
            return self._introduce(here)
        if self._data_left:
            data = here[: self._data_left]
            self._start += data.nbytes
            self._data_left -= data.nbytes
            stream = self._data_to
            if data.nbytes and stream is not None and stream.reader is not None:
                self._checked(stream, stream.reader.feed, data)
            if not self._data_left and not self._pad_left:
                self._data_done()
            return data.nbytes > 0
        if self._pad_left:
            count = min(self._pad_left, here.nbytes)
            self._start += count
            self._pad_left -= count
            if not self._pad_left:
                self._data_done()
            return count > 0
        if here.nbytes < frames.HEAD_BYTES:
            return False
        length, kind, flags, number = frames.read_head(here[: frames.HEAD_BYTES])
        if self._block_of is not None and (kind, number) != (
            Kind.CONTINUATION,
            self._block_of[0],
        ):
            msg = "headers that were not continued"
            raise Broken(msg)
        if kind == Kind.DATA:
            return self._data(here, length, flags, number)
        if length > _CONTROL_BYTES:
            msg = f"a frame of {length} bytes that carries no data"
            raise Broken(msg, Code.FRAME_SIZE_ERROR)
        end = frames.HEAD_BYTES + length
        if here.nbytes < end:
            return False
        self._start += end
        self._frame(kind, flags, number, bytes(here[frames.HEAD_BYTES : end]))
        return True

    def _introduce(self, here: memoryview) -> bool:
        size = min(here.nbytes, len(frames.PREFACE))
        if here[:size] != frames.PREFACE[:size]:
            msg = "this is not HTTP/2"
            raise Broken(msg)
        self._introduced = size == len(frames.PREFACE)
        self._start += size if self._introduced else 0
        return self._introduced

    def _data(self, here: memoryview, length: int, flags: int, number: int) -> bool:
        head = frames.HEAD_BYTES
        if length > frames.LONGEST:
            msg = f"a frame of {length} bytes"
            raise Broken(msg, Code.FRAME_SIZE_ERROR)
        padding = 0
        if flags & frames.PADDED:
            if here.nbytes < head + 1:
                return False
            padding = here[head] + 1
            head += 1
        if padding > length:
            msg = "more padding than frame"
            raise Broken(msg)
        stream = self.stream if self.stream and self.stream.number == number else None
        if number > self._last or not number or (stream and stream.ended_by_peer):
            msg = f"data for stream {number}, which is not open"
            raise Broken(msg)
        self._unused += length
        if self._unused > self._share:
            msg = f"more than the window of {self._share} bytes"
            raise Broken(msg, Code.FLOW_CONTROL_ERROR)
        self._data_to = stream
        unwanted = stream is None or stream.reader is None
        self._dropped(length if unwanted else padding)
        self._start += head
        self._data_left = length - padding
        self._pad_left = max(0, padding - 1)
        self._data_ends = bool(flags & frames.END_STREAM)
        if not self._data_left and not self._pad_left:
            self._data_done()
        return True

    def _data_done(self) -> None:
        if self._data_ends and self._data_to is not None:
            self._ended(self._data_to)
        self._data_ends, self._data_to = False, None

    def _ended(self, stream: Stream) -> None:
        stream.ended = stream.ended_by_peer = True
        if stream.reader is not None and not stream.reader.between:
            msg = "a stream ends within a message"
            raise Broken(msg)

    def _checked(self, stream: Stream, take: Callable[[Any], None], data: Any) -> None:
        try:
            take(data)
        except CurvdError as error:
            stream.failure, stream.reader = error, None

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        stream = self.stream if self.stream and self.stream.number == number else None
        if kind == Kind.HEADERS:
            self._headers(flags, number, _unpadded(payload, flags))
        elif kind == Kind.CONTINUATION:
            if self._block_of is None:
                msg = "continued headers that did not begin"
                raise Broken(msg)
            self._headers(flags | self._block_of[1], number, payload)
        elif kind == Kind.SETTINGS and not flags & frames.ACK:
            self._settings(payload)
        elif kind == Kind.PING and not flags & frames.ACK:
            self._control(frames.frame(Kind.PING, frames.ACK, 0, payload[:8]))
        elif kind == Kind.WINDOW_UPDATE:
            self._widened(stream, number, payload)
        elif kind == Kind.RST_STREAM and stream is not None:
            stream.reset = int.from_bytes(payload[:4], "big")
            stream.ended = stream.closed = stream.ended_by_peer = True
            stream.outbox.clear()
            self._resets += 1
            if self._resets > _MOST_RESETS:
                msg = f"more than {_MOST_RESETS} calls were given up"
                raise Broken(msg, Code.ENHANCE_YOUR_CALM)
        elif kind == Kind.GOAWAY:
            self.leaving = True
        elif kind == Kind.PUSH_PROMISE:
            msg = "a push that nobody asked for"
            raise Broken(msg)

    def _headers(self, flags: int, number: int, payload: bytes) -> None:
        self._block += payload
        if len(self._block) > _HEADER_BYTES:
            msg = f"more than {_HEADER_BYTES} bytes of headers"
            raise Broken(msg, Code.ENHANCE_YOUR_CALM)
        if not flags & frames.END_HEADERS:
            self._block_of = (number, flags & frames.END_STREAM)
            return
        pairs = self._decoder.decode(bytes(self._block))
        self._block_of = None
        self._block.clear()
        found = {str(name): str(value) for name, value in pairs}
        self._arrived(number, found, end=bool(flags & frames.END_STREAM))

    def _arrived(self, number: int, found: dict[str, str], *, end: bool) -> None:
        stream = self.stream
        if stream is not None and stream.number == number:
            if stream.headers is None:
                stream.headers = found
            if end or stream.headers is not found:
                stream.trailers = found
            if end:
                self._ended(stream)
            return
        if self._client or number <= self._last:
            return  # of a call that was given up
        self._last = number
        if stream is not None and not stream.over:
            code = frames.number(Code.REFUSED_STREAM)
            self._control(frames.frame(Kind.RST_STREAM, 0, number, code))
            return
        self._settle()
        self.stream = stream = Stream(number, self._first_window)
        stream.headers = found
        stream.ended = stream.ended_by_peer = end
        self._accept(stream)

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
                self._longest = value
            elif name == Setting.HEADER_TABLE_SIZE:
                self._encoder.header_table_size = min(value, 1 << 12)
        self.greeted = True
        self._control(frames.frame(Kind.SETTINGS, frames.ACK, 0))

    def _widened(self, stream: Stream | None, number: int, payload: bytes) -> None:
        increment = int.from_bytes(payload[:4], "big") & frames.LARGEST_WINDOW
        if not number:
            self._window += increment
        elif stream is not None:
            stream.window += increment
        most = max(self._window, stream.window if stream else 0)
        if not increment or most > frames.LARGEST_WINDOW:
            msg = f"a window widened by {increment}"
            raise Broken(msg, Code.FLOW_CONTROL_ERROR)


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
