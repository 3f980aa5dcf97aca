"""Room in the queue of a device: how many columns and bytes may be under way at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from curvd.errors import Overloaded
from curvd_server.system import CALLS, COLUMNS, HostMemory, Quotas

_LONGEST_RETRY_S = 30.0


class Reservation:
    """Room that a request has: columns in the queue, and memory.

    Args:
        hold: Is told of columns and bytes that are taken again, or given back if
            negative.
        columns: The columns that the request has in the queue at once.
        nbytes: Memory that it needs at once.
    """

    def __init__(
        self, hold: Callable[[int, int], None], columns: int, nbytes: int
    ) -> None:
        self._hold, self._columns, self._nbytes = hold, columns, nbytes
        self._held = (columns, nbytes)

    def resume(self) -> None:
        """Hold everything."""
        self._change(self._columns, self._nbytes)

    def suspend(self) -> None:
        """Hold memory only: no column waits for the device at present."""
        self._change(0, self._nbytes)

    def close(self) -> None:
        """Give everything back."""
        self._change(0, 0)

    def _change(self, columns: int, nbytes: int) -> None:
        before, self._held = self._held, (columns, nbytes)
        self._hold(columns - before[0], nbytes - before[1])


class Room:
    """Columns and bytes that may be under way; whoever finds none is told when to retry.

    Args:
        pending_columns: Columns that may be under way before callers are turned away.
        pending_bytes: Memory that may be under way, likewise.
        memory: The memory of the host, which calls share with what is stored.
        wait_s: Seconds that so many columns will take, as far as is known.
        quotas: What single callers may have under way.
    """

    def __init__(
        self,
        pending_columns: int,
        pending_bytes: int,
        memory: HostMemory,
        wait_s: Callable[[int], float],
        quotas: Quotas,
    ) -> None:
        self._quotas = quotas
        self._limits = (pending_columns, pending_bytes)
        self._memory, self._wait_s = memory, wait_s
        self._taken = (0, 0)
        self._lock = threading.Lock()

    @property
    def taken(self) -> tuple[int, int]:
        """Columns and bytes of the requests under way."""
        return self._taken

    @contextlib.contextmanager
    def reserve(self, columns: int, nbytes: int) -> Iterator[Reservation]:
        """Make room for a request before anything is allocated for it.

        Args:
            columns: The columns that it will have in the queue at once.
            nbytes: Memory that it will need at once.

        Yields:
            The room.

        Raises:
            Overloaded: If others take the room, or the caller's quota. A request alone
                always gets the room.
            LimitExceeded: If what is stored leaves the host no memory for it.
        """
        name, reservation = self._quotas.take(COLUMNS, columns), None
        try:
            reservation = self._reserved(columns, nbytes)
            yield reservation
        finally:
            if reservation is not None:
                reservation.close()
            self._quotas.give(COLUMNS, columns, name)

    def _reserved(self, columns: int, nbytes: int) -> Reservation:
        with self._lock:
            taken, most = self._taken, self._limits
            full = taken[0] + columns > most[0] or taken[1] + nbytes > most[1]
            if full and any(taken):
                raise self._overloaded(columns, nbytes)
            self._memory.take(CALLS, nbytes)
            self._add(columns, nbytes)
        return Reservation(self._hold, columns, nbytes)

    def _hold(self, columns: int, nbytes: int) -> None:
        with self._lock:
            self._add(columns, nbytes)
        self._memory.give(CALLS, -nbytes)

    def _add(self, columns: int, nbytes: int) -> None:
        self._taken = (self._taken[0] + columns, self._taken[1] + nbytes)

    def _overloaded(self, columns: int, nbytes: int) -> Overloaded:
        pending_columns, pending_bytes = self._taken
        retry_after_s = min(_LONGEST_RETRY_S, 0.05 + self._wait_s(pending_columns))
        msg = (
            f"the queue is full: {pending_columns} columns and {pending_bytes} bytes "
            f"are under way, {columns} and {nbytes} more would exceed the limits of "
            f"{self._limits[0]} and {self._limits[1]}; retry in {retry_after_s:.1f} s"
        )
        return Overloaded(
            msg,
            retry_after_s=retry_after_s,
            pending_columns=pending_columns,
            pending_bytes=pending_bytes,
        )
