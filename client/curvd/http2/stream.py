"""One call on a connection, and how connections end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from curvd.errors import CurvdError, Internal
from curvd.http2.frames import Code
from curvd.http2.messages import (
    BufferProvider,
    Format,
    Landed,
    Reader,
    not_looked_at,
)

Headers = Sequence[tuple[str, str]]


class ProtocolError(Exception):
    """The connection is of no use any more.

    Args:
        why: What is wrong, for the message.
        code: What the peer is told.
    """

    def __init__(self, why: str, code: Code = Code.PROTOCOL_ERROR) -> None:
        super().__init__(why)
        self.code = code


class Stream:
    """One call.

    Args:
        number: The number of the stream.
        window: What may be sent now.
        credit: What the peer may send now.
    """

    def __init__(self, number: int, window: int, credit: int) -> None:
        self.number, self.window, self.credit = number, window, credit
        self.outbox: deque[memoryview | bytes] = deque()
        """What waits for its turn: data as views, whole frames as bytes."""
        self.inbox: deque[tuple[Any, int]] = deque()
        """Parts that came, and their bytes."""
        self.finishing = False
        """The data that waits is the last."""
        self.unacknowledged = 0
        """Bytes that were used, and of which the peer was not told yet."""
        self.received = 0
        """Bytes of data that came, without padding."""
        self.announced: int | None = None
        """Bytes of data that the peer said it would send (content-length)."""
        self.reader: Reader | None = None
        """What cuts the data; None: nobody wants it."""
        self.headers: dict[str, str] | None = None
        self.trailers: dict[str, str] | None = None
        self.ended = False
        """Nothing more comes, or nobody wants more."""
        self.ended_by_peer = False
        self.closed = False
        """We send no more."""
        self.abandoned = False
        """We told the peer to stop: what it sent before it knew is ignored."""
        self.reset_code: int | None = None
        """Code with which the call was cut off, by the peer or for what the peer did."""
        self.failure: CurvdError | None = None
        """Why what came cannot be read."""
        self.on_reset: Callable[[], object] | None = None
        """Called once, at the moment of the reset: whoever works for this call stops."""

    def read(
        self,
        format_: Format,
        longest: int,
        buffer_for: BufferProvider,
        longest_chunk: int = 0,
        landed: Landed = not_looked_at,
    ) -> None:
        """Say how to read what comes.

        Args:
            format_: How messages are written.
            longest: Bytes of a message that are accepted.
            buffer_for: Finds the place of a chunk.
            longest_chunk: Bytes of a chunk that are, if more.
            landed: Told what came to such a place.
        """
        self.reader = Reader(
            format_,
            longest,
            self.inbox,
            buffer_for,
            longest_chunk=longest_chunk,
            landed=landed,
        )

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        done = self.ended and self.closed and not self.outbox
        return self.reset_code is not None or done

    def end(self) -> None:
        """Take note that the peer has sent all."""
        self.ended = self.ended_by_peer = True
        if self.reader is not None and not self.reader.between:
            msg = "the data ends within a message"
            self.failure, self.reader = Internal(msg), None

    def reset(self, code: int) -> None:
        """Take note that the call was cut off.

        Args:
            code: Why.
        """
        if self.reset_code is not None:
            return
        self.reset_code = code
        self.ended = self.closed = True
        self.outbox.clear()
        if self.on_reset is not None:
            self.on_reset()
