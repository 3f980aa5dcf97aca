"""Who computes next: one thread per device, and a queue that joins products.

Natural batching: what queued for the same operator while the device was busy runs as
one product, if that is cheaper. There is no timer, so a lone caller never waits.
Operators take turns, so that a caller with many requests delays another by one run at
most.

Work that takes long, such as the opening of a session or a product over many
mini-batches, is done in turns (`cooperative`): whoever comes waits for one step of it, not
for all, however much of it goes on.

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
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from curvd.errors import Cancelled, OutOfMemory, Unavailable
from curvd.tensors import Pool
from curvd_server.device.lanes import Lane, Lanes, Run
from curvd_server.device.presence import Presence
from curvd_server.device.requests import Columns, Done, Multiplies, Ticket
from curvd_server.device.room import Reservation, Room
from curvd_server.system import (
    CALLING,
    TRACED,
    HostMemory,
    Identity,
    LongWork,
    Poll,
    Quotas,
    Threads,
    calling,
    released,
    together,
)

T = TypeVar("T")

_LITTLE_BYTES = 1 << 20
"""Operands up to here are joined even if their columns share nothing: each run has a cost
of its own. Larger ones run alone, for joining copies them, and the first result would
wait for the last."""
_FIRST_GUESS_S = 0.1
_SHORT_S = 0.3e-3
"""Products up to here may hold up an event loop."""
_FORGET = 0.8
"""How much of an operator's slowest product lately still counts after one more."""
LONG_S = 0.05
"""Products that take longer, or are not known yet, give way to others."""
_TURN_S = (5e-3, 0.25)
"""Long work keeps the device for one step, or for several short ones: as long as the
latest turn of a product took, within these bounds. So who multiplies all the time and
who opens a session get half of the device each."""
SHARED_LONG_S = 2e-3
"""The same while several callers with names want the device: each may have a short product,
and waits for one step of another's."""
_SHARED_TURN_S = 0.5e-3
"""The length of a turn then, unless one step takes longer."""
IDLE_S = 0.1
"""A device that nobody has asked for so long is idle: solvers come back at once."""


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
        self._run_columns, self._run_bytes = run_columns, run_bytes
        self._clock = clock
        quotas = quotas or Quotas()
        self._room = Room(
            pending_columns, pending_bytes, memory or HostMemory(), self._wait_s, quotas
        )
        self._lanes = Lanes(long_bytes, lambda caller: quotas.of(caller).weight)
        self._threads = Threads()
        self._latest_s = self._turn_s = self._turn_end_s = 0.0
        self._having: list[Identity] = []  # whose turn it is
        self._presence = Presence(clock)
        self._busy_s = -math.inf  # when somebody was last waited for
        self._patient = False  # whether what runs waits for an idle device
        self._borrowed = False  # whether a caller's own thread computes
        self._pool = Pool(run_bytes)
        self._lock = threading.Lock()
        # Not a condition: its waiter would wake up only to wait for the lock.
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._asleep = self._closed = False
        self._runs = self._requests = self._columns = self._cancelled = 0
        self._products = self._query_columns = 0
        self._seconds_per_column = _FIRST_GUESS_S
        # Of the slowest product lately. Operators come and go.
        self._paces = weakref.WeakKeyDictionary[Multiplies, float]()
        # Seconds of the quickest run of so many columns, up to a factor of two: what it
        # takes when nothing is in its way. A busy machine makes no product a long one.
        self._quickest = weakref.WeakKeyDictionary[Multiplies, dict[int, float]]()
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
            be short: then it belongs in the queue.
        """
        caller = calling()
        with self._lock:
            pace_s = self._paces.get(operator, math.inf)
            idle = self._asleep and not self._closed
            if not idle or pace_s * len(columns) > _SHORT_S:
                return None
            if self._lanes.is_wanted() and caller.name not in self._presence.expected():
                return None  # the device waits for somebody else
            # As if the thread were awake: whoever comes now is waited for below.
            self._asleep, self._borrowed = False, True
            self._presence.came(caller.name)
            self._requests += 1
        start_s = time.monotonic()
        try:
            value = operator.apply(columns, cancelled=lambda: self._closed)
        finally:
            seconds = time.monotonic() - start_s
            self._count(operator, len(columns), seconds, products=1, complete=False)
            with self._lock:
                if caller.name:  # else nobody is told apart, and shares are nobody's
                    expected = self._presence.expected()
                    self._lanes.charge_aside(caller, seconds, expected)
                    self._presence.ended(caller.name)
                self._borrowed, self._busy_s = False, self._clock()
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
            self._presence.came(ticket.caller.name)
            self._requests += 1
            asleep, self._asleep = self._asleep, False
        if asleep:
            self._bell.put(None)
        return ticket

    def _is_shared(self) -> bool:
        with self._lock:
            return self._presence.is_shared()

    def _work(self) -> None:
        # A call per run: nothing of a run outlives it while the device is idle.
        while self._step():
            pass

    def _step(self) -> bool:
        with self._lock:
            if self._closed:
                self._refuse_all()
                return False
            idle = self._clock() - self._busy_s >= IDLE_S
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
            patience_s = min([IDLE_S, *expected.values()]) if self._lanes else None
        if lane is None:
            with contextlib.suppress(queue.Empty):
                self._bell.get(timeout=patience_s)
            return True
        had_s = 0.0 if run is None else run.spent_s
        if run is not None and self._advance(run):
            self._end(run, lane)
        with self._lock:
            if run is not None:
                self._lanes.charge(self._having, run.spent_s - had_s)
            self._lanes.rotate(key, lane, after_long=run is not None and run.in_turns)
        return True

    def _begun(self, lane: Lane) -> Run | None:
        """Take what runs together off a lane; None if nobody wants it any more."""
        tickets, operator = self._take(lane), lane.operator
        if not tickets:
            return None
        self._lanes.begin(tickets)
        in_turns = tickets[0].in_turns
        if operator is not None:
            in_turns = self._is_long(operator, sum(ticket.width for ticket in tickets))
        work = LongWork(
            lambda poll: _as_caller(
                tickets, lambda: self._compute(operator, tickets, poll)
            ),
            stopped=lambda: self._closed or all(t.abandoned for t in tickets),
            gives_way=self._gives_way,
            threads=self._threads,
            is_shared=self._is_shared,
        )
        return Run(operator, tickets, work, in_turns, time.monotonic())

    def _is_long(self, operator: Multiplies, columns: int) -> bool:
        """Tell whether a product takes so long that it gives way; the lock is held."""
        seconds = self._paces.get(operator, math.inf) * columns
        if not self._presence.is_shared():
            return seconds > LONG_S
        known = self._quickest.get(operator, {})
        return known.get(columns.bit_length(), seconds) > SHARED_LONG_S

    def _take(self, lane: Lane) -> list[Ticket[Any]]:
        """Take what runs together from the front of a lane; skip the cancelled."""
        taken: list[Ticket[Any]] = []
        columns = nbytes = 0
        share = lane.operator is not None and lane.operator.shares
        most_bytes = self._run_bytes if share else min(self._run_bytes, _LITTLE_BYTES)
        while lane.tickets:
            ticket = lane.tickets[0]
            head = ticket.columns
            if taken and (
                head is None
                or ticket.alone
                or columns + len(head) > self._run_columns
                or nbytes + head.nbytes > most_bytes
            ):
                break
            lane.tickets.popleft()
            if not (ticket.running() or ticket.set_running_or_notify_cancel()):
                self._cancelled += 1
                self._presence.ended(ticket.caller.name)
                continue
            taken.append(ticket)
            if head is None or ticket.alone:
                break
            columns, nbytes = columns + len(head), nbytes + head.nbytes
        return taken

    def _advance(self, run: Run) -> bool:
        """Let a run take its turn; return whether it has ended."""
        is_shared = self._is_shared()
        self._having = [ticket.caller for ticket in run.tickets]
        waits = run.tickets[0].waits
        self._patient = waits is not None and waits() and not run.work.is_alone
        self._turn_s = start_s = self._clock()
        least_s, most_s = _TURN_S
        turn_s = min(max(least_s, self._latest_s), most_s)
        self._turn_end_s = start_s + (_SHARED_TURN_S if is_shared else turn_s)
        if run.in_turns:
            ended = run.work.resume()
        else:
            run.work.complete()
            ended = True
        end_s = self._clock()
        seconds = end_s - start_s
        run.spent_s += seconds
        if run.tickets[0].waits is None:
            self._busy_s = end_s
        if run.tickets[0].room_bytes is None:
            self._latest_s = seconds
        return ended

    def _gives_way(self) -> bool:
        """Tell long work whether its turn is over: if others wait, and it took a while."""
        if self._closed:
            return True
        if self._patient:
            if len(self._lanes) < 2:
                return False
            with self._lock:
                return self._lanes.is_wanted()
        now_s = self._clock()
        if now_s < self._turn_end_s or len(self._lanes) > 1:
            return now_s >= self._turn_end_s
        with self._lock:
            expected = self._presence.expected()
            had_s = now_s - self._turn_s
            return self._lanes.is_owed(expected, self._having, had_s)

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
                self._presence.ended(ticket.caller.name)

    def _joined(self, parts: list[Columns]) -> Columns:
        """Put columns into one array; its memory is that of an earlier run."""
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        dtype = np.result_type(*parts)
        memory = self._pool.take(math.prod(shape) * dtype.itemsize)
        return np.concatenate(parts, out=memory.view(dtype).reshape(shape))

    def _compute(
        self, operator: Multiplies | None, tickets: list[Ticket[Any]], poll: Poll
    ) -> list[Any]:
        if operator is None:
            (ticket,) = tickets
            assert ticket.job is not None
            return [ticket.job(poll)]
        parts = [t.columns for t in tickets if t.columns is not None]
        if len(parts) == 1:
            return [operator.apply(parts[0], cancelled=poll)]
        counts = [len(part) for part in parts]
        rows = operator.apply(self._joined(parts), counts=counts, cancelled=poll)
        ends = np.cumsum(counts)
        return [
            rows[end - len(part) : end] for part, end in zip(parts, ends, strict=True)
        ]

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
            pace_s = seconds / columns
            # A moving average: what a column costs changes with who asks.
            self._seconds_per_column += 0.2 * (pace_s - self._seconds_per_column)
            slowest_s = self._paces.get(operator, 0.0)
            self._paces[operator] = max(pace_s, _FORGET * slowest_s)
            if complete:
                known = self._quickest.setdefault(operator, {})
                width = columns.bit_length()
                known[width] = min(seconds, known.get(width, math.inf))

    def _wait_s(self, columns: int) -> float:
        """Guess how long columns under way will take."""
        return self._seconds_per_column * columns

    def _refuse_all(self) -> None:
        for lane in self._lanes:
            if lane.run is not None:
                while not lane.run.work.resume():  # it stops at its next poll
                    pass
                lane.tickets.extend(lane.run.tickets)
            for ticket in lane.tickets:
                if ticket.running() or ticket.set_running_or_notify_cancel():
                    ticket.set_exception(_shutting_down())
        self._lanes.clear()


def _as_caller(tickets: Sequence[Ticket[Any]], compute: Callable[[], T]) -> T:
    """Compute for the first caller, at whose expense what follows is; tell all traces."""
    waited_for = (ticket for ticket in tickets if ticket.waits is None)
    caller = CALLING.set(tickets[0].caller)
    traced = TRACED.set(together(ticket.traced for ticket in waited_for))
    try:
        return compute()
    finally:
        TRACED.reset(traced)
        CALLING.reset(caller)


def _shutting_down() -> Unavailable:
    return Unavailable("the server is shutting down")
