"""Where a result goes: to the client, or into the session.

A sink is chosen once, from the header of the request. It judges the shape before anything
is computed, and then takes blocks of the result as they are ready, and a summary.
"""

from __future__ import annotations

import asyncio
import math
import zlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from curvd.http2 import joined
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd_server.service.result_encoding import Format
from curvd_server.service.streams import LONGEST_CHUNK, Send
from curvd_server.sessions import Vector, Vectors

Columns = NDArray[Any]


class Sink(Protocol):
    """Takes a result, block by block."""

    def expect(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Judge a result before anything is computed.

        Args:
            shape: [P] or [K, P].
            dtype: Element type of the blocks.

        Raises:
            LimitExceeded: If there is no room for it.
        """

    async def begin(self, header: curvature_pb.ResultHeader) -> None:
        """Take note of where the result comes from; called before any block."""

    async def take(self, rows: Columns, summary: curvature_pb.ResultSummary) -> None:
        """Take the next block; waits while a client reads slowly.

        Args:
            rows: [k, P].
            summary: What the result took until now.
        """

    async def end(self, summary: curvature_pb.ResultSummary) -> None:
        """Finish, after the last block.

        Args:
            summary: What the result took.
        """


class StreamSink:
    """Sends a result to the client, from the byte where the client needs it.

    Args:
        send: Sends one part.
        format_: How the result travels.
    """

    def __init__(self, send: Send, format_: Format) -> None:
        self._send, self._format = send, format_
        self._shape: tuple[int, ...] = ()
        self._header = curvature_pb.ResultHeader()
        self._crc = 0

    def expect(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Refuse a result that does not fit into the one message that it must fit into."""
        self._format.check_size(math.prod(shape) * dtype.itemsize)
        self._shape = shape

    async def begin(self, header: curvature_pb.ResultHeader) -> None:
        """Send what comes before the payload, unless it says where the payload goes on."""
        self._header = header
        if not self._format.is_resumed:
            await self._head(0)

    async def take(self, rows: Columns, summary: curvature_pb.ResultSummary) -> None:
        """Send a block; of a result that goes on, what is missing of its only one."""
        if not self._format.is_resumed:
            for part in joined(self._summed(rows), LONGEST_CHUNK.get):
                await self._send(part)
            return
        offset = await asyncio.to_thread(self._format.offset_in, rows)
        await self._head(offset)
        if self._format.checksum:
            self._crc = await asyncio.to_thread(self._format.crc_of, rows)
        for part in joined(self._format.payload(rows, offset), LONGEST_CHUNK.get):
            await self._send(part)

    def _summed(self, rows: Columns) -> Iterator[memoryview]:
        """Cut a block into chunks, and add each to the checksum."""
        for chunk in self._format.payload(rows):
            if self._format.checksum:
                self._crc = zlib.crc32(chunk, self._crc)
            yield chunk

    async def end(self, summary: curvature_pb.ResultSummary) -> None:
        """Send the summary."""
        await self._send(self._format.summary(summary, self._crc))

    async def _head(self, offset: int) -> None:
        message = self._format.message(header=self._header)
        message.header.offset = offset
        await self._send(message)
        await self._send(self._format.safetensors_header(self._shape))


class StoreSink:
    """Stores a result in the session; the client is told where it is from, and the cost.

    Args:
        vectors: What the session stores.
        name: The name of the vector.
        request_id: The id of the request that makes it.
        content: What that request asked for.
        send: Sends one part.
        format_: The messages of the response.
    """

    def __init__(
        self,
        vectors: Vectors,
        name: str,
        request_id: str,
        content: str,
        send: Send,
        format_: Format,
    ) -> None:
        self._vectors, self._name = vectors, name
        self._request_id, self._content = request_id, content
        self._send, self._format = send, format_
        self._array: Columns = np.empty(0)
        self._version = self._filled = 0

    def expect(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Make room for the vector."""
        self._vectors.check_room(self._name, math.prod(shape) * dtype.itemsize)
        self._array = np.empty(shape, dtype)

    async def begin(self, header: curvature_pb.ResultHeader) -> None:
        """Send only the header, of a result that stays here."""
        self._version = header.version
        await self._send(self._format.message(header=header))

    async def take(self, rows: Columns, summary: curvature_pb.ResultSummary) -> None:
        """Copy a block to its place."""
        start, self._filled = self._filled, self._filled + len(rows)
        self._array.reshape(-1, rows.shape[1])[start : self._filled] = rows

    async def end(self, summary: curvature_pb.ResultSummary) -> None:
        """Store the vector, and send the summary."""
        vector = Vector(self._array, self._version, self._request_id, self._content)
        self._vectors.put(self._name, vector)
        await self._send(self._format.summary(summary))


class StoredBefore:
    """Tells the client about a vector that an earlier attempt stored.

    Args:
        vector: The vector.
        send: Sends one part.
        format_: The messages of the response.
    """

    def __init__(self, vector: Vector, send: Send, format_: Format) -> None:
        self._vector, self._send, self._format = vector, send, format_

    def expect(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Do nothing: there is nothing to compute."""

    async def begin(self, header: curvature_pb.ResultHeader) -> None:
        """Send the header, with the version that the vector was made at."""
        message = self._format.message(header=header)
        message.header.version = self._vector.version
        await self._send(message)

    async def take(self, rows: Columns, summary: curvature_pb.ResultSummary) -> None:
        """Do nothing: the vector is there."""

    async def end(self, summary: curvature_pb.ResultSummary) -> None:
        """Send the summary."""
        await self._send(self._format.summary(summary))


async def deliver(
    sink: Sink,
    header: curvature_pb.ResultHeader,
    result: Columns,
    summary: curvature_pb.ResultSummary,
) -> None:
    """Give a sink a result that is there as a whole.

    Args:
        sink: Where it goes.
        header: Where it comes from.
        result: [P] or [K, P].
        summary: What it took.
    """
    sink.expect(result.shape, result.dtype)
    await sink.begin(header)
    await sink.take(result.reshape(-1, result.shape[-1]), summary)
    await sink.end(summary)
