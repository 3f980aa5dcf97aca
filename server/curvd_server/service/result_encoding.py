"""Sending a result: its element type, where it goes on, and its checksum."""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvd.errors import InvalidSpec
from curvd.tensors import chunks, half_precision
from curvd.tensors import safetensors_header as tensorfile
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd_server.service.handlers import Send

Columns = NDArray[Any]

OWN_TYPE = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64"}
"""safetensors element types of the sessions' vectors."""


@dataclass(frozen=True, slots=True)
class Format:
    """How one result travels."""

    dtype: str
    """safetensors element type."""
    message: Any
    """Class of the stream's messages."""
    resume: curvature_pb.Resume | None = None
    """What the caller has already."""
    checksum: bool = False

    @classmethod
    def of(cls, request: Any, message: Any, own: np.dtype[Any]) -> Format:
        """Read it off a request.

        Args:
            request: A message with the fields `resume` and `checksum`, perhaps
                `result_type`.
            message: Class of the stream's messages.
            own: The session's vector type.

        Returns:
            The format.

        Raises:
            InvalidSpec: If a field makes no sense.
        """
        own_type = OWN_TYPE[own]
        dtype = getattr(request, "result_type", "") or own_type
        if dtype not in (own_type, *half_precision.NARROW):
            known = ", ".join((own_type, *half_precision.NARROW))
            msg = (
                f"result_type {dtype!r} is not offered in this session; known: {known}"
            )
            raise InvalidSpec(msg, result_type=dtype)
        resume = request.resume if request.HasField("resume") else None
        if resume is not None and resume.offset < 0:
            msg = f"resume.offset must not be negative, got {resume.offset}"
            raise InvalidSpec(msg, offset=resume.offset)
        return cls(dtype, message, resume, request.checksum)

    @property
    def is_taken_up(self) -> bool:
        """Whether the caller has some of the result."""
        return self.resume is not None and self.resume.offset > 0

    def safetensors_header(self, shape: tuple[int, ...]) -> memoryview:
        """Describe the result's file.

        Args:
            shape: [P] or [K, P].

        Returns:
            The first chunk.
        """
        return memoryview(tensorfile.dump_one("result", self.dtype, shape))

    def payload(self, rows: Columns, offset: int = 0) -> Iterator[memoryview]:
        """Cut values into chunks, in the type of the wire.

        Args:
            rows: Contiguous, in the session's own type.
            offset: Bytes to leave out.

        Yields:
            The chunks.
        """
        if self.dtype not in half_precision.NARROW:
            yield from chunks.pieces(chunks.bytes_of(rows)[offset:])
            return
        flat, step = rows.reshape(-1), chunks.CHUNK_BYTES // half_precision.ITEM_BYTES
        skipped, cut = divmod(offset, half_precision.ITEM_BYTES)
        for start in range(skipped, flat.size, step):
            bits = half_precision.narrow(flat[start : start + step], self.dtype)
            yield chunks.bytes_of(bits)[cut if start == skipped else 0 :]

    def offset_in(self, rows: Columns) -> int:
        """Find out how much of a result the caller has; slow for large ones.

        Args:
            rows: The whole result.

        Returns:
            Bytes to leave out: none if what the caller has begins otherwise.
        """
        if self.resume is None or not self.resume.offset:
            return 0
        missing, sha = self.resume.offset, hashlib.sha256()
        for chunk in self.payload(rows):
            if missing <= 0:
                break
            sha.update(chunk[:missing])
            missing -= chunk.nbytes
        proven = missing <= 0 and sha.digest() == self.resume.sha256
        return self.resume.offset if proven else 0


class Sender:
    """Sends one result, and keeps its checksum.

    Args:
        send: Sends one part.
        format_: How.
    """

    def __init__(self, send: Send, format_: Format) -> None:
        self._send, self._format = send, format_
        self._crc = 0

    async def head(
        self, header: curvature_pb.ResultHeader, shape: tuple[int, ...], offset: int = 0
    ) -> None:
        """Send what comes before the payload.

        Args:
            header: What was computed.
            shape: [P] or [K, P].
            offset: Bytes of the payload that will be left out.
        """
        header.offset = offset
        await self._send(self._format.message(header=header))
        await self._send(self._format.safetensors_header(shape))

    async def bare(self, header: curvature_pb.ResultHeader) -> None:
        """Send only the header, of a result that stays here."""
        await self._send(self._format.message(header=header))

    async def rows(self, rows: Columns, offset: int = 0) -> None:
        """Send values.

        Args:
            rows: The next ones.
            offset: Bytes of them to leave out.
        """
        if self._format.checksum and offset:
            self._crc = await asyncio.to_thread(self._crc_of, rows)
        for chunk in self._format.payload(rows, offset):
            if self._format.checksum and not offset:
                self._crc = zlib.crc32(chunk, self._crc)
            await self._send(chunk)

    async def end(self, summary: curvature_pb.ResultSummary) -> None:
        """Send the summary.

        Args:
            summary: How it went.
        """
        if self._format.checksum:
            summary.crc32 = self._crc
        await self._send(self._format.message(summary=summary))

    async def whole(
        self,
        header: curvature_pb.ResultHeader,
        rows: Columns,
        summary: curvature_pb.ResultSummary,
    ) -> None:
        """Send a result that is there as a whole, from where the caller needs it.

        Args:
            header: What was computed.
            rows: [P] or [K, P].
            summary: How it went.
        """
        offset = 0
        if self._format.is_taken_up:
            offset = await asyncio.to_thread(self._format.offset_in, rows)
        await self.head(header, rows.shape, offset)
        await self.rows(rows, offset)
        await self.end(summary)

    def _crc_of(self, rows: Columns) -> int:
        crc = self._crc
        for chunk in self._format.payload(rows):
            crc = zlib.crc32(chunk, crc)
        return crc
