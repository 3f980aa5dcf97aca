"""Who keeps a fleet's workers: starts them, watches them, and starts the lost ones anew.

Beside the fleet, which asks workers and waits: it sends them no commands but those by which a
worker that comes makes all that the others hold. A thread of its own does it, which ends what is
left of a lost worker and starts another one in its place.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable

from curvd.errors import Internal
from curvd_server.fleet import messages
from curvd_server.fleet.connection import Connection
from curvd_server.fleet.launcher import Invitation, Launcher
from curvd_server.fleet.listener import Listener
from curvd_server.fleet.roster import FAILURES, WATCH_S, Roster
from curvd_server.fleet.seats import Lost, Request, Seat, raised, silent_s
from curvd_server.system import logger

_BACKOFF_S = 5.0
"""Between two starts of a worker that was lost before it was ready."""


class Keeper:
    """Starts and ends workers, from a thread of its own.

    Args:
        roster: The workers.
        launcher: Starts and ends them.
        invite: Makes the invitation of a rank, as for `Fleet`.
        forget: Has workers forget what nobody needs any more.
        host: Address of this machine that workers elsewhere reach; empty: all are here.
    """

    def __init__(
        self,
        roster: Roster,
        launcher: Launcher,
        invite: Callable[[int, int, str, str], Invitation],
        forget: Callable[[messages.Close], None],
        host: str,
    ) -> None:
        self._roster, self._changed = roster, roster.changed
        self._launcher, self._invite, self._forget = launcher, invite, forget
        self._secret = secrets.token_bytes(32)
        self._listener = Listener(self._secret, self._arrived, host)
        self._thread = threading.Thread(target=self._keep, name="fleet", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all workers; the roster is closed."""
        self._thread.join()
        self._listener.close()
        self._launcher.close()

    def _keep(self) -> None:
        """Start who is missing, and end who is frozen; never sends, which could block."""
        try:
            while not self._roster.is_closed:
                with self._changed:
                    missing = [s for s in self._roster.seats if self._is_due(s)]
                    lost = [
                        (s, s.incarnation, self._why_lost(s))
                        for s in self._roster.seats
                    ]
                for seat, incarnation, why in lost:
                    if why:
                        self._lose(seat, incarnation, why)
                        self._launcher.end(seat.rank)
                for seat in missing:
                    self._start(seat)
                with self._changed:
                    if not self._roster.is_closed:
                        self._changed.wait(WATCH_S)
        except Exception:
            logger().exception("defect", task="fleet")
            raise

    def _why_lost(self, seat: Seat) -> str:
        """Say why a worker counts as lost; nothing if it does not."""
        if seat.connection is not None and seat.is_condemned:
            return "it did not leave what the others had left"
        if seat.connection is not None:
            frozen = silent_s(seat) > self._roster.patience_s
            return (
                f"nothing was heard of it for {self._roster.patience_s:g} s"
                if frozen
                else ""
            )
        if not seat.is_starting:
            return ""
        return self._launcher.ended(seat.rank) or ""

    def _is_due(self, seat: Seat) -> bool:
        absent = seat.connection is None and not seat.is_starting
        return absent and time.monotonic() >= seat.retry_s

    def _start(self, seat: Seat) -> None:
        """Start a worker, from this thread: the system ends it with the thread."""
        with self._changed:
            seat.is_starting, seat.hello = True, None
            seat.is_condemned, seat.alive = False, messages.Alive()
            seat.incarnation += 1
            incarnation = seat.incarnation
        invitation = self._invite(
            seat.rank, incarnation, self._listener.address, self._secret.hex()
        )
        try:
            self._launcher.start(invitation)
        except OSError as error:
            self._lose(seat, incarnation, f"it could not be started ({error})")
            return
        threading.Thread(
            target=self._bring_up, args=(seat, incarnation), daemon=True
        ).start()

    def _bring_up(self, seat: Seat, incarnation: int) -> None:
        """Wait until a worker is there, and have it make what is registered."""
        until_s = time.monotonic() + self._roster.start_s
        with self._changed:
            while seat.hello is None and seat.incarnation == incarnation:
                left_s = until_s - time.monotonic()
                if self._roster.is_closed or not seat.is_starting:
                    return
                if left_s <= 0:
                    break
                self._changed.wait(min(left_s, WATCH_S))
            connection = seat.connection
        if connection is None:
            self._lose(
                seat, incarnation, f"it was not there within {self._roster.start_s:g} s"
            )
            return
        try:
            self._replay(seat, incarnation, connection)
        except Lost as error:
            self._lose(seat, incarnation, str(error))

    def _replay(self, seat: Seat, incarnation: int, connection: Connection) -> None:
        """Have a worker make all that is registered, until nothing is new."""
        made: set[int] = set()
        while True:
            with self._changed:
                steps = self._roster.registry.missing(seat.rank, made)
                if not steps:
                    gone = made - self._roster.registry.numbers()
                    seat.is_ready, seat.is_starting = True, False
                    seat.failures = 0
                    self._roster.generation += 1
                    self._changed.notify_all()
                    break
            for key, request in steps:
                self._ask_alone(seat, incarnation, connection, request)
                made.add(key)
        logger().info(
            "worker ready",
            rank=seat.rank,
            device=seat.device,
            pid=None if seat.hello is None else seat.hello.pid,
            restarts=seat.restarts,
            generation=self._roster.generation,
        )
        if gone:
            numbers = tuple(sorted(gone))
            self._forget(messages.Close(problems=numbers, operators=numbers))

    def _ask_alone(
        self, seat: Seat, incarnation: int, connection: Connection, request: Request
    ) -> None:
        try:
            with self._roster.numbered() as number:
                connection.send(number, request.message, request.arrays)
                with self._changed:
                    while number not in seat.answers:
                        if seat.incarnation != incarnation or seat.connection is None:
                            raise Lost(seat.said)
                        self._changed.wait()
                    error = raised(seat.answers[number])
            if error is not None:
                msg = f"it could not make what the others hold: {error}"
                raise Lost(msg)
        except OSError as error:
            raise Lost(str(error)) from error

    def _arrived(self, connection: Connection, hello: messages.Hello) -> bool:
        """Give a worker its seat, and read what it says; on a thread of its own."""
        with self._changed:
            expected = 0 <= hello.rank < len(self._roster.seats)
            seat = self._roster.seats[hello.rank] if expected else None
            if seat is None or (seat.incarnation, seat.is_starting) != (
                hello.incarnation,
                True,
            ):
                return False
            seat.connection, seat.hello = connection, hello
            if hello.refused:  # another start would end as this one
                seat.failures = FAILURES
            self._changed.notify_all()
        if hello.refused:
            self._lose(seat, hello.incarnation, hello.refused)
            return True
        said = "its connection ended"
        try:
            while True:
                frame = connection.receive()
                if isinstance(frame.message, messages.Alive):
                    seat.alive = frame.message
                    continue
                with self._changed:
                    if frame.number in self._roster.wanted:
                        seat.answers[frame.number] = frame
                        self._changed.notify_all()
        except (EOFError, OSError, Internal) as error:
            said = f"{said} ({error})"
        self._lose(seat, hello.incarnation, said)
        return True

    def _lose(self, seat: Seat, incarnation: int, said: str) -> None:
        """Take note that a worker is gone."""
        with self._changed:
            if seat.incarnation != incarnation or self._roster.is_closed:
                return
            if seat.connection is None and not seat.is_starting:
                return  # known already
            if not seat.is_ready:
                seat.failures += 1
                seat.retry_s = time.monotonic() + _BACKOFF_S
            connection, seat.connection, seat.hello = seat.connection, None, None
            seat.is_ready, seat.is_starting, seat.said = False, False, said
            if connection is not None:
                seat.gone_s = time.monotonic()
            seat.answers.clear()
            self._changed.notify_all()
        if connection is not None:
            connection.close()
        logger().warning("worker lost", rank=seat.rank, device=seat.device, why=said)
