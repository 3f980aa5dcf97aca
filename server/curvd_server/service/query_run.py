"""A query under way: its algorithm in a thread, its products in the device's queue.

Each product is cut into chunks of the columns that the operator computes at once, one at
a time per query. Short chunks of all queries share one lane of the queue: queries take
turns with each other, and together with whoever else multiplies, so that a product of
another caller waits for one chunk at most. Long ones give way between mini-batches.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from curvd.contract import OperatorFunction, OperatorSpec, Work
from curvd.errors import Cancelled
from curvd_server.device import LONG_S, Batcher, Counted, Operator, Ticket
from curvd_server.linalg import Products, Progress, Query
from curvd_server.sessions import Lease
from curvd_server.system import Ongoing, Poll, calling

R = TypeVar("R")
T = TypeVar("T")

_LANE = "queries"
_REPORT_S = 0.05
_PRODUCTS = 10_000
"""Columns that a query may multiply, unless it says otherwise."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a query has taken so far."""

    products: int
    elapsed_s: float
    queue_s: float
    compute_s: float


class QueryRun:
    """Runs one query.

    Args:
        batcher: The queue of the device.
        threads: Where algorithms run.
        time_limit_s: Start nothing on the device after so long; None: no limit.
        lease: The session, whose operator may get a better plan on the way; None: none
            does.
    """

    def __init__(
        self,
        *,
        batcher: Batcher,
        threads: concurrent.futures.Executor,
        time_limit_s: float | None,
        lease: Lease | None = None,
    ) -> None:
        self._batcher, self._threads = batcher, threads
        self._start_s = time.monotonic()
        self._limit_s = time_limit_s
        self._queue_s = self._compute_s = 0.0
        self.chunk_s = math.inf
        """Seconds that one step on the device takes, as far as is known."""
        self._given_up = False
        self._ticket: Ticket[Any] | None = None
        self.subject: Counted = _Nothing()
        """What the query is about; set before it is driven."""
        self._leased = self._now = None if lease is None else lease.operator
        self._latest = (lambda: None) if lease is None else lease.latest
        self.plans = [self._now.report] if self._now else []
        """Those that have computed products, in order."""
        self.ongoing = Ongoing(Work.QUERY)
        """Tells how far it is; likewise."""

    @property
    def cost(self) -> Cost:
        """What it has taken so far."""
        return Cost(
            products=self.subject.done,
            elapsed_s=time.monotonic() - self._start_s,
            queue_s=self._queue_s,
            compute_s=self._compute_s,
        )

    async def drive(
        self, query: Query[R], report: Callable[[Progress, Cost], Awaitable[None]]
    ) -> R:
        """Run the algorithm to its end.

        Cancelling stops the device within one step; see `autotune.LONGEST_STEP_S`.

        Args:
            query: The algorithm, not begun.
            report: Called with the latest progress, at most every 50 ms.

        Returns:
            Its result.
        """
        loop = asyncio.get_running_loop()
        # What the algorithm asks of the device, it asks as whoever makes this call.
        call = contextvars.copy_context()
        while True:
            step = loop.run_in_executor(self._threads, call.run, self._step, query)
            try:
                progress, result = await asyncio.shield(step)
            except asyncio.CancelledError:
                self._give_up()
                # The operator must not be closed under the thread's feet.
                await asyncio.wait([step])
                step.exception()
                raise
            self.ongoing.advance(self.subject.done)
            if result:
                return result[0]
            if progress is not None:
                await report(progress, self.cost)
            self._take_over()

    def _take_over(self) -> None:
        """Go on with a better plan, if one took over; no product runs now.

        The map is the same but for rounding, which differs from product to product anyway:
        no algorithm can tell.
        """
        latest = self._latest()
        if latest is not self._now and latest is not None:
            self._now = latest
            self.plans.append(latest.report)

    def operator(self, operator: Operator) -> Operator:
        """Name what multiplies in place of an operator by now."""
        return self._now if self._now and operator is self._leased else operator

    def _step(self, query: Query[R]) -> tuple[Progress | None, tuple[R, ...]]:
        """Run until there is something worth reporting; on a thread."""
        until_s = time.monotonic() + _REPORT_S
        progress = None
        with torch.no_grad():
            while time.monotonic() < until_s and not self._given_up:
                try:
                    progress = next(query)
                except StopIteration as end:
                    return progress, (end.value,)
        return progress, ()

    def compute(self, job: Callable[[Poll], T]) -> T:
        """Take a step on the device, in its turn; on the thread of the algorithm.

        Args:
            job: Takes what it polls for cancellation.

        Returns:
            What the job returned.

        Raises:
            Cancelled: If the query was given up.
        """
        if self.chunk_s > LONG_S:
            ticket = self._batcher.run_in_turns(job, lane=(_LANE, id(self)))
        else:
            ticket = self._batcher.run(job, lane=(_LANE, calling().name))
        self._ticket = ticket
        if self._given_up:
            ticket.cancel()
        try:
            done = ticket.result()
        except concurrent.futures.CancelledError:
            msg = "the query was given up"
            raise Cancelled(msg) from None
        finally:
            self._ticket = None
            del ticket  # the error that it keeps came through here
        self._queue_s += done.queue_s
        self._compute_s += done.compute_s
        self.chunk_s = done.compute_s
        return done.value

    def count(self, columns: int) -> None:
        """Take note of columns that were multiplied, for the statistics of the server."""
        self._batcher.count_query(columns)

    def close(self) -> None:
        """Let go of the session: what the query is about knows the run that computes it.

        In such a circle the session's data would stay until a full collection of garbage.
        """
        self.subject = _Nothing()
        self._leased = self._now = None
        self._latest = lambda: None

    def _give_up(self) -> None:
        self._given_up = True
        ticket = self._ticket
        if ticket is not None:
            ticket.cancel()

    def expired(self) -> bool:
        """Tell whether its time is up.

        Raises:
            Cancelled: If the query was given up.
        """
        if self._given_up:
            msg = "the query was given up"
            raise Cancelled(msg)
        age_s = time.monotonic() - self._start_s
        return self._limit_s is not None and age_s >= self._limit_s


@dataclass(frozen=True, slots=True)
class _Nothing:
    done: int = 0


def subject_of(
    run: QueryRun, lease: Lease, spec: OperatorSpec | None, limit: int | None
) -> Counted:
    """Find out what a query is about.

    Args:
        run: The run that computes it.
        lease: The session, with the operator if there is one.
        spec: The operator; None: the query is about data points.
        limit: Most products or data points; None: 10,000 products, all data points.

    Returns:
        The map that it multiplies by, or the data points.
    """
    if spec is None:
        return lease.problem.points(run.compute, limit=limit, expired=run.expired)
    assert lease.operator is not None
    run.chunk_s = lease.operator.report.seconds_per_product
    return products_of(run, lease.operator, spec, limit)


def products_of(
    run: QueryRun, operator: Operator, spec: OperatorSpec, limit: int | None
) -> Products:
    """Make the map that an algorithm multiplies by, with scale and damping.

    Args:
        run: The run that computes it.
        operator: The operator without them.
        spec: Scale and damping.
        limit: Most products; None: 10,000.

    Returns:
        The map.
    """

    def multiply(V: Tensor) -> Tensor:
        now = run.operator(operator)

        def product(part: Tensor) -> Tensor:
            rows = run.compute(
                lambda cancelled: now.multiply(part, cancelled=cancelled)
            )
            run.count(len(part))
            return rows

        at_once = max(1, now.report.columns_at_once)
        parts = [product(part) for part in V.split(at_once)]  # type: ignore[no-untyped-call]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        if spec.scale != 1.0:
            rows = rows * spec.scale
        return rows.add(V, alpha=spec.damping) if spec.damping else rows

    return Products(
        multiply,
        **(_closed_forms(run, operator, spec) if spec.kind.is_factored else {}),
        size=operator.size,
        dtype=operator.dtype,
        device=operator.device,
        limit=limit or _PRODUCTS,
        expired=run.expired,
        runner=operator.runner,
    )


def _closed_forms(
    run: QueryRun, operator: Operator, spec: OperatorSpec
) -> dict[str, Any]:
    """Make what is known without products of a factored operator."""

    def eigenvalues() -> Tensor | None:
        now = run.operator(operator)
        found = run.compute(lambda cancelled: now.eigenvalues(cancelled=cancelled))
        return None if found is None else found * spec.scale + spec.damping

    def inverse(V: Tensor, damping: float) -> Tensor | None:
        if not spec.scale > 0 or spec.function is not OperatorFunction.NONE:
            return None
        now, shift = run.operator(operator), (spec.damping + damping) / spec.scale
        found = run.compute(
            lambda cancelled: now.inverse(V, shift, cancelled=cancelled)
        )
        return None if found is None else found / spec.scale

    return {"eigenvalues": eigenvalues, "inverse": inverse}
