"""One snapshot at a time, from the thread that trains to the thread that asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from curvd.watching.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Due:
    """A snapshot that was taken."""

    step: int
    taken_s: float
    """On the monotonic clock."""
    skipped: int
    """How many came to nothing between the last one that was read and this one."""


class Handover:
    """Memory for one snapshot, and whose it is.

    The training may write it unless it is being sent; so it is never torn, the training
    never waits for the network, and of those that wait for their turn the newest wins.

    Args:
        snapshot: The memory.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, snapshot: Snapshot, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._snapshot, self._clock = snapshot, clock
        self._changed = threading.Condition()
        self._pending: tuple[int, float] | None = None
        self._is_sending = self._is_busy = False
        self._quiet_until = 0.0
        self._unread = 0
        self.skipped = 0
        """Snapshots that were due and came to nothing."""
        self.closed = False
        """Whether there will be no more."""

    def offer(self, step: int) -> bool:
        """Take a snapshot if there is room; on the thread that trains.

        Args:
            step: How many steps were made.

        Returns:
            Whether it was taken; if not, a later step may offer another.
        """
        with self._changed:
            if self.closed or self._is_sending or self._clock() < self._quiet_until:
                return False
            if self._pending is not None:
                self._pending = None
                self._skip()
            self._snapshot.take()
            self._pending = step, self._clock()
            self._changed.notify_all()
            return True

    def skip(self) -> None:
        """Say that one was due and will not be taken."""
        with self._changed:
            self._skip()

    def next(self) -> Due | None:
        """Wait for a snapshot, which is then being sent.

        Returns:
            The snapshot; None if there will be no more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._pending is not None or self.closed)
            if self._pending is None:
                return None
            due = Due(*self._pending, skipped=self._unread)
            self._pending = None
            self._is_sending = self._is_busy = True
            return due

    def values(self) -> Mapping[str, Any]:
        """Read the snapshot that is being sent.

        Returns:
            Its tensors by name.
        """
        return self._snapshot.values()

    def sent(self) -> None:
        """Let the training write the next one."""
        with self._changed:
            self._is_sending = False

    def read(self, due: Due) -> None:
        """Say that there is a reading.

        Args:
            due: Of which snapshot.
        """
        with self._changed:
            self._unread -= due.skipped

    def done(self, *, failed_for_s: float | None = None) -> None:
        """Say that the work on a snapshot is over.

        Args:
            failed_for_s: It came to nothing, and others would for so long.
        """
        with self._changed:
            if failed_for_s is not None:
                self._skip()
                self._quiet_until = self._clock() + failed_for_s
            self._is_sending = self._is_busy = False
            self._changed.notify_all()

    def close(self) -> None:
        """Take no more; one that is pending remains to be asked about."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until nothing is pending and nothing under way.

        Args:
            timeout_s: Longest time to wait; None: as long as it takes.

        Returns:
            Whether that is so.
        """
        with self._changed:
            return self._changed.wait_for(
                lambda: self._pending is None and not self._is_busy, timeout_s
            )

    def _skip(self) -> None:
        self.skipped += 1
        self._unread += 1
