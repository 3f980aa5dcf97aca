"""Every call as parts to send and parts to receive, without I/O.

The blocking and the asyncio client carry parts between a `Call` and a channel, and
differ in ``for`` and ``async for`` only; everything that could be wrong is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
from google.protobuf.message import Message

from curvd import convert, types, wire
from curvd.arrays import Array, Operand
from curvd.buffers import Buffer
from curvd.errors import CurvdError, Internal
from curvd.rpcs import Part, Rpc
from curvd.v1 import curvature_service_pb2 as curvature_pb

T = TypeVar("T")

_WIRE_NAME = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64"}


class Call(Generic[T]):
    """One call, over as many exchanges and attempts as it takes.

    Per attempt `restart`, then until `done`: send `parts`, `feed` what comes back, and
    `conclude`.

    Args:
        rpc: Which method.
    """

    def __init__(self, rpc: Rpc) -> None:
        self.rpc = rpc
        self.done = False
        self.attempts = 0
        self.failure: Exception | None = None
        """What went wrong while parts were made; it must not disappear in gRPC."""
        self.progressed: Callable[[], None] = lambda: None
        """Called when an exchange brought the call nearer to its end."""
        self.allocate: Callable[[int], Buffer] = lambda n: np.empty(n, np.uint8)
        """Where the memory for results comes from."""

    def restart(self) -> None:
        """Get ready for a new attempt."""
        self.attempts += 1
        self.failure = None

    def parts(self) -> Iterator[Part]:
        """Make the request of the next exchange.

        Yields:
            Its parts.
        """
        try:
            yield from self._request()
        except Exception as error:
            self.failure = error

    def feed(self, part: Part) -> Iterator[Any]:
        """Take one part of the response.

        Args:
            part: A message, or the bytes of a chunk.

        Yields:
            What can be handed to the caller already.
        """
        raise NotImplementedError

    def conclude(self) -> None:
        """Take note that the response is complete."""
        raise NotImplementedError

    def result(self) -> T:
        """Hand out what was asked for, once the call is done."""
        raise NotImplementedError

    def _request(self) -> Iterator[Part]:
        raise NotImplementedError


class Unary(Call[T]):
    """A message for a message.

    Args:
        rpc: Which method.
        request: What to send.
        read: Makes the result from the response.
    """

    def __init__(self, rpc: Rpc, request: Message, read: Callable[[Any], T]) -> None:
        super().__init__(rpc)
        self._message, self._read = request, read
        self._response: Part | None = None

    def _request(self) -> Iterator[Part]:
        yield self._message

    def feed(self, part: Part) -> Iterator[Any]:
        """Keep the response."""
        self._response = part
        yield from ()

    def conclude(self) -> None:
        """Nothing can be missing."""
        self.done = True

    def result(self) -> T:
        """Read the response."""
        return self._read(self._response)


class TensorStream(Call[T]):
    """A stream that ends with the tensor ``result``.

    Args:
        rpc: Which method.
        header: What to compute.
        operand: What to multiply; None for gradients.
        shape: [P] or [K, P] of the result.
        dtype: Of the result.
        finish: Makes the result from the values and where they come from.
        block: Columns to hand out together as soon as they are there; 0: all at the
            end, in one array.
    """

    def __init__(
        self,
        rpc: Rpc,
        header: curvature_pb.ProductHeader | curvature_pb.GradientRequest,
        operand: Operand | None,
        *,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        finish: Callable[[Array], T],
        block: int = 0,
    ) -> None:
        super().__init__(rpc)
        self._header, self._operand = header, operand
        self._shape, self._dtype, self.finish = shape, dtype, finish
        self._block, self._delivered = block, 0
        self._values = np.empty(0, np.uint8)
        self.info: types.ResultInfo | None = None

    def restart(self) -> None:
        """Ask for the whole result again; what was handed out already is skipped."""
        super().restart()
        self._arrived = 0
        self._result_header: curvature_pb.ResultHeader | None = None
        self._summary: curvature_pb.ResultSummary | None = None
        nbytes, allocate = math.prod(self._shape) * self._dtype.itemsize, self.allocate
        if not self._block:
            # Once, and then in the same place. The function does not refer to the call:
            # a cycle would keep every result until the garbage collector finds it.
            if self._values.nbytes != nbytes:
                self._values = allocate(nbytes)
            values = self._values
            allocate = lambda n: values  # noqa: E731
        self._assembler = wire.Assembler(
            _expecting(self.rpc, self._shape, self._dtype, self._block),
            max_bytes=nbytes,
            allocate=allocate,
        )

    def feed(self, part: Part) -> Iterator[Any]:
        """Receive the next bytes in place.

        Yields:
            Blocks [k, P], if they were asked for.

        Raises:
            Internal: If the server breaks the contract.
        """
        try:
            if isinstance(part, memoryview):
                for piece in self._assembler.feed(part):
                    self._arrived += 1
                    if self._block and self._arrived > self._delivered:
                        self._delivered += 1
                        self._pin()
                        yield piece.view(self._dtype).reshape(-1, self._shape[-1])
            else:
                self._message(part)
        except CurvdError as error:
            raise _malformed(self.rpc, error) from error

    def conclude(self) -> None:
        """Check that nothing is missing.

        Raises:
            Internal: If something is.
        """
        if self._result_header is None or self._summary is None:
            raise _malformed(self.rpc, "the header or the summary is missing")
        try:
            self._assembler.finish()
            self.info = convert.result_from_proto(self._result_header, self._summary)
        except CurvdError as error:
            raise _malformed(self.rpc, error) from error
        self.done = True

    def result(self) -> T:
        """Lay out the values as the caller wants them."""
        return self.finish(self._values.view(self._dtype).reshape(self._shape))

    def _request(self) -> Iterator[Part]:
        if self._operand is None:
            yield self._header
            return
        yield self.rpc.request.message(header=self._header)
        tensor = wire.TensorHeader(_WIRE_NAME[self._dtype], self._operand.shape, 0)
        yield memoryview(wire.dump_header({"v": tensor}))
        yield from wire.packed(map(wire.bytes_of, self._operand.values()))

    def _message(self, part: Message) -> None:
        kind = part.WhichOneof("part")
        if kind == "header":
            self._result_header = getattr(part, kind)
        elif kind == "summary":
            self._summary = getattr(part, kind)

    def _pin(self) -> None:
        # Blocks of one result belong to one parameter version, whatever happens.
        if self._result_header is not None:
            self._header.expected_version = self._result_header.version


def _expecting(
    rpc: Rpc, shape: tuple[int, ...], dtype: np.dtype[Any], block: int
) -> Callable[[wire.Header], int]:
    """Make the check of a result's safetensors header."""
    expected = (_WIRE_NAME[dtype], shape)

    def accept(header: wire.Header) -> int:
        tensor = header.get("result")
        if len(header) != 1 or not tensor or (tensor.dtype, tensor.shape) != expected:
            raise _malformed(rpc, f"expected one tensor of {expected}, got {header}")
        return block * shape[-1] * dtype.itemsize

    return accept


def _malformed(rpc: Rpc, why: object) -> Internal:
    msg = f"the server's answer to {rpc.name} breaks the contract: {why}"
    return Internal(msg, rpc=rpc.name)
