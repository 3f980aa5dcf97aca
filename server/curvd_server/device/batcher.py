"""Who computes next: one thread per device, and a queue that joins products.

Natural batching: what queued for the same operator while the device was busy runs as
one product, if that is cheaper (`joining`). There is no timer, so a lone caller never waits.
Operators take turns, so that a caller with many requests delays another by one run at
most.

Work that takes long, such as the opening of a session or a product over many
mini-batches (`paces`), is done in turns (`cooperative`, `turns`): whoever comes waits for one
step of it, not for all, however much of it goes on.

What nobody waits for, such as a better plan for an operator that answers already, runs
when the device is idle (`run_when_idle`), and gives way at its next step to whoever comes.

Waking the thread and being woken takes a tenth of a millisecond or two. A lone caller
whose product is as short has it computed by his own thread, if the device is idle.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

from curvd.errors import Cancelled, OutOfMemory, Unavailable
from curvd_server.device.joining import Joining
from curvd_server.device.lanes import Lane, Lanes, Run
from curvd_server.device.paces import Paces
from curvd_server.device.presence import Presence
from curvd_server.device.requests import Columns, Done, Multiplies, Ticket
from curvd_server.device.room import Reservation, Room
from curvd_server.device.turns import Turns
from curvd_server.system import (
    HostMemory,
    LongWork,
    Poll,
    Quotas,
    Threads,
    calling,
    released,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BatcherStatistics:
    """What a batcher has done, and holds."""

    runs: int
    """Times that the device was started."""
    requests: int
    """Products and jobs submitted."""
    products: int
    """Products of callers that ran; a MatMat is one for each of its blocks."""
    columns: int
    """Columns of these."""
    query_columns: int
    """Columns that queries have multiplied."""
    cancelled: int
    """Requests that were given up, before or during their run."""
    waiting: int
    """Requests in the queue."""
    reserved_columns: int
    """Columns of the requests under way."""
    reserved_bytes: int
    """Memory of the requests under way."""


class Batcher:
    """The queue in front of a device, and the thread that works it off.

    Args:
        run_columns: Columns that run together at most, unless one request has more.
        run_bytes: Operand bytes that run together at most, likewise.
        pending_columns: Columns that may be under way before callers are turned away.
        pending_bytes: Memory that may be under way, likewise.
        long_bytes: Memory of openings that go on at once, unless one needs more.
        memory: The memory of the host, which calls share with what is stored; None: no limit.
        quotas: What single callers may have under way, and their shares of the device.
        clock: Seconds; for tests.
        name: The name of the thread.
    """

    def __init__(
        self,
        *,
        run_columns: int,
        run_bytes: int,
        pending_columns: int,
        pending_bytes: int,
        long_bytes: float = math.inf,
        memory: HostMemory | None = None,
        quotas: Quotas | None = None,
        clock: Callable[[], float] = time.monotonic,
        name: str = "device",
    ) -> None:
        self._joining = Joining(run_columns, run_bytes)
        self._paces = Paces()
        quotas = quotas or Quotas()
        self._room = Room(
            pending_columns,
            pending_bytes,
            memory or HostMemory(),
            self._paces.wait_s,
            quotas,
        )
        self._lanes = Lanes(long_bytes, lambda caller: quotas.of(caller).weight)
        self._threads = Threads()
        self._presence = Presence(clock)
        self._borrowed = False  # whether a caller's own thread computes
        self._lock = threading.Lock()
        self._turns = Turns(self._lanes, self._presence, self._lock, clock)
        # Not a condition: its waiter would wake up only to wait for the lock.
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._asleep = self._closed = False
        self._runs = self._requests = self._columns = self._cancelled = 0
        self._products = self._query_columns = 0
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def reserve(
        self, columns: int, nbytes: int
    ) -> contextlib.AbstractContextManager[Reservation]:
        """Make room for a request before anything is allocated for it.

        Args:
            columns: The columns that it will have in the queue at once.
            nbytes: Memory that it will need at once.

        Returns:
            The room, while the context is open.

        Raises:
            Overloaded: If others take the room. A request alone always gets it.
            LimitExceeded: If what is stored leaves the host no memory for it.
        """
        return self._room.reserve(columns, nbytes)

    def multiply(self, operator: Multiplies, columns: Columns) -> Ticket[Columns]:
        """Queue a product.

        Args:
            operator: The operator, with whose other products it may run.
            columns: V: [K, P].

        Returns:
            Its result [K, P], to come.
        """
        return self._submit(("operator", id(operator)), operator, Ticket(None, columns))

    def multiply_now(
        self, operator: Multiplies, columns: Columns
    ) -> Done[Columns] | None:
        """Multiply on the caller's thread, if that takes hardly any time.

        Args:
            operator: What to multiply.
            columns: V: [K, P].

        Returns:
            The result [K, P]; None if the device is busy, or the product not known to
            be short, or others would be waited for: then it belongs in the queue.
        """
        if operator.is_remote:
            return None
        caller = calling()
        with self._lock:
            idle = self._asleep and not self._closed
            if not idle or not self._paces.is_short(operator, len(columns)):
                return None
            if self._lanes.is_wanted() and caller.name not in self._presence.expected():
                return None  # the device waits for somebody else
            # As if the thread were awake: whoever comes now is waited for below.
            self._asleep, self._borrowed = False, True
            self._presence.came(caller.name)
            self._requests += 1
        start_s, complete = time.monotonic(), False
        try:
            value = operator.apply(columns, cancelled=lambda: self._closed)
            complete = True
        finally:
            seconds = time.monotonic() - start_s
            self._count(operator, len(columns), seconds, products=1, complete=complete)
            with self._lock:
                if caller.name:  # else nobody is told apart, and shares are nobody's
                    expected = self._presence.expected()
                    self._lanes.charge_aside(caller, seconds, expected)
                    self._presence.ended(caller.name)
                self._borrowed = False
                self._turns.note_busy()
                self._asleep = not self._lanes.is_wanted() and not self._closed
                if not self._asleep:
                    self._bell.put(None)
        return Done(value, 0.0, seconds, len(columns))

    def run(self, job: Callable[[Poll], T], *, lane: Hashable = None) -> Ticket[T]:
        """Queue a job that has the device for itself.

        Args:
            job: Called on the device's thread with what it should poll.
            lane: Jobs of one lane run in order; lanes take turns.

        Returns:
            Its result, to come.
        """
        return self._submit(("job", lane), None, Ticket(job, None))

    def run_in_turns(
        self,
        job: Callable[[Poll], T],
        *,
        lane: Hashable = None,
        room_bytes: int | None = None,
    ) -> Ticket[T]:
        """Queue long work, which gives way to others between its steps.

        Args:
            job: Called on a thread of its own; each poll is a yield point, and so is
                `cooperative.yield_point`.
            lane: The lane, as for `run`.
            room_bytes: Memory that it holds while it gives way; not too much such work
                goes on at once. None: none worth counting.

        Returns:
            Its result, to come.
        """
        ticket = Ticket(job, None)
        ticket.in_turns, ticket.room_bytes = True, room_bytes
        return self._submit(("job", lane), None, ticket)

    def run_when_idle(
        self,
        job: Callable[[Poll], T],
        *,
        due: Poll,
        lane: Hashable = None,
        room_bytes: int | None = None,
    ) -> Ticket[T]:
        """Queue long work that nobody waits for.

        Args:
            job: As for `run_in_turns`.
            due: Says whether it need not wait for an idle device any more, and takes
                turns with products from now on.
            lane: As for `run`.
            room_bytes: As for `run_in_turns`.

        Returns:
            Its result, to come.
        """
        ticket = Ticket(job, None)
        ticket.in_turns, ticket.room_bytes = True, room_bytes
        ticket.waits = lambda: not due()
        return self._submit(("job", lane), None, ticket)

    def count_query(self, columns: int) -> None:
        """Take note of what a query has multiplied in a job of its own.

        Args:
            columns: How many columns.
        """
        with self._lock:
            self._query_columns += columns

    def statistics(self) -> BatcherStatistics:
        """Report what was done, and what waits."""
        with self._lock:
            return BatcherStatistics(
                runs=self._runs,
                requests=self._requests,
                products=self._products,
                columns=self._columns,
                query_columns=self._query_columns,
                cancelled=self._cancelled,
                waiting=sum(
                    t.waits is None for lane in self._lanes for t in lane.tickets
                ),
                reserved_columns=self._room.taken[0],
                reserved_bytes=self._room.taken[1],
            )

    def close(self) -> None:
        """Cancel what waits or runs, and end the thread."""
        with self._lock:
            self._closed = True
        self._bell.put(None)
        self._thread.join()
        self._threads.close()

    def _submit(
        self, key: Hashable, operator: Multiplies | None, ticket: Ticket[T]
    ) -> Ticket[T]:
        with self._lock:
            if self._closed:
                raise _shutting_down()
            self._lanes.add(key, operator, ticket)
            if ticket.waits is None:  # else the caller waits for nothing
                self._presence.came(ticket.caller.name)
            self._requests += 1
            asleep, self._asleep = self._asleep, False
        if asleep:
            self._bell.put(None)
        return ticket

    def _work(self) -> None:
        # A call per run: nothing of a run outlives it while the device is idle.
        while self._step():
            pass

    def _step(self) -> bool:
        with self._lock:
            if self._closed:
                self._refuse_all()
                return False
            idle = self._turns.is_idle()
            expected = self._presence.expected()
            key, lane = (
                (None, None)
                if self._borrowed
                else self._lanes.next(idle=idle, expected=expected)
            )
            self._asleep = lane is None and not self._borrowed
            if lane is not None and lane.run is None:
                lane.run = self._begun(lane)
            run = None if lane is None else lane.run
            patience_s = self._turns.patience_s(expected)
        if lane is None:
            with contextlib.suppress(queue.Empty):
                self._bell.get(timeout=patience_s)
            return True
        had_s = 0.0 if run is None else run.spent_s
        if run is not None and self._advance(run):
            self._end(run, lane)
        with self._lock:
            if run is not None:
                self._lanes.charge(self._turns.holders, run.spent_s - had_s)
            self._lanes.rotate(key, lane, after_long=run is not None and run.in_turns)
        return True

    def _begun(self, lane: Lane) -> Run | None:
        """Take what runs together off a lane; None if nobody wants it any more."""
        tickets, operator = self._joining.take(lane, self._drop), lane.operator
        if not tickets:
            return None
        self._lanes.begin(tickets)
        in_turns = tickets[0].in_turns
        if operator is not None:
            columns = sum(ticket.width for ticket in tickets)
            is_shared = self._presence.is_shared()
            in_turns = self._paces.is_long(operator, columns, is_shared=is_shared)
        work = LongWork(
            lambda poll: self._joining.compute(operator, tickets, poll),
            stopped=lambda: self._closed or all(t.abandoned for t in tickets),
            gives_way=self._gives_way,
            threads=self._threads,
            is_shared=self._turns.is_shared,
        )
        return Run(operator, tickets, work, in_turns, time.monotonic())

    def _drop(self, ticket: Ticket[Any]) -> None:
        """Take note that a request was cancelled before its run; the lock is held."""
        self._cancelled += 1
        ticket.let_go()
        if ticket.waits is None:
            self._presence.ended(ticket.caller.name)

    def _advance(self, run: Run) -> bool:
        """Let a run take its turn; return whether it has ended."""
        self._turns.begin(run)
        if run.in_turns:
            ended = run.work.resume()
        else:
            run.work.complete()
            ended = True
        self._turns.end(run)
        return ended

    def _gives_way(self) -> bool:
        """Tell long work whether to pause: its turn is over, or the device closes."""
        return self._closed or self._turns.is_over()

    def _end(self, run: Run, lane: Lane) -> None:
        """Tell the callers how their run ended."""
        complete = False
        with self._lock:
            lane.run = None
            self._lanes.end(run.tickets)
        try:
            values = run.work.result()
        except OutOfMemory as error:
            if len(run.tickets) > 1:
                # Together they may not fit; then each has only itself to blame.
                with self._lock:
                    for ticket in reversed(run.tickets):
                        ticket.alone = True
                        lane.tickets.appendleft(ticket)
                return
            self._leave(run)
            run.tickets[0].set_exception(released(error))
        except Exception as error:
            if self._closed and isinstance(error, Cancelled):
                error = _shutting_down()
            self._leave(run)
            released(error)
            for ticket in run.tickets:
                ticket.set_exception(error)
        else:
            complete = True
            self._leave(run)
            for ticket, value in zip(run.tickets, values, strict=True):
                queue_s = run.began_s - ticket.submitted_s
                ticket.set_result(Done(value, queue_s, run.spent_s, run.columns))
        given_up = sum(ticket.abandoned for ticket in run.tickets)
        products = len(run.tickets) if run.operator is not None else 0
        self._count(
            run.operator,
            run.columns,
            run.spent_s,
            given_up,
            products=products,
            complete=complete,
        )

    def _leave(self, run: Run) -> None:
        """Take note of an end before anybody is told, who may ask again at once."""
        with self._lock:
            for ticket in run.tickets:
                ticket.let_go()
                if ticket.waits is None:
                    self._presence.ended(ticket.caller.name)

    def _count(
        self,
        operator: Multiplies | None,
        columns: int,
        seconds: float,
        given_up: int = 0,
        *,
        products: int,
        complete: bool,
    ) -> None:
        with self._lock:
            self._products += products
            self._runs += 1
            self._columns += columns
            self._cancelled += given_up
            if operator is None or not columns:
                return
            self._paces.count(operator, columns, seconds, complete=complete)

    def _refuse_all(self) -> None:
        for lane in self._lanes:
            if lane.run is not None:
                while not lane.run.work.resume():  # it stops at its next poll
                    pass
                lane.tickets.extend(lane.run.tickets)
            for ticket in lane.tickets:
                ticket.let_go()
                if ticket.running() or ticket.set_running_or_notify_cancel():
                    ticket.set_exception(_shutting_down())
        self._lanes.clear()


def _shutting_down() -> Unavailable:
    return Unavailable("the server is shutting down")
