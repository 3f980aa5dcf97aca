"""Calls whose result is one tensor: products, gradients, and vectors that are stored.

What has arrived of a result stays where it is, whatever breaks: the next attempt asks
for the rest. A vector goes on at a byte, a matrix at a column.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from curvd._calls.base import Call, Unary
from curvd.contract import Framed, Part, Rpc, convert, infos
from curvd.errors import (
    CurvdError,
    Internal,
    ResultNotKept,
    Unavailable,
)
from curvd.tensors import (
    ITEM_BYTES,
    NARROW,
    Array,
    Buffer,
    Operand,
    chunks,
    narrow,
    safetensors_header,
    widen,
)

T = TypeVar("T")

OWN_TYPE = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64"}
"""safetensors element types of vectors."""


@dataclass(frozen=True, slots=True)
class Wanted(Generic[T]):
    """The result that a call is to bring."""

    shape: tuple[int, ...] | None
    """[P] or [K, P]; None if it stays on the server."""
    dtype: np.dtype[Any]
    finish: Callable[[Array], T]
    """Makes the result from the values; called with no elements if they stay there."""
    wire_type: str = ""
    """safetensors element type in which operand and result travel; empty: their own."""
    verify: bool = False
    """Whether to check its CRC-32 even if no stream broke."""

    @property
    def travels_as(self) -> str:
        """Element type on the wire, in the words of safetensors."""
        return self.wire_type or OWN_TYPE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return 0 if self.shape is None else self.bytes_of(self.shape)

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """Tell how many bytes an array of this type takes on the wire."""
        return math.prod(shape) * safetensors_header.ITEM_BYTES[self.travels_as]

    def read(self, raw: Buffer, allocate: Callable[[int], Buffer]) -> T:
        """Make the result from what travelled.

        Args:
            raw: The payload.
            allocate: Finds memory.

        Returns:
            The result.
        """
        if self.shape is None:
            return self.finish(np.empty(0, self.dtype))
        values = widened(raw, self.travels_as, self.dtype, allocate)
        return self.finish(values.reshape(self.shape))


class TensorStream(Call[T]):
    """A stream that ends with the tensor ``result``.

    Args:
        rpc: The method.
        header: What to compute.
        operand: What to send; None if nothing travels.
        wanted: The result.
    """

    def __init__(
        self, rpc: Rpc, header: Any, operand: Operand | None, wanted: Wanted[T]
    ) -> None:
        super().__init__(rpc)
        self._header, self._operand, self.wanted = header, operand, wanted
        self._raw: Buffer = np.empty(0, np.uint8)
        self._held = 0
        """Bytes of the payload that were there when the attempt began."""
        self._first = 0
        """Columns of the operand that are not sent, because their results are there."""
        self._operand_sent = False
        self._assembler: chunks.Assembler | None = None
        self.info: infos.ResultInfo | None = None

    def restart(self) -> None:
        """Take stock of what is there, and ask for the rest."""
        super().restart()
        self._held += self._arrived()
        self._assembler = None
        self._result_header: Any = None
        self._summary: Any = None
        self._resume()

    def recovers(self, error: BaseException) -> bool:
        """Send the operand again if the server has forgotten its result."""
        if isinstance(error, ResultNotKept) and self._operand_sent:
            self._operand_sent = False
            return True
        return False

    def feed(self, part: Any) -> Iterator[Any]:
        """Receive the next bytes in place.

        Yields:
            Nothing: the result is handed out at the end.

        Raises:
            Internal: If the server breaks the contract.
        """
        try:
            if isinstance(part, memoryview):
                self._assembler = self._assembler or self._receiver()
                for _ in self._assembler.feed(part):
                    pass
                self.progressed()
            else:
                self._message(part)
        except CurvdError as error:
            raise self._malformed(error) from error
        yield from ()

    def buffer_for(self, nbytes: int) -> memoryview | None:
        """Find the place of the next chunk in the result."""
        return None if self._assembler is None else self._assembler.buffer_for(nbytes)

    def conclude(self) -> None:
        """Check that nothing is missing or damaged.

        Raises:
            Internal: If something is missing.
            Unavailable: If something is damaged; all of it is asked for again.
        """
        if self._result_header is None or self._summary is None:
            why = "the header or the summary is missing"
            raise self._malformed(why)
        try:
            self._finish()
            self.info = convert.result_from_proto(self._result_header, self._summary)
        except CurvdError as error:
            raise self._malformed(error) from error
        summary = self._summary
        if summary.HasField("crc32") and summary.crc32 != zlib.crc32(
            self._payload().data
        ):
            self._held, self._assembler, self._operand_sent = 0, None, False
            msg = f"the result of {self.rpc.name} arrived damaged"
            raise Unavailable(msg)
        self.done = True

    def result(self) -> T:
        """Lay out the values as the caller wants them."""
        return self.wanted.read(self._raw, self.allocate)

    def _resume(self) -> None:
        """Say in the header what is there already."""
        self._header.checksum = self.wanted.verify or self._held > 0
        self._header.ClearField("resume")
        if self._held or (self._operand_sent and self.attempts > 1):
            self._header.resume.offset = self._held
            prefix = hashlib.sha256(self._raw[: self._held].data)
            self._header.resume.sha256 = prefix.digest()

    def _message(self, part: Any) -> None:
        kind = part.WhichOneof("part")
        if kind == "header":
            self._result_header = getattr(part, kind)
            self._leave_out(self._result_header.offset)
        elif kind == "summary":
            self._summary = getattr(part, kind)

    def _arrived(self) -> int:
        """Payload of this attempt that stays."""
        return 0 if self._assembler is None else self._assembler.received_bytes

    def _leave_out(self, nbytes: int) -> None:
        """Go on where the server does: where we asked for, or at the beginning."""
        if not 0 <= nbytes <= self._held:
            why = f"it leaves out {nbytes} bytes of {self._held} that are here"
            raise self._malformed(why)
        self._held = nbytes

    def _receiver(self) -> chunks.Assembler:
        return self._receiving(self.wanted.shape, offset=self._held)

    def _receiving(
        self, shape: tuple[int, ...] | None, offset: int = 0
    ) -> chunks.Assembler:
        """Make what receives a tensor behind the bytes that are there."""
        if self._raw.nbytes != self.wanted.nbytes:
            self._raw = self.allocate(self.wanted.nbytes)
        # The functions do not refer to the call: a cycle would keep every result until
        # the garbage collector finds it.
        room = self._raw[self._held :]
        return chunks.Assembler(
            expecting(self.rpc, self.wanted.travels_as, shape),
            max_bytes=self.wanted.nbytes,
            allocate=lambda nbytes: room,
            offset=offset,
        )

    def _payload(self) -> Buffer:
        """What the checksum is of."""
        return self._raw

    def _request(self) -> Iterator[Part]:
        if not self.rpc.client_streams:
            yield self._header
            return
        yield self.rpc.request.message(header=self._header)
        # Once it was sent, the server may have the result.
        if self._operand is not None and not (
            self._operand_sent and self._header.HasField("resume")
        ):
            yield from file_of(self._operand, self.wanted.travels_as, self._first)
            self._operand_sent = True

    def _finish(self) -> None:
        """Make sure that all of the tensor is there."""
        if self.wanted.shape is not None:
            (self._assembler or self._receiver()).finish()

    def _malformed(self, why: object) -> Internal:
        msg = f"the server's answer to {self.rpc.name} breaks the contract: {why}"
        return Internal(msg, rpc=self.rpc.name)


class SmallProduct(TensorStream[T]):
    """A product in one message each way.

    Args:
        rpc: Multiply.
        header: What to compute.
        operand: What to multiply; None if it does not travel.
        wanted: The result.
    """

    def feed(self, part: Framed) -> Iterator[Any]:
        """Take the response apart."""
        response = part.message
        if response.HasField("header"):
            self._result_header = response.header
        if response.HasField("summary"):
            self._summary = response.summary
        for tensors in part.tensors:
            if tensors.nbytes and not self._took(tensors):
                yield from super().feed(tensors)

    def _took(self, file: memoryview) -> bool:
        """Take a result that is one whole file; anything else is for the assembler."""
        try:
            found = chunks.whole(file)
            if found is None:
                return False
            header, payload = found
            expecting(self.rpc, self.wanted.travels_as, self.wanted.shape)(header)
        except CurvdError as error:
            raise self._malformed(error) from error
        size = safetensors_header.ITEM_BYTES[self.wanted.travels_as]
        carrier = np.dtype(f"u{size}")
        self._raw = chunks.values_of(payload, carrier, self.allocate).view(np.uint8)
        self._is_whole = True
        self.progressed()
        return True

    def _finish(self) -> None:
        if not self._is_whole:
            super()._finish()

    def _resume(self) -> None:
        # The server still has the result under the request's id; all of it comes again.
        self._held, self._is_whole = 0, False
        self._header.checksum = self.wanted.verify

    def _request(self) -> Iterator[Any]:
        tensors: tuple[memoryview, ...] = ()
        if self._operand is not None:
            tensors = tuple(file_of(self._operand, self.wanted.travels_as))
        yield Framed(self.rpc.request.message(header=self._header), tensors)


class PutVector(Unary[T]):
    """A stream of one tensor, answered by a message.

    Args:
        rpc: PutVector.
        header: Where it belongs.
        operand: The tensor.
        wire_type: Element type in which it travels.
        read: Makes the result from the response.
    """

    def __init__(
        self,
        rpc: Rpc,
        header: Any,
        operand: Operand,
        wire_type: str,
        read: Callable[[Any], T],
    ) -> None:
        super().__init__(rpc, rpc.request.message(header=header), read)
        self._operand, self._wire_type = operand, wire_type

    def _request(self) -> Iterator[Part]:
        yield from super()._request()
        yield from file_of(self._operand, self._wire_type)


def file_of(operand: Operand, wire_type: str, first: int = 0) -> Iterator[memoryview]:
    """Cut an operand's safetensors file into chunks.

    Args:
        operand: What to send.
        wire_type: Element type in which it travels.
        first: Columns to leave out.

    Yields:
        The chunks.
    """
    shape = operand.shape
    if operand.columns is not None:
        shape = (operand.columns - first, shape[1])
    yield memoryview(safetensors_header.dump_one("v", wire_type, shape))
    yield from chunks.packed(_bytes_of(operand.values(first), wire_type))


def widened(
    raw: Buffer,
    wire_type: str,
    dtype: np.dtype[Any],
    allocate: Callable[[int], Buffer],
) -> Array:
    """See what travelled as values.

    Args:
        raw: [n] elements as they travelled.
        wire_type: Their type.
        dtype: The type of the values.
        allocate: Finds memory, if the types differ.

    Returns:
        [n]
    """
    if wire_type not in NARROW:
        return raw.view(dtype)
    values = allocate(raw.nbytes // ITEM_BYTES * dtype.itemsize).view(dtype)
    widen(raw, wire_type, values)
    return values


def expecting(
    rpc: Rpc, wire_type: str, shape: tuple[int, ...] | None, piece_bytes: int = 0
) -> Callable[[safetensors_header.Header], int]:
    """Make the check of a result's safetensors header.

    Args:
        rpc: The RPC whose result it is, for the message.
        wire_type: Expected element type.
        shape: Expected shape.
        piece_bytes: How to cut it; 0: not.

    Returns:
        What `wire.Assembler` calls with the header.
    """
    expected = (wire_type, shape)

    def accept(header: safetensors_header.Header) -> int:
        tensor = header.get("result")
        if len(header) != 1 or not tensor or (tensor.dtype, tensor.shape) != expected:
            msg = (
                f"the server's answer to {rpc.name} breaks the contract: expected one "
                f"tensor of {expected}, got {header}"
            )
            raise Internal(msg, rpc=rpc.name)
        return piece_bytes

    return accept


def _bytes_of(values: Iterator[Array], wire_type: str) -> Iterator[memoryview]:
    if wire_type not in NARROW:
        yield from map(chunks.bytes_of, values)
        return
    step = chunks.CHUNK_BYTES // ITEM_BYTES
    for array in values:
        for start in range(0, array.size, step):
            yield chunks.bytes_of(narrow(array[start : start + step], wire_type))
