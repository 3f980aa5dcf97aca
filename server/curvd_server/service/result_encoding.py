"""How a result travels: its element type, where it goes on, and its checksum."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvd.contract import Rpc
from curvd.errors import InvalidSpec
from curvd.tensors import chunks, half_precision
from curvd.tensors import safetensors_header as tensorfile
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd_server.service import validation

Columns = NDArray[Any]

OWN_TYPE = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64"}
"""safetensors element types of the sessions' vectors."""


@dataclass(frozen=True, slots=True)
class Format:
    """How one result travels."""

    dtype: str
    """safetensors element type."""
    rpc: Rpc
    """Whose responses carry it."""
    resume: curvature_pb.Resume | None = None
    """What the caller has already."""
    checksum: bool = False

    @classmethod
    def of(cls, request: Any, rpc: Rpc, own: np.dtype[Any]) -> Format:
        """Read it off a request.

        Args:
            request: A message with the fields `resume` and `checksum`, perhaps
                `result_type`.
            rpc: The RPC whose request it is.
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
        return cls(dtype, rpc, resume, request.checksum)

    @property
    def is_resumed(self) -> bool:
        """Whether the caller has some of the result."""
        return self.resume is not None and self.resume.offset > 0

    def check_size(self, nbytes: int) -> None:
        """Refuse a result that must fit into one message, and does not.

        Args:
            nbytes: Its size.

        Raises:
            LimitExceeded: If it is larger.
        """
        if self.rpc.response.framed:
            validation.check_message(nbytes)

    def message(self, **fields: Any) -> Any:
        """Make a message of the response.

        Args:
            fields: Its fields.

        Returns:
            The message.
        """
        return self.rpc.response.message(**fields)

    def summary(self, summary: curvature_pb.ResultSummary, crc: int = 0) -> Any:
        """Make the message that ends the response.

        Args:
            summary: What the result took.
            crc: Checksum of its payload.

        Returns:
            The message; with the checksum if that was asked for.
        """
        message = self.message(summary=summary)
        if self.checksum:
            message.summary.crc32 = crc
        return message

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

    def crc_of(self, rows: Columns) -> int:
        """Compute the checksum of a whole payload.

        Args:
            rows: The whole result.

        Returns:
            Its CRC-32.
        """
        crc = 0
        for chunk in self.payload(rows):
            crc = zlib.crc32(chunk, crc)
        return crc
