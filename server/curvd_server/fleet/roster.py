"""The workers of a fleet, as those share them who ask (`fleet`) and who keeps them (`keeper`).

Both look at the same seats under one lock, and wait for changes by it. What is decided here is
what both must see alike: who is there, who cannot be started, and what numbers mean.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping

from curvd.errors import Unavailable
from curvd_server.fleet.connection import Connection
from curvd_server.fleet.registry import Registry
from curvd_server.fleet.seats import Lost, Numbers, Seat

FAILURES = 3
"""How often in a row a worker may be lost before it is ready; then callers are told."""
POLL_S = 0.02
"""How long who asks waits for a change before he looks whether he is still wanted."""
WATCH_S = 0.25
"""How long who keeps workers waits for a change before he looks at them."""


class Roster:
    """Seats, their lock, and what is registered.

    Args:
        devices: Where each worker computes, by rank.
        patience_s: How long nothing may be heard of a worker.
        start_s: How long one may take until it is there.
    """

    def __init__(
        self, devices: tuple[str, ...], *, patience_s: float, start_s: float
    ) -> None:
        self.patience_s, self.start_s = patience_s, start_s
        self.changed = threading.Condition()
        """The lock of all that is here; told when a seat changes or an answer comes."""
        self.seats = [Seat(rank, device) for rank, device in enumerate(devices)]
        self.registry = Registry()
        self.generation = 0
        """How often the fleet was complete, or became so again."""
        self.numbers = Numbers()
        self.wanted: set[int] = set()
        """Numbers of commands whose answers somebody waits for."""
        self.is_closed = False

    @contextlib.contextmanager
    def numbered(self) -> Iterator[int]:
        """Number a command, and keep what is answered to it.

        Yields:
            The number; answers lie at the seats until the context is left.
        """
        number = self.numbers.next()
        with self.changed:
            self.wanted.add(number)
        try:
            yield number
        finally:
            with self.changed:
                self.wanted.discard(number)
                for seat in self.seats:
                    seat.answers.pop(number, None)

    def is_still(self, rank: int, incarnation: int) -> bool:
        """Tell whether a worker is still the one that it was; the lock is held."""
        seat = self.seats[rank]
        return seat.incarnation == incarnation and seat.is_ready

    def check_there(self, only: Mapping[int, int]) -> None:
        """Find out whether workers are still those that they were; the lock is held.

        Args:
            only: Their incarnations by rank.

        Raises:
            Lost: If one is not.
        """
        for rank, incarnation in only.items():
            seat = self.seats[rank]
            if seat.incarnation != incarnation or not seat.is_ready:
                msg = f"worker {rank} was lost: {seat.said}"
                raise Lost(msg)

    def connection_of(self, rank: int, incarnation: int) -> Connection | None:
        """Give the connection of a worker, unless it was started anew."""
        with self.changed:
            seat = self.seats[rank]
            return seat.connection if seat.incarnation == incarnation else None

    def check_startable(self) -> None:
        """Find out whether all who are missing may still come; the lock is held.

        Raises:
            Unavailable: If one cannot be started, or the server ends.
        """
        for seat in self.seats:
            if seat.failures >= FAILURES:
                msg = (
                    f"worker {seat.rank} on {seat.device} cannot be started: {seat.said}; "
                    "it is tried again every few seconds; look at the server's log"
                )
                raise Unavailable(msg)
            gone_s = time.monotonic() - seat.gone_s
            if seat.connection is None and gone_s > self.start_s:
                msg = (
                    f"worker {seat.rank} on {seat.device} has been gone for {gone_s:.0f} s, "
                    f"above --worker-start-s {self.start_s:g}: "
                    f"{seat.said or 'it has not come yet'}; try again, and look at the "
                    "server's log and, where workers are elsewhere, at the cluster"
                )
                raise Unavailable(msg)
        if self.is_closed:
            msg = "the server is shutting down"
            raise Unavailable(msg)
