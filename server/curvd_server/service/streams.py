"""A call as its method sees it: who calls, what comes, and the way back."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any

from curvd.contract import Framed, Joined, Part, Rpc
from curvd.errors import InvalidSpec
from curvd.http2 import BufferProvider, Landed, ReceivesInPlace, not_looked_at
from curvd_server.storage import ranges

CALLER: ContextVar[str] = ContextVar("caller", default="")
"""Name of the connection of the call under way, if it carries one after the other."""
LONGEST_CHUNK: ContextVar[int] = ContextVar("longest_chunk", default=0)
"""Bytes of a chunk that the client takes in one message; 0: as long as any client does."""
Send = Callable[[Part | Joined], Awaitable[None]]
"""Sends one part of a response; waits while the client reads slowly."""


class Chunks(AsyncIterator[memoryview]):
    """The bytes of a tensor stream.

    Args:
        parts: What follows the header.
        first: A chunk that was taken off already.
    """

    def __init__(
        self, parts: AsyncIterator[Part], first: memoryview | None = None
    ) -> None:
        self._parts, self._first = parts, first

    @classmethod
    def of(cls, file: memoryview) -> Chunks:
        """Make a stream of a file that came whole.

        Args:
            file: Its bytes; none are no chunk.

        Returns:
            The stream.
        """
        return cls(_nothing(), file if file.nbytes else None)

    async def __anext__(self) -> memoryview:
        """Wait for the next chunk.

        Raises:
            StopAsyncIteration: If there is none.
            InvalidSpec: If something else comes.
        """
        first, self._first = self._first, None
        part = await anext(self._parts) if first is None else first
        if not isinstance(part, memoryview):
            msg = "after the header, a stream carries chunks only"
            raise InvalidSpec(msg)
        return part

    async def is_empty(self) -> bool:
        """Tell whether no chunk comes any more; waits until that is certain."""
        if self._first is None:
            self._first = await anext(self, None)
        return self._first is None

    @contextlib.contextmanager
    def received_into(
        self, buffer_for: BufferProvider, landed: Landed = not_looked_at
    ) -> Iterator[None]:
        """Receive chunks where they belong, if the transport can.

        Args:
            buffer_for: Finds the place of the next chunk, all before were taken.
            landed: Told how much of it is there.

        Yields:
            Nothing. Afterwards the transport does not hold what it was asked for.
        """
        if not isinstance(self._parts, ReceivesInPlace):
            yield
            return
        self._parts.buffer_for, self._parts.landed = buffer_for, landed
        try:
            yield
        finally:
            self._parts.buffer_for, self._parts.landed = _anywhere, not_looked_at


def _anywhere(nbytes: int) -> memoryview | None:
    return None


class OneMessage:
    """The parts of a response, put together into the one message of a unary RPC.

    Args:
        rpc: The RPC whose response it is.
    """

    def __init__(self, rpc: Rpc) -> None:
        self._message: Any = rpc.response.message()
        self._tensors: list[memoryview] = []

    async def send(self, part: Part | Joined) -> None:
        """Take one part."""
        if isinstance(part, tuple):
            self._tensors.extend(part)
        elif isinstance(part, memoryview):
            self._tensors.append(part)
        else:
            self._message.MergeFrom(part)

    def framed(self) -> Framed:
        """Put the parts together."""
        return Framed(self._message, tuple(self._tensors))


async def opened(requests: AsyncIterator[Part]) -> tuple[Any, Chunks]:
    """Take the header off a stream of tensors.

    Args:
        requests: Its parts.

    Returns:
        The header, and the chunks that follow.

    Raises:
        InvalidSpec: If the stream does not begin with a header.
    """
    first: Any = await anext(aiter(requests), None)
    if first is None or isinstance(first, memoryview) or not first.HasField("header"):
        msg = "the first message of the stream must be a header"
        raise InvalidSpec(msg)
    ranges.check(first)
    return first.header, Chunks(aiter(requests))


async def _nothing() -> AsyncIterator[Part]:
    return
    yield  # makes it a generator
