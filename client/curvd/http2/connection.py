"""One HTTP/2 connection on a socket that never waits.

It carries one stream at a time, as long as the peer likes: a call with large vectors has
a connection to itself, and nothing needs to be interleaved. What a peer may do at any
time is understood all the same: windows, pings, padding, continued headers, going away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from socket import socket

from curvd.http2 import frames
from curvd.http2.frames import Code, Kind, Setting
from curvd.http2.glitches import Glitches
from curvd.http2.peer import LONGEST_CHUNK, Incoming
from curvd.http2.stream import Headers, ProtocolError, Stream


class H2Connection(Incoming):
    """One connection: what this end does on it.

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
        accept: Callable[[Stream], None] = lambda stream: None,
        glitches: Glitches | None = None,
        header_bytes: int | None = None,
    ) -> None:
        super().__init__(
            sock,
            client=client,
            accept=accept,
            glitches=glitches,
            header_bytes=header_bytes,
        )
        self.sock = sock
        self._greet()

    def open(self, headers: Headers) -> Stream:
        """Begin a call.

        Args:
            headers: The headers of the request.

        Returns:
            Its stream.
        """
        self._last += 2
        self.is_going_away = (
            self.is_going_away or self._last + 2 > frames.LARGEST_WINDOW
        )
        self._settle()
        self.stream = Stream(self._last, self._first_window, self._share)
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
        longest = self._sender.longest
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
        stream.outbox.extend([view for view in views if view.nbytes])
        if end and stream.outbox and isinstance(stream.outbox[-1], memoryview):
            stream.finishing = stream.closed = True
        elif end:
            last = frames.frame(Kind.DATA, frames.END_STREAM, stream.number)
            stream.outbox.append(last)
            stream.closed = True

    def reset(self, stream: Stream, code: Code) -> None:
        """Tell the peer, after what waits, that no more is wanted from it."""
        payload = frames.number(code)
        stream.outbox.append(frames.frame(Kind.RST_STREAM, 0, stream.number, payload))
        stream.closed = stream.ended = stream.abandoned = True
        stream.reader = None

    def goaway(self, code: Code = Code.NO_ERROR) -> None:
        """Tell the peer that there will be no further call."""
        self._said_goodbye = True
        last = 0 if self._client else self._last
        payload = frames.number(last) + frames.number(code)
        self._sender.control(frames.frame(Kind.GOAWAY, 0, 0, payload))

    def ping(self) -> None:
        """Ask for a sign of life."""
        self._sender.control(frames.frame(Kind.PING, 0, 0, b"curvd  ?"))

    def acknowledge(self, stream: Stream, nbytes: int) -> None:
        """Let the peer send more, because a part was used.

        Args:
            stream: Where it came from.
            nbytes: What it took on the wire.
        """
        self._glitches.parts += 1
        self._glitches.received += nbytes
        stream.unacknowledged += nbytes
        much = max(stream.unacknowledged, self._used + nbytes) >= self._share // 4
        if much and not stream.ended:
            self._sender.widen(stream.number, stream.unacknowledged)
            stream.credit += stream.unacknowledged
            stream.unacknowledged = 0
        self._spend(nbytes, now=much)

    def push(self) -> bool:
        """Send what the socket and the windows take.

        Returns:
            Whether the socket took everything that the windows allow.

        Raises:
            OSError: If the connection is gone.
        """
        return self._sender.push(self.stream)

    def pull(self) -> None:
        """Receive what the socket has, or until parts are there to be taken.

        It returns after so many frames or bytes; `more` tells whether to come back.

        Raises:
            ProtocolError: If the peer is gone, or breaks the protocol.
            OSError: If the connection is gone.
        """
        try:
            self._receiver.pull()
        except ProtocolError as error:
            stream = self.stream
            answered = self._client and stream is not None and stream.ended
            if error.code is not Code.NO_ERROR or not answered:
                raise
            self.is_going_away = True  # the server closed behind its answer

    @property
    def more(self) -> bool:
        """Whether `pull` has something to do although the socket shows nothing."""
        return self._receiver.more

    @property
    def drained(self) -> bool:
        """Whether the last `pull` left nothing in the socket."""
        return self._receiver.drained

    @property
    def bytes_received(self) -> int:
        """Bytes that came; keepalive looks whether they move."""
        return self._receiver.bytes_received

    def _greet(self) -> None:
        ours = {
            Setting.INITIAL_WINDOW_SIZE: self._share,
            Setting.MAX_FRAME_SIZE: frames.LONGEST,
            Setting.MAX_HEADER_LIST_SIZE: self._header_bytes,
            Setting.LONGEST_CHUNK: LONGEST_CHUNK,
        }
        if self._client:
            self._sender.control(frames.PREFACE)
            ours |= {Setting.ENABLE_PUSH: 0, Setting.DIRECT: 1}
        else:
            ours[Setting.MAX_CONCURRENT_STREAMS] = 1
        self._sender.control(frames.settings(ours))
        self._sender.widen(0, self._share - frames.DEFAULT_WINDOW)
