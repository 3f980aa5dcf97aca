"""The sending half of a connection: frames out of the caller's memory."""

from __future__ import annotations

import ssl
from collections import deque
from itertools import islice
from socket import socket

from curvd.http2 import frames
from curvd.http2.frames import Code, Kind
from curvd.http2.glitches import Glitches
from curvd.http2.stream import ProtocolError, Stream

_SMALL_BYTES = 1 << 12
"""Bytes that are copied behind the head of their frame."""
_VIEWS = 32
"""Pieces of memory in one call of the system."""
_TLS_BYTES = 1 << 18
_MOST_ANSWERS = 1000
"""Control frames of ours that wait; a peer that provokes more is hostile."""


class Sender:
    """Frames that are on their way, and what the peer takes.

    Args:
        sock: Non-blocking.
        glitches: Is told how much was sent.
    """

    def __init__(self, sock: socket, glitches: Glitches) -> None:
        self._glitches = glitches
        self._sock, self._tls = sock, isinstance(sock, ssl.SSLSocket)
        self._out: deque[memoryview] = deque()
        self.window = frames.DEFAULT_WINDOW
        """Bytes of data that the peer takes now, on all streams."""
        self.longest = frames.DEFAULT_LONGEST
        """Payload that it takes in one frame."""

    def control(self, frame: bytes) -> None:
        """Send a frame before what waits in streams.

        Args:
            frame: All of it.

        Raises:
            ProtocolError: If the peer provokes answers and does not read them.
        """
        if len(self._out) > _MOST_ANSWERS:
            msg = "the peer provokes answers and does not read them"
            raise ProtocolError(msg, Code.ENHANCE_YOUR_CALM)
        self._out.append(memoryview(frame))

    def widen(self, stream: int, increment: int) -> None:
        """Let the peer send more.

        Args:
            stream: 0 for all together.
            increment: Bytes.
        """
        payload = frames.number(increment)
        self.control(frames.frame(Kind.WINDOW_UPDATE, 0, stream, payload))

    def reset(self, stream: int, code: Code) -> None:
        """Tell the peer that a stream is cut off.

        Args:
            stream: The stream.
            code: Why.
        """
        payload = frames.number(code)
        self.control(frames.frame(Kind.RST_STREAM, 0, stream, payload))

    def push(self, stream: Stream | None) -> bool:
        """Send what the socket and the windows take.

        Args:
            stream: The stream whose outbox to empty.

        Returns:
            Whether the socket took everything that the windows allow.

        Raises:
            OSError: If the connection is gone.
        """
        while self._fill(stream):
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

    def _fill(self, stream: Stream | None) -> bool:
        """Frame what the windows allow; tell whether anything is to be sent."""
        while stream and stream.outbox and len(self._out) < _VIEWS:
            first = stream.outbox[0]
            if not isinstance(first, memoryview):
                self._out.append(memoryview(first))
                stream.outbox.popleft()
                continue
            size = min(self.longest, self.window, stream.window)
            if size <= 0:
                break
            taken = self._frame(stream, size)
            self.window -= taken
            stream.window -= taken
            self._glitches.sent += taken
        return bool(self._out)

    def _frame(self, stream: Stream, size: int) -> int:
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
        flags = frames.END_STREAM if stream.finishing and not outbox else 0
        head = frames.head(total, Kind.DATA, flags, stream.number)
        if views[0].nbytes < _SMALL_BYTES:
            views[0] = memoryview(head + views[0])
        else:
            views.insert(0, memoryview(head))
        self._out.extend(views)
        return total

    def _send(self) -> int | None:
        try:
            if self._tls:
                # The same bytes again after "want": that is OpenSSL's rule.
                return self._sock.send(self._out[0][:_TLS_BYTES])
            return self._sock.sendmsg(list(islice(self._out, _VIEWS)))
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
