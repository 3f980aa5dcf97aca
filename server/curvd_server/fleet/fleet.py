"""The front's workers: asked together, whatever becomes of each of them meanwhile.

A worker is lost when its connection ends or nothing is heard of it for long. Whoever waits
for its answer goes on waiting: the keeper (`keeper`) ends what is left of it, starts another
one in its place, and has it make all problems and operators that are registered. Then the
same command is sent to it again; the others' answers stand.

Nothing is ever half done: a problem or an operator is registered when the workers that
have it are the ones that are there, checked under one lock with what they lose.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

from curvd.contract import WorkerInfo
from curvd.errors import Cancelled, Unavailable
from curvd_server.fleet import messages
from curvd_server.fleet.connection import Frame
from curvd_server.fleet.keeper import Keeper
from curvd_server.fleet.launcher import Invitation, Launcher
from curvd_server.fleet.roster import POLL_S, WATCH_S, Roster
from curvd_server.fleet.seats import Lost, Request, raised, raised_or_left
from curvd_server.system import TRACED, Poll, Traces, logger

ATTEMPTS = 4
"""How often one command is sent to the same rank before its caller is told."""


class Fleet:
    """Workers, by rank.

    Args:
        launcher: Starts and ends them.
        invite: Makes the invitation of a rank: rank, how often it was started, address
            of the front and secret.
        devices: Where each computes.
        patience_s: How long nothing may be heard of a worker.
        start_s: How long one may take until it is there, and calls wait for it: torch is
            imported, on a busy machine, or a cluster has no place for it.
        host: Address of this machine that workers elsewhere reach; empty: all are here.
    """

    def __init__(
        self,
        launcher: Launcher,
        invite: Callable[[int, int, str, str], Invitation],
        devices: tuple[str, ...],
        *,
        patience_s: float,
        start_s: float = 300.0,
        host: str = "",
    ) -> None:
        self._roster = Roster(devices, patience_s=patience_s, start_s=start_s)
        self._changed, self.seats = self._roster.changed, self._roster.seats
        self.registry = self._roster.registry
        # None ends who passes them on.
        self._forgotten: queue.SimpleQueue[messages.Close | messages.End | None] = (
            queue.SimpleQueue()
        )
        self._keeper = Keeper(self._roster, launcher, invite, self.forget, host)
        self._messenger = threading.Thread(
            target=self._pass_on, name="fleet-forgets", daemon=True
        )
        self._messenger.start()

    def next_number(self) -> int:
        """Name a problem or an operator."""
        return self._roster.numbers.next()

    def wait(self) -> None:
        """Wait until all workers are there.

        Raises:
            Unavailable: If one cannot be started.
        """
        with self._changed:
            while not all(seat.is_ready for seat in self.seats):
                self._roster.check_startable()
                self._changed.wait(WATCH_S)

    def all(
        self,
        requests: Mapping[int, Request],
        *,
        cancelled: Poll,
        register: Callable[[], None] | None = None,
        only: Mapping[int, int] | None = None,
    ) -> dict[int, Frame]:
        """Ask workers; those that are lost are asked again when they are back.

        Args:
            requests: What each rank is asked.
            cancelled: Polled while they work; then all of them stop within a mini-batch.
            register: Called under the lock when those that answered are those that are
                there: notes what they hold now.
            only: Incarnations by rank that can answer, as `there` tells them; None: any.

        Returns:
            The answers by rank.

        Raises:
            Lost: If one of these is gone.
            Cancelled: If the caller gave up.
            Unavailable: If a worker was lost again and again.
            CurvdError: If a worker refuses; the first one, by rank.
        """
        traced = TRACED.get()
        asked: dict[int, int] = {}
        tries: Counter[int] = Counter()
        sent_s: dict[int, float] = {}
        with self._roster.numbered() as number:
            try:
                while True:
                    self._send_to(requests, number, asked, tries, sent_s, cancelled)
                    with self._changed:
                        self._roster.check_there(only or {})
                        found = self._found(requests, number, asked)
                        if found is not None:
                            if register is not None:
                                register()
                            if traced is not None:
                                self._trace(traced, requests, found, sent_s)
                            return found
                        self._changed.wait(POLL_S)
                    if cancelled():
                        msg = "the caller gave up; all workers stopped between two mini-batches"
                        raise Cancelled(msg)
            except BaseException:
                self._stop(number, asked)
                raise

    def _trace(
        self,
        traced: Traces,
        requests: Mapping[int, Request],
        found: Mapping[int, Frame],
        sent_s: Mapping[int, float],
    ) -> None:
        """Tell whoever traces the call what each worker took for a command.

        Workers are asked on clocks of their own, so the way there and back is taken to be
        equally long, as NTP does (RFC 5905, section 8).
        """
        for rank, frame in found.items():
            if frame.took is None:
                continue
            waited_s, computed_s, device_s = frame.took
            way_s = max(0.0, frame.came_s - sent_s[rank] - waited_s - computed_s)
            ended_s = frame.came_s - way_s / 2
            traced.add(
                "compute",
                ended_s - computed_s,
                ended_s,
                rank=rank,
                device=self.seats[rank].device,
                command=type(requests[rank].message).__name__,
                device_s=device_s,
                waited_s=waited_s,
            )

    def together(
        self,
        requests: Mapping[int, Request],
        *,
        only: Mapping[int, int],
        cancelled: Poll,
        register: Callable[[], None] | None = None,
    ) -> dict[int, Frame]:
        """Ask workers what they do in step: none goes on without the others.

        When one fails or is lost the others leave what they are at; who does not, for as
        long as a worker may say nothing, is ended.

        Args:
            requests: What each rank is asked.
            only: Incarnations by rank that can answer, as `there` tells them.
            cancelled: Polled while they work; then they stop, all at the same place.
            register: Called under the lock when all have answered.

        Returns:
            The answers by rank.

        Raises:
            Lost: If one is gone, or all have left.
            CurvdError: What one of them reports, which made the others leave.
        """
        ranks = sorted(requests)
        traced, sent_s = TRACED.get(), dict[int, float]()
        until_s, given_up, ended = math.inf, list[BaseException](), set[int]()
        with self._roster.numbered() as number:
            with self._changed:
                self._roster.check_there(only)
                there = {
                    rank: self._roster.connection_of(rank, only[rank]) for rank in ranks
                }
            for rank, connection in there.items():
                request = requests[rank]
                if connection is not None:
                    sent_s[rank] = time.monotonic()
                    with suppress(OSError):  # its reader will notice, too
                        connection.send(number, request.message, request.arrays)
            while True:
                with self._changed:
                    came = {r: self.seats[r].answers.get(number) for r in ranks}
                    gone = [r for r in ranks if not self._roster.is_still(r, only[r])]
                    late = [r for r in ranks if came[r] is None and r not in gone]
                    found = {r: f for r, f in came.items() if f is not None}
                    wrong = bool(gone) or any(map(raised_or_left, found.values()))
                    if not late:
                        if given_up and not isinstance(given_up[0], Cancelled):
                            raise given_up[0]
                        if wrong:
                            raise self._cause(found, set(gone) - ended)
                        if register is not None:
                            register()
                        if traced is not None:
                            self._trace(traced, requests, found, sent_s)
                        return found
                    if wrong:
                        now_s = time.monotonic()
                        until_s = min(until_s, now_s + self._roster.patience_s)
                        if now_s >= until_s:
                            ended.update(late)
                            for rank in late:
                                self.seats[rank].is_condemned = True
                    self._changed.wait(POLL_S)
                if not given_up and _stops(cancelled, given_up):
                    for connection in filter(None, there.values()):
                        with suppress(OSError):
                            connection.send(0, messages.Cancel(asked=number))

    def _cause(self, found: Mapping[int, Frame], gone: Collection[int]) -> Exception:
        """Say why workers have not ended what they did in step.

        Args:
            found: What those say that answered.
            gone: Who was lost by itself; what others say then may come of that.
        """
        if gone:
            said = (f"worker {r} was lost: {self.seats[r].said}" for r in sorted(gone))
            return Lost("; ".join(said))
        for rank in sorted(found):
            error = raised(found[rank])
            if error is not None:
                _log_trace(rank, found[rank])
                return error
        answers = [frame.message for frame in found.values()]
        left = [m.why for m in answers if isinstance(m, messages.Left)]
        return Lost(left[0] if left else "workers did not come back to each other")

    def there(self, ranks: Collection[int], *, cancelled: Poll) -> dict[int, int]:
        """Wait until workers are there, and tell their incarnations by rank.

        Args:
            ranks: Which.
            cancelled: Polled meanwhile.

        Raises:
            Cancelled: If the caller gave up.
            Unavailable: If one cannot be started.
        """
        while True:
            with self._changed:
                self._roster.check_startable()
                seats = [self.seats[rank] for rank in ranks]
                if all(seat.is_ready for seat in seats):
                    return {seat.rank: seat.incarnation for seat in seats}
                self._changed.wait(POLL_S)
            if cancelled():
                msg = "the caller gave up while a worker was started"
                raise Cancelled(msg)

    def describe(self, shards: Mapping[int, int]) -> tuple[tuple[WorkerInfo, ...], int]:
        """Describe the workers.

        Args:
            shards: How many each rank has.

        Returns:
            The workers by rank, and the generation.
        """
        with self._changed:
            found = tuple(
                WorkerInfo(
                    rank=seat.rank,
                    device=seat.device,
                    host=seat.hello.host if seat.hello else "",
                    pid=seat.hello.pid if seat.hello else 0,
                    shards=shards.get(seat.rank, 0),
                    ready=seat.is_ready,
                    restarts=seat.restarts,
                    lost=seat.said,
                    parameter_bytes=seat.alive.parameter_bytes,
                    whole_bytes=seat.alive.whole_bytes,
                )
                for seat in self.seats
            )
            return found, self._roster.generation

    def forget(self, message: messages.Close | messages.End) -> None:
        """Have workers forget what nobody needs any more; on any thread, at once."""
        self._forgotten.put(message)

    def drop(self, ranks: Collection[int], message: messages.Close) -> None:
        """Have workers forget something, and wait until they have.

        Args:
            ranks: Those that hold it.
            message: What; a worker that is started from now on never makes it, so nobody
                waits for one that is gone.
        """
        with self._changed:
            self.registry.forget(message)
            ranks = [rank for rank in ranks if self.seats[rank].is_ready]
        # While the server ends, so do they.
        with suppress(Unavailable):
            self.all(dict.fromkeys(ranks, Request(message)), cancelled=lambda: False)

    def close(self) -> None:
        """End all workers."""
        with self._changed:
            self._roster.is_closed = True
            self._changed.notify_all()
        self._keeper.close()
        self._forgotten.put(None)
        self._messenger.join()

    def _send_to(
        self,
        requests: Mapping[int, Request],
        number: int,
        asked: dict[int, int],
        tries: Counter[int],
        sent_s: dict[int, float],
        cancelled: Poll,
    ) -> None:
        """Send a command to those that are ready and were not asked since they came."""
        with self._changed:
            self._roster.check_startable()
            due = [
                (seat, seat.incarnation, seat.connection, requests[seat.rank])
                for seat in self.seats
                if seat.rank in requests
                and seat.is_ready
                and asked.get(seat.rank) != seat.incarnation
            ]
        for seat, incarnation, connection, request in due:
            if tries[seat.rank] == ATTEMPTS:
                msg = (
                    f"worker {seat.rank} was lost {ATTEMPTS} times while it worked on "
                    f"this call, last because {seat.said}; try again, and look at the "
                    "server's log and memory"
                )
                raise Unavailable(msg)
            assert connection is not None
            tries[seat.rank] += 1
            sent_s[seat.rank] = time.monotonic()
            with suppress(OSError):  # its reader will notice, too
                connection.send(
                    number, request.message, request.arrays, cancelled=cancelled
                )
            asked[seat.rank] = incarnation

    def _found(
        self, requests: Mapping[int, Request], number: int, asked: Mapping[int, int]
    ) -> dict[int, Frame] | None:
        """Collect the answers, if all are there; raise what one of them reports."""
        found = {}
        for rank in requests:
            seat = self.seats[rank]
            frame = seat.answers.get(number)
            if frame is None or asked.get(rank) != seat.incarnation:
                continue
            error = raised(frame)
            if error is not None:
                _log_trace(rank, frame)
                raise error
            found[rank] = frame
        return found if len(found) == len(requests) else None

    def _stop(self, number: int, asked: Mapping[int, int]) -> None:
        """Have all workers stop, and wait until they have, or are lost."""
        for rank, incarnation in asked.items():
            connection = self._roster.connection_of(rank, incarnation)
            if connection is not None and number not in self.seats[rank].answers:
                with suppress(OSError):
                    connection.send(0, messages.Cancel(asked=number))
        with self._changed:
            while any(
                self.seats[rank].incarnation == incarnation
                and self.seats[rank].connection is not None
                and number not in self.seats[rank].answers
                for rank, incarnation in asked.items()
            ):
                self._changed.wait()

    def _pass_on(self) -> None:
        """Tell all workers what is forgotten; on a thread of its own, for it may block."""
        while (message := self._forgotten.get()) is not None:
            with self._changed:
                if isinstance(message, messages.Close):
                    self.registry.forget(message)
                there = [s.connection for s in self.seats if s.connection is not None]
            for connection in there:
                with suppress(OSError):
                    connection.send(0, message)


def _stops(cancelled: Poll, given_up: list[BaseException]) -> bool:
    """Tell whether the caller gave up; what the poll raises is for later."""
    try:
        if cancelled():
            given_up.append(Cancelled())
    except BaseException as error:
        given_up.append(error)
    return bool(given_up)


def _log_trace(rank: int, frame: Frame) -> None:
    """Log where a worker failed, which is no caller's business."""
    if isinstance(frame.message, messages.Failed):
        logger().error("worker failed", rank=rank, exception=frame.message.trace)
