"""The parts of one request, as they come on a connection of a client of ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from curvd.errors import CurvdError
from curvd.http2 import ReceivesInPlace, Stream, not_looked_at
from curvd_server.transport.connection import ServerConnection


class Requests(ReceivesInPlace, AsyncIterator[Any]):
    """The parts of one request.

    Args:
        connection: Where they come from.
        stream: The call.
    """

    def __init__(self, connection: ServerConnection, stream: Stream) -> None:
        self._connection, self._stream = connection, stream
        self.buffer_for, self.landed = _anywhere, not_looked_at

    @property
    def is_here(self) -> bool:
        """Whether the next part has come."""
        return bool(self._stream.inbox)

    def place(self, nbytes: int) -> memoryview | None:
        """Find the place of the next chunk."""
        return self.buffer_for(nbytes)

    def look(self, nbytes: int) -> None:
        """Look at what came to that place."""
        self.landed(nbytes)

    async def __anext__(self) -> Any:
        """Wait for the next part.

        Raises:
            StopAsyncIteration: If there is none.
            CurvdError: If it cannot be read.
            asyncio.CancelledError: If the client is gone.
        """
        stream = self._stream
        await self._connection.until(self._has_news)
        if not stream.inbox:
            if self._connection.is_lost(stream):
                raise asyncio.CancelledError
            if stream.failure is not None:
                raise _again(stream.failure)
            raise StopAsyncIteration
        part, nbytes = stream.inbox.popleft()
        self._connection.acknowledge(stream, nbytes)
        return part

    def _has_news(self) -> bool:
        stream = self._stream
        over = stream.ended or stream.failure is not None
        return bool(stream.inbox) or over or self._connection.is_lost(stream)


def _anywhere(nbytes: int) -> memoryview | None:
    return None


def _again(error: CurvdError) -> CurvdError:
    again = type(error)(str(error))
    again.metadata = error.metadata
    return again
