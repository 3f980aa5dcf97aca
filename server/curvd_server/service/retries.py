"""Requests that come again: their results are kept, and not computed twice.

A source around a source recognises the operand, and a sink around a sink keeps the
result, or gives out what an earlier attempt left. Only an operand of one block is
recognised; of others, the client asks for the columns that are missing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvd.tensors import Buffer
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd_server.service.dependencies import off_the_loop
from curvd_server.service.result_cache import (
    CachedResult,
    Content,
    Fingerprint,
    Key,
    ResultCache,
    fingerprint,
)
from curvd_server.service.sinks import Sink
from curvd_server.service.sources import Announce, Source
from curvd_server.service.streams import CALLER

Columns = NDArray[Any]

_SOON_SENT_BYTES = 32 << 20
"""A result up to here may be lost in buffers on its way, although all of it was sent;
a larger one is kept only until then."""


class Attempt:
    """One attempt at a request: what its source and its sink know together.

    Args:
        results: Those of earlier attempts.
        key: The key of the request.
        content: What it asks for, without the operand.
        version: The version of the parameters; results of others do not count.
    """

    def __init__(
        self, results: ResultCache, key: Key, content: Content, version: int
    ) -> None:
        self._results, self._key = results, key
        self._content, self._version = content, version
        self._seen = Fingerprint()
        self._fingerprint: asyncio.Future[str] | None = None
        self._nbytes = 0
        self.shape: tuple[int, ...] = ()
        self.found: CachedResult | None = None
        """The result, if an earlier attempt left it."""

    def expect(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Take note of how large the operand is, and its result."""
        self.shape, self._nbytes = shape, math.prod(shape) * dtype.itemsize

    def arrived(self, block: Buffer, stop: int) -> None:
        """Look at what came of a block while it is in the processor's cache.

        Args:
            block: The memory of the block.
            stop: How many of its bytes have come.
        """
        if block.nbytes == self._nbytes and self._results.fits(block.nbytes):
            self._seen.update(block, stop)

    @property
    def is_told_apart(self) -> bool:
        """Whether the operand has its fingerprint, or will have none."""
        return self._fingerprint is None or self._fingerprint.done()

    def covers(self, block: Columns) -> bool:
        """Tell whether a block is all there is, and small enough to be kept."""
        whole = block.size == math.prod(self.shape)
        return whole and self._results.fits(block.nbytes)

    async def find(self, columns: Columns) -> bool:
        """Look for the result of an operand.

        Args:
            columns: All of it. If it did not arrive as it is, its fingerprint is computed
                while the device computes, unless something is kept that it must be
                compared with.

        Returns:
            Whether the result is found.

        Raises:
            RequestIdReused: If the same id asked for something else.
        """
        if self._seen.nbytes == columns.nbytes:
            self._fingerprint = asyncio.get_running_loop().create_future()
            raw = columns.reshape(-1).view(np.uint8)
            self._fingerprint.set_result(self._seen.digits(raw))
        else:
            self._fingerprint = asyncio.create_task(off_the_loop(fingerprint, columns))
        if self._key in self._results:
            found = self._results.get(self._key, await self._whole_content())
            if found is not None and found.header.version == self._version:
                self.found = found
        return self.found is not None

    async def keep(self, result: CachedResult) -> None:
        """Keep the result for the next attempt."""
        content, nbytes = await self._whole_content(), result.rows.nbytes
        self._results.put(self._key, content, result, nbytes, CALLER.get())

    def drop(self) -> None:
        """Forget the result; the client has it."""
        self._results.drop(self._key)

    async def _whole_content(self) -> Content:
        assert self._fingerprint is not None
        return Content(self._content.header, await self._fingerprint)


class RecognisingSource:
    """Ends before a block whose product is known already.

    Args:
        source: Where the operand comes from.
        attempt: Told the operand.
    """

    def __init__(self, source: Source, attempt: Attempt) -> None:
        self._source, self._attempt = source, attempt

    @property
    def reusable(self) -> bool:
        """Whether a block may be overwritten: not before it has its fingerprint."""
        return self._source.reusable and self._attempt.is_told_apart

    async def blocks(self, announce: Announce) -> AsyncIterator[Columns]:
        """Yield the operand's columns: [k, P].

        Args:
            announce: Told the shape first.
        """
        async for columns in self._source.blocks(announce):
            if self._attempt.covers(columns) and await self._attempt.find(columns):
                return
            yield columns
            del columns


class KeepingSink:
    """Keeps a result before it leaves, for whoever loses it on its way.

    Args:
        sink: Where it goes.
        attempt: Given the result.
    """

    def __init__(self, sink: Sink, attempt: Attempt) -> None:
        self._sink, self._attempt = sink, attempt
        self._header = curvature_pb.ResultHeader()

    def expect(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Take note of the shape."""
        self._attempt.expect(shape, dtype)
        self._sink.expect(shape, dtype)

    async def begin(self, header: curvature_pb.ResultHeader) -> None:
        """Take note of the header."""
        self._header = header
        await self._sink.begin(header)

    async def take(self, rows: Columns, summary: curvature_pb.ResultSummary) -> None:
        """Keep the only block, and pass it on meanwhile."""
        keeping: asyncio.Task[None] | None = None
        if self._attempt.covers(rows):
            result = CachedResult(
                self._header, rows.reshape(self._attempt.shape), summary
            )
            keeping = asyncio.create_task(self._attempt.keep(result))
        try:
            await self._sink.take(rows, summary)
        finally:  # whoever lost the stream is whom it is kept for
            if keeping is not None:
                await keeping
        # Let go before the last message leaves: the client may come back at once, and
        # its next vector fits into the memory of this one.
        if rows.nbytes > _SOON_SENT_BYTES:
            self._attempt.drop()

    async def end(self, summary: curvature_pb.ResultSummary) -> None:
        """Pass on what an earlier attempt left, and the summary."""
        found = self._attempt.found
        if found is not None:
            size = found.rows.shape[-1]
            await self._sink.take(found.rows.reshape(-1, size), found.summary)
            summary = found.summary
        await self._sink.end(summary)
