"""CurvatureService: products and gradients, streamed in blocks of columns."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from curvd import convert, wire
from curvd.buffers import Buffer, Pool
from curvd.errors import Internal
from curvd.rpcs import RPCS, Part
from curvd.types import OperatorSpec
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd_server import validate
from curvd_server.batching import Batcher, Done, Ticket
from curvd_server.config import LimitsConfig
from curvd_server.service.handlers import Send, opened
from curvd_server.session import Lease
from curvd_server.sessions import SessionStore

Columns = NDArray[Any]

_BLOCKS = 2
"""Column blocks of one call under way: one computes while another travels."""
_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64"}
_SMALL_BYTES = 1 << 20
"""Up to here, work on an array is quicker than handing it to a thread."""


class CurvatureService:
    """One method per RPC.

    Args:
        sessions: Of the server.
        batcher: The queue of their device.
        limits: Of the server.
    """

    def __init__(
        self, *, sessions: SessionStore, batcher: Batcher, limits: LimitsConfig
    ) -> None:
        self._sessions, self._batcher, self._limits = sessions, batcher, limits
        self._pool = Pool(limits.idle_bytes)

    async def mat_vec(self, requests: AsyncIterator[Part], send: Send) -> None:
        """Multiply one vector."""
        await self._product(requests, send, "MatVec")

    async def mat_mat(self, requests: AsyncIterator[Part], send: Send) -> None:
        """Multiply K vectors, block by block, as they arrive."""
        await self._product(requests, send, "MatMat")

    async def gradient(self, request: curvature_pb.GradientRequest, send: Send) -> None:
        """Compute the objective and its gradient."""
        _bind(request)
        async with self._sessions.lease(
            request.session_id, expected_version=_expected(request)
        ) as lease:
            nbytes = lease.info.layout.size * _dtype(lease).itemsize
            with self._batcher.reserve(1, nbytes):
                ticket = self._batcher.run(
                    lambda cancelled: lease.problem.gradient(cancelled=cancelled),
                    lane=lease.info.id,
                )
                done = await asyncio.wrap_future(ticket)
                loss, gradient = done.value
                message = RPCS["Gradient"].response.message
                await send(message(header=_result_header(lease, loss=loss)))
                for chunk in wire.chunks({"result": gradient}):
                    await send(chunk)
                await send(message(summary=_summary([done])))

    async def _product(
        self, requests: AsyncIterator[Part], send: Send, name: str
    ) -> None:
        header, chunks = await opened(requests)
        _bind(header)
        spec = convert.operator_from_proto(header.operator)
        async with (
            self._sessions.lease(
                header.session_id, operator=spec, expected_version=_expected(header)
            ) as lease,
            contextlib.AsyncExitStack() as stack,
        ):
            product = _Product(
                lease, spec, name, self._batcher, self._limits, self._pool, stack
            )
            await product.run(chunks, send)


@dataclass(frozen=True, slots=True)
class _Event:
    """What the receiving half of a product tells the sending one."""

    shape: tuple[int, ...] = ()
    """The operand was announced."""
    block: bool = False
    """Columns were queued."""
    error: Exception | None = None
    """Nothing more will come; nor will it if nothing is set."""


class _Product:
    """One product under way: columns come in, are queued, and go out in order."""

    def __init__(
        self,
        lease: Lease,
        spec: OperatorSpec,
        name: str,
        batcher: Batcher,
        limits: LimitsConfig,
        pool: Pool,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        assert lease.operator is not None
        self._lease, self._spec, self._operator = lease, spec, lease.operator
        self._matrix = name == "MatMat"
        self._message = RPCS[name].response.message
        self._batcher, self._limits, self._stack = batcher, limits, stack
        self._pool = pool
        self._layout, self._dtype = lease.info.layout, _dtype(lease)
        self._checked = 0
        self._window = asyncio.Semaphore(_BLOCKS)
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._tickets: deque[Ticket[Columns]] = deque()

    async def run(self, chunks: AsyncIterator[memoryview], send: Send) -> None:
        """Receive and send at the same time, until both are done."""
        receiver = asyncio.create_task(self._receive(chunks))
        try:
            await self._send(send)
        finally:
            receiver.cancel()
            for ticket in self._tickets:
                ticket.cancel()

    async def _receive(self, chunks: AsyncIterator[memoryview]) -> None:
        assembler = wire.Assembler(
            self._accept,
            max_bytes=self._limits.operand_bytes,
            allocate=self._pool.take,
            arrived=self._check,
        )
        try:
            async for chunk in chunks:
                for piece in assembler.feed(chunk):
                    columns = piece.view(self._dtype).reshape(-1, self._layout.size)
                    self._checked += columns.size
                    await self._queue(columns)
                    del columns, piece
            assembler.finish()
            self._events.put_nowait(_Event())
        except Exception as error:
            # Not by cancelling the sender: a write that is cut off leaves a call that
            # cannot be ended with a status any more.
            self._events.put_nowait(_Event(error=error))

    def _check(self, piece: Buffer, start: int, stop: int) -> None:
        """Refuse NaN and infinity while the bytes are in the cache."""
        # A value that is cut by a message is looked at when its rest is there.
        first, last = start // self._dtype.itemsize, stop // self._dtype.itemsize
        values = piece.view(self._dtype)[first:last]
        validate.check_finite(values, layout=self._layout, first=self._checked + first)

    async def _queue(self, columns: Columns) -> None:
        await self._window.acquire()
        self._tickets.append(self._batcher.multiply(self._operator, columns))
        self._events.put_nowait(_Event(block=True))

    def _accept(self, header: wire.Header) -> int:
        """Judge the operand by its header, and make room for it."""
        columns = validate.check_operand(
            header,
            matrix=self._matrix,
            layout=self._layout,
            dtype=self._lease.info.dtype,
            limits=self._limits,
        )
        column_bytes = self._layout.size * self._dtype.itemsize
        fitting = self._limits.block_bytes // max(1, column_bytes)
        block = max(1, min(fitting, self._limits.run_columns))
        at_once = min(columns, _BLOCKS * block)
        # Twice: the operand and its result.
        reservation = self._batcher.reserve(at_once, 2 * at_once * column_bytes)
        self._stack.enter_context(reservation)
        self._events.put_nowait(_Event(shape=header["v"].shape))
        return block * column_bytes

    async def _send(self, send: Send) -> None:
        shape, done = (await self._next()).shape, []
        tensor = wire.TensorHeader(_NAMES[self._dtype], shape, 0)
        header = _result_header(self._lease, plan=True)
        await send(self._message(header=header))
        await send(memoryview(wire.dump_header({"result": tensor})))
        while (await self._next()).block:
            done.append(await self._send_block(send))
            self._window.release()
        await send(self._message(summary=_summary(done)))

    async def _next(self) -> _Event:
        event = await self._events.get()
        if event.error is not None:
            raise event.error
        return event

    async def _send_block(self, send: Send) -> Done[None]:
        # What is not needed any more is let go before the last byte leaves: the client
        # may come back at once, and its next vector fits into the memory of this one.
        result = await asyncio.wrap_future(self._tickets[0])
        columns = self._tickets.popleft().columns
        assert columns is not None
        rows = await self._shifted(result.value, columns)
        del columns
        for chunk in wire.pieces(wire.bytes_of(rows)):
            await send(chunk)
        return Done(None, result.queue_s, result.compute_s, result.run_columns)

    async def _shifted(self, rows: Columns, columns: Columns) -> Columns:
        if rows.shape != columns.shape or rows.dtype != columns.dtype:
            msg = f"a product {columns.dtype} {columns.shape} became {rows.dtype} {rows.shape}"
            raise Internal(msg)
        if self._spec.scale == 1.0 and not self._spec.damping:
            return rows
        shifted: Columns = await _off_the_loop(_shift, rows, columns, self._spec)
        return shifted


def _shift(rows: Columns, columns: Columns, spec: OperatorSpec) -> Columns:
    """Make ``scale * A v + damping * v`` in the memory of the operand."""
    columns *= spec.damping
    columns += rows * spec.scale
    return columns


async def _off_the_loop(work: Any, array: Columns, *args: Any, **kwargs: Any) -> Any:
    if array.nbytes <= _SMALL_BYTES:
        return work(array, *args, **kwargs)
    return await asyncio.to_thread(work, array, *args, **kwargs)


def _result_header(
    lease: Lease, *, plan: bool = False, loss: float | None = None
) -> curvature_pb.ResultHeader:
    info = lease.info
    report = lease.operator.report if plan and lease.operator else None
    return curvature_pb.ResultHeader(
        version=info.version,
        parameters_digest=info.parameters_digest,
        model_id=info.model_id,
        dataset_id=info.dataset_id,
        plan=None if report is None else convert.plan_to_proto(report),
        loss=loss,
    )


def _summary(blocks: list[Done[Any]]) -> curvature_pb.ResultSummary:
    return curvature_pb.ResultSummary(
        queue_s=sum(b.queue_s for b in blocks),
        compute_s=sum(b.compute_s for b in blocks),
        runs=len(blocks),
        run_columns=sum(b.run_columns for b in blocks),
    )


def _dtype(lease: Lease) -> np.dtype[Any]:
    return validate.vector_dtype(lease.info.dtype)


def _expected(request: Any) -> int | None:
    return request.expected_version if request.HasField("expected_version") else None


def _bind(request: Any) -> None:
    validate.check_text(request.request_id, "request_id")
    structlog.contextvars.bind_contextvars(
        session=request.session_id, request_id=request.request_id
    )
