"""One product: columns come in, are queued, and go out, all at the same time.

What is multiplied comes from a source, and the result goes to a sink; whatever they are,
the operator stands between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from curvd.contract import OperatorSpec
from curvd_server.device import Done, Reservation, Ticket
from curvd_server.service import validation
from curvd_server.service.dependencies import ProductDependencies, off_the_loop
from curvd_server.service.outcomes import (
    header_of,
    is_scaled_or_damped,
    scaled_and_damped,
    summary_of,
)
from curvd_server.service.sinks import Sink
from curvd_server.service.sources import Source
from curvd_server.sessions import Lease
from curvd_server.system import released

Columns = NDArray[Any]

_BLOCKS = 2
"""Column blocks of one call under way: one computes while another travels."""
_SLOW_S = 0.1
"""Who reads a block for longer has all columns computed that it may have under way."""


async def multiply(
    source: Source,
    lease: Lease,
    spec: OperatorSpec,
    sink: Sink,
    dependencies: ProductDependencies,
) -> None:
    """Multiply what a source yields, and give it to a sink.

    Args:
        source: Where the operand comes from.
        lease: The lease of the session, with the operator.
        spec: The operator, with scale and damping.
        sink: Where the result goes.
        dependencies: What products work with.
    """
    with contextlib.ExitStack() as room:
        await _Product(source, lease, spec, sink, dependencies, room).run()


class _Product:
    """A product under way: one half receives and queues, the other computes and sends."""

    def __init__(
        self,
        source: Source,
        lease: Lease,
        spec: OperatorSpec,
        sink: Sink,
        dependencies: ProductDependencies,
        room: contextlib.ExitStack,
    ) -> None:
        self._source, self._lease, self._spec, self._sink = source, lease, spec, sink
        self._dependencies, self._room = dependencies, room
        self._reservation: Reservation | None = None
        self._announced = asyncio.Event()
        self._window = asyncio.Semaphore(_BLOCKS)
        # None ends them; the error says why, unless that is as it should be.
        self._tickets: asyncio.Queue[Ticket[Columns] | None] = asyncio.Queue()
        self._error: Exception | None = None

    async def run(self) -> None:
        """Receive and send at the same time, until both are done."""
        receiver = asyncio.create_task(self._receive())
        try:
            await self._send()
        finally:
            self._error = None  # its traceback holds this stream
            receiver.cancel()
            while not self._tickets.empty():
                ticket = self._tickets.get_nowait()
                if ticket is not None:
                    ticket.cancel()

    async def _receive(self) -> None:
        operator, batcher = self._lease.operator, self._dependencies.batcher
        assert operator is not None
        try:
            async for columns in self._source.blocks(self._announce):
                await self._window.acquire()
                self._tickets.put_nowait(batcher.multiply(operator, columns))
                del columns
        except Exception as error:
            # Not by cancelling the sender: a write that is cut off leaves a call that
            # cannot be ended with a status any more.
            self._error = released(error)
        self._announced.set()
        self._tickets.put_nowait(None)

    def _announce(self, shape: tuple[int, ...]) -> int:
        """Make room for an operand and its result.

        Args:
            shape: The shape of the operand.

        Returns:
            Columns of a block.
        """
        limits, info = self._dependencies.limits, self._lease.info
        dtype = validation.vector_dtype(info.dtype)
        column_bytes = info.layout.size * dtype.itemsize
        columns = shape[0] if len(shape) == 2 else 1
        fitting = limits.block_bytes // max(1, column_bytes)
        block = max(1, min(fitting, limits.run_columns))
        at_once = min(columns, _BLOCKS * block)
        # Twice: the operand and its result.
        room = self._dependencies.batcher.reserve(at_once, 2 * at_once * column_bytes)
        self._reservation = self._room.enter_context(room)
        self._sink.expect(shape, dtype)
        self._announced.set()
        return block

    async def _send(self) -> None:
        await self._announced.wait()
        if self._error is None:
            await self._sink.begin(header_of(self._lease, plan=True))
        blocks: list[Done[None]] = []
        while (ticket := await self._tickets.get()) is not None:
            rows = await self._computed(ticket, blocks)
            # With it go the block and, where it was scaled, the product as it was.
            del ticket
            with self._waiting_for_the_client():
                await self._sink.take(rows, summary_of(blocks))
            del rows
            self._window.release()
        if self._error is not None:
            raise self._error
        await self._sink.end(summary_of(blocks))

    async def _computed(
        self, ticket: Ticket[Columns], blocks: list[Done[None]]
    ) -> Columns:
        """Wait for the next block's result: [k, P].

        Args:
            ticket: What was queued.
            blocks: What it took is added to them.
        """
        done = await asyncio.wrap_future(ticket)
        assert ticket.columns is not None
        rows = await self._scaled_and_damped(done.value, ticket.columns)
        blocks.append(Done(None, done.queue_s, done.compute_s, done.run_columns))
        return rows

    async def _scaled_and_damped(self, rows: Columns, columns: Columns) -> Columns:
        out = columns if self._source.reusable else None
        work = functools.partial(
            scaled_and_damped, columns=columns, spec=self._spec, out=out
        )
        return (
            await off_the_loop(work, rows)
            if is_scaled_or_damped(self._spec)
            else work(rows)
        )

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
