"""One product: columns come in, are queued, and go out, all at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvd.contract import OperatorSpec
from curvd.errors import InvalidSpec
from curvd.tensors import Buffer, Pool, half_precision, safetensors_header
from curvd.tensors import chunks as wire
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd_server.config import LimitsConfig
from curvd_server.device import Batcher, Done, Reservation, Ticket
from curvd_server.service import operands, validation
from curvd_server.service.handlers import CALLER, Chunks, Send
from curvd_server.service.outcomes import (
    Kept,
    content_of,
    header_of,
    is_shifted,
    send_kept,
    shifted,
    summary_of,
)
from curvd_server.service.result_cache import Content, KeptResults, Key, fingerprint
from curvd_server.service.result_encoding import Format, Sender
from curvd_server.sessions import Lease, Vector

Columns = NDArray[Any]

_BLOCKS = 2
"""Column blocks of one call under way: one computes while another travels."""
_SLOW_S = 0.1
"""Who reads a block for longer has all columns computed that it may have under way."""
_SMALL_BYTES = 1 << 20
"""Up to here, work on an array is quicker than handing it to a thread."""
_SOON_SENT_BYTES = 32 << 20
"""A result up to here may be lost in buffers on its way, although all of it was sent;
a larger one is kept only until then."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What products work with."""

    batcher: Batcher
    limits: LimitsConfig
    pool: Pool
    kept: KeptResults[Kept]


@dataclass(frozen=True, slots=True)
class _Event:
    """What the receiving half of a product tells the sending one."""

    shape: tuple[int, ...] = ()
    """The operand was announced."""
    block: bool = False
    """Columns were queued."""
    kept: Kept | None = None
    """The result is there already."""
    made: Vector | None = None
    """The result was stored already, by an earlier attempt."""
    error: Exception | None = None
    """Nothing more will come; nor will it if nothing is set."""


class _Stored:
    """Puts blocks together that stay on the server."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.array = np.empty(shape if name else 0, dtype)
        self._filled = 0

    def add(self, rows: Columns) -> None:
        """Take the next block: [k, P]."""
        size = rows.shape[1]
        self.array.reshape(-1, size)[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)


class Product:
    """One product under way.

    Args:
        request: Its header.
        lease: Of the session, with the operator.
        spec: The operator, with scale and damping.
        tools: What it works with.
        format_: How the result travels.
        matrix: Whether the operand is [K, P]; None: either.
        stack: Gives back what is reserved.
    """

    def __init__(
        self,
        request: curvature_pb.ProductHeader,
        lease: Lease,
        spec: OperatorSpec,
        tools: Tools,
        format_: Format,
        matrix: bool | None,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        assert lease.operator is not None
        self._request, self._lease, self._spec = request, lease, spec
        self._operator, self._tools, self._format = lease.operator, tools, format_
        self._matrix, self._stack = matrix, stack
        self._layout = lease.info.layout
        self._dtype = validation.vector_dtype(lease.info.dtype)
        self._content = content_of(request)
        self._shape: tuple[int, ...] = ()
        self._block_columns = self._checked = 0
        self._operand_dtype = ""
        # Whether the operand's memory is ours to write to.
        self._owned = request.operand.WhichOneof("source") != "stored"
        self._reservation: Reservation | None = None
        self._window = asyncio.Semaphore(_BLOCKS)
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._tickets: deque[Ticket[Columns]] = deque()
        self._printing: asyncio.Task[None] | None = None

    async def run(self, chunks: Chunks, send: Send) -> None:
        """Receive and send at the same time, until both are done."""
        receiver = asyncio.create_task(self._receive(chunks))
        try:
            await self._send(Sender(send, self._format))
        finally:
            receiver.cancel()
            if self._printing is not None:
                self._printing.cancel()
            for ticket in self._tickets:
                ticket.cancel()

    async def _receive(self, chunks: Chunks) -> None:
        try:
            async for columns in self._columns(chunks):
                await self._queue(columns)
                del columns
            self._events.put_nowait(_Event())
        except Exception as error:
            # Not by cancelling the sender: a write that is cut off leaves a call that
            # cannot be ended with a status any more.
            self._events.put_nowait(_Event(error=error))

    async def _columns(self, chunks: Chunks) -> AsyncIterator[Columns]:
        """Get the operand block by block, wherever it comes from."""
        operand = self._request.operand
        source = operand.WhichOneof("source") or "inline"
        if source == "inline":
            async for columns in self._inline(chunks):
                yield columns
            return
        if await anext(chunks, None) is not None:
            msg = f"the operand is {source}; no chunks may follow the header"
            raise InvalidSpec(msg, source=source)
        # Without a pause between this question and the look at the operand: the product
        # may take the place of its own operand.
        made = self._lease.vectors.made_by(
            self._request.store_as, self._request.request_id, self._content.header
        )
        if made is not None:
            self._events.put_nowait(_Event(made=made))
            return
        found: operands.Probes | operands.Stored
        if source == "probe":
            found = operands.Probes(operand.probe, self._layout.size, self._dtype)
        else:
            found = operands.Stored(self._lease.vectors.get(operand.stored).array)
        shape = found.shape
        validation.check_shape(
            shape,
            matrix=self._matrix,
            layout=self._layout,
            dtype=self._lease.info.dtype,
            limits=self._tools.limits,
        )
        self._announce(shape)
        count = shape[0] if len(shape) == 2 else 1
        for start in range(0, count, self._block_columns):
            stop = min(start + self._block_columns, count)
            yield await asyncio.to_thread(found.columns, start, stop)

    async def _inline(self, chunks: Chunks) -> AsyncIterator[Columns]:
        assembler = wire.Assembler(
            self._accept,
            max_bytes=self._tools.limits.operand_bytes,
            allocate=self._tools.pool.take,
            arrived=self._check,
        )
        chunks.come_to(assembler.room)
        async for chunk in chunks:
            for piece in assembler.feed(chunk):
                columns = await self._widened(piece)
                del piece
                self._checked += columns.size
                yield columns.reshape(-1, self._layout.size)
                del columns
        assembler.finish()

    def _accept(self, header: safetensors_header.Header) -> int:
        """Judge the operand by its header, and make room for it."""
        validation.check_operand(
            header,
            matrix=self._matrix,
            layout=self._layout,
            dtype=self._lease.info.dtype,
            limits=self._tools.limits,
        )
        tensor = header["v"]
        self._operand_dtype = tensor.dtype
        self._announce(tensor.shape)
        item = safetensors_header.ITEM_BYTES[tensor.dtype]
        return self._block_columns * self._layout.size * item

    def _announce(self, shape: tuple[int, ...]) -> None:
        """Take note of the operand's shape, and make room for it."""
        limits = self._tools.limits
        column_bytes = self._layout.size * self._dtype.itemsize
        columns = shape[0] if len(shape) == 2 else 1
        fitting = limits.block_bytes // max(1, column_bytes)
        self._block_columns = max(1, min(fitting, limits.run_columns))
        at_once = min(columns, _BLOCKS * self._block_columns)
        # Twice: the operand and its result.
        room = self._tools.batcher.reserve(at_once, 2 * at_once * column_bytes)
        self._reservation = self._stack.enter_context(room)
        nbytes = columns * column_bytes
        if self._request.store_as:
            self._lease.vectors.check_room(self._request.store_as, nbytes)
        elif self._matrix is None:
            validation.check_message(nbytes)
        self._shape = shape
        self._events.put_nowait(_Event(shape=shape))

    def _check(self, piece: Buffer, start: int, stop: int) -> None:
        """Refuse NaN and infinity while the bytes are in the cache."""
        if self._operand_dtype in half_precision.NARROW:
            return  # they are looked at when they are widened
        # A value that is cut by a message is looked at when its rest is there.
        first, last = start // self._dtype.itemsize, stop // self._dtype.itemsize
        values = piece.view(self._dtype)[first:last]
        validation.check_finite(
            values, layout=self._layout, first=self._checked + first
        )

    async def _widened(self, piece: Buffer) -> Columns:
        if self._operand_dtype not in half_precision.NARROW:
            return piece.view(self._dtype)
        count = piece.nbytes // half_precision.ITEM_BYTES
        values = self._tools.pool.take(count * self._dtype.itemsize).view(self._dtype)

        def work(out: Columns) -> None:
            half_precision.widen(piece, self._operand_dtype, out)
            validation.check_finite(out, layout=self._layout, first=self._checked)

        await _off_the_loop(work, values)
        return values

    async def _queue(self, columns: Columns) -> None:
        if self._is_kept and self._is_whole(columns):
            self._printing = asyncio.create_task(self._print(columns))
            if self._key in self._tools.kept:
                await self._printing
                kept = self._tools.kept.get(self._key, self._content)
                if kept is not None and kept.header.version == self._lease.info.version:
                    self._events.put_nowait(_Event(kept=kept))
                    return
        await self._window.acquire()
        self._tickets.append(self._tools.batcher.multiply(self._operator, columns))
        self._events.put_nowait(_Event(block=True))

    async def _print(self, columns: Columns) -> None:
        """Tell the operand from others, while the device computes."""
        digits = await _off_the_loop(fingerprint, columns)
        self._content = Content(self._content.header, digits)

    async def _printed(self) -> None:
        if self._printing is not None:
            await self._printing

    @property
    def _key(self) -> Key:
        return (self._lease.info.id, self._request.request_id)

    @property
    def _is_kept(self) -> bool:
        """Tell whether the result will be there for whoever asks again."""
        size = math.prod(self._shape) * self._dtype.itemsize
        named = self._request.request_id and not self._request.store_as
        return bool(named) and self._tools.kept.fits(size)

    def _is_whole(self, block: Columns) -> bool:
        """Tell whether a block is all there is."""
        return block.size == math.prod(self._shape)

    async def _send(self, sender: Sender) -> None:
        event, results = await self._next(), list[Done[None]]()
        if event.made is not None:
            header = header_of(self._lease, plan=True)
            header.version = event.made.version
            await sender.bare(header)
            await sender.end(summary_of([]))
            return
        shape = event.shape
        header, taken_up = header_of(self._lease, plan=True), self._format.is_taken_up
        stored = _Stored(self._request.store_as, shape, self._dtype)
        if self._request.store_as:
            await sender.bare(header)
        elif not taken_up:
            await sender.head(header, shape)
        while (event := await self._next()).block:
            result, rows = await self._rows()
            results.append(result)
            if self._request.store_as:
                stored.add(rows)
            else:
                offset = await self._keep(header, rows, result)
                if taken_up:
                    await sender.head(header, shape, offset)
                with self._waiting_for_the_client():
                    await sender.rows(rows, offset)
            # Let go before the last message leaves: the client may come back at once,
            # and its next vector fits into the memory of this one.
            if rows.nbytes > _SOON_SENT_BYTES:
                self._tools.kept.drop(self._key)
            del rows
            self._window.release()
        if event.kept is not None:
            await send_kept(event.kept, sender, self._format, head=taken_up)
            return
        if self._request.store_as:
            vector = Vector(
                stored.array,
                self._lease.info.version,
                self._request.request_id,
                self._content.header,
            )
            self._lease.vectors.put(self._request.store_as, vector)
        await sender.end(summary_of(results))

    @contextlib.contextmanager
    def _waiting_for_the_client(self) -> Iterator[None]:
        """Leave the queue to others if the client takes its time to read."""
        assert self._reservation is not None
        loop = asyncio.get_running_loop()
        timer = loop.call_later(_SLOW_S, self._reservation.suspend)
        try:
            yield
        finally:
            timer.cancel()
            self._reservation.resume()

    async def _keep(
        self, header: curvature_pb.ResultHeader, rows: Columns, took: Done[None]
    ) -> int:
        """Keep the only block, for whoever loses it on its way.

        Returns:
            Bytes of it that the caller has already.
        """
        if not self._is_whole(rows):
            return 0
        await self._printed()
        kept = Kept(header, rows.reshape(self._shape), summary_of([took]))
        self._tools.kept.put(self._key, self._content, kept, rows.nbytes, CALLER.get())
        if not self._format.is_taken_up:
            return 0
        return await asyncio.to_thread(self._format.offset_in, rows)

    async def _next(self) -> _Event:
        event = await self._events.get()
        if event.error is not None:
            raise event.error
        return event

    async def _rows(self) -> tuple[Done[None], Columns]:
        """Wait for the next block's result: [k, P]."""
        result = await asyncio.wrap_future(self._tickets[0])
        columns = self._tickets.popleft().columns
        assert columns is not None
        rows = await self._shifted(result.value, columns)
        return Done(None, result.queue_s, result.compute_s, result.run_columns), rows

    async def _shifted(self, rows: Columns, columns: Columns) -> Columns:
        out = columns if self._owned else None
        if is_shifted(self._spec):
            await self._printed()  # of what is overwritten now
        work = functools.partial(shifted, columns=columns, spec=self._spec, out=out)
        result: Columns = (
            await _off_the_loop(work, rows) if is_shifted(self._spec) else work(rows)
        )
        return result


async def _off_the_loop(work: Any, array: Columns, *args: Any) -> Any:
    if array.nbytes <= _SMALL_BYTES:
        return work(array, *args)
    return await asyncio.to_thread(work, array, *args)
