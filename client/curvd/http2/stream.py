"""One call on a connection, and how connections end."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from curvd.errors import CurvdError
from curvd.http2.frames import Code
from curvd.http2.messages import Format, Reader, Room

Headers = Sequence[tuple[str, str]]


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
    """One call.

    Args:
        number: Of the stream.
        window: What may be sent now.
    """

    def __init__(self, number: int, window: int) -> None:
        self.number, self.window = number, window
        self.outbox: deque[memoryview | bytes] = deque()
        """What waits for its turn: data as views, whole frames as bytes."""
        self.inbox: deque[tuple[Any, int]] = deque()
        """Parts that came, and their bytes."""
        self.finishing = False
        """The data that waits is the last."""
        self.used = 0
        """Bytes that were used, and of which the peer was not told yet."""
        self.reader: Reader | None = None
        """What cuts the data; None: nobody wants it."""
        self.headers: dict[str, str] | None = None
        self.trailers: dict[str, str] | None = None
        self.ended = False
        """Nothing more comes, or nobody wants more."""
        self.ended_by_peer = False
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

    def end(self) -> None:
        """Take note that the peer has sent all.

        Raises:
            Broken: If a message is cut.
        """
        self.ended = self.ended_by_peer = True
        if self.reader is not None and not self.reader.between:
            msg = "a stream ends within a message"
            raise Broken(msg)

    def give_up(self, code: int) -> None:
        """Take note that the peer gave up.

        Args:
            code: Why.
        """
        self.reset = code
        self.ended = self.ended_by_peer = self.closed = True
        self.outbox.clear()
