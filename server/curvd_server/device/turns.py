"""The turn under way: whose it is, and when long work gives the device to others.

A turn lasts as long as the latest product took, so who multiplies all the time and who opens
a session get half of the device each; among several callers with names it lasts one step.
Work that nobody waits for has its turns when nobody has asked for the device for a while.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping

from curvd_server.device.lanes import Lanes, Run
from curvd_server.device.presence import Presence
from curvd_server.system import Identity

_TURN_S = (5e-3, 0.25)
"""Long work keeps the device for one step, or for several short ones: as long as the
latest turn of a product took, within these bounds. So who multiplies all the time and
who opens a session get half of the device each."""
_SHARED_TURN_S = 0.5e-3
"""The length of a turn while several callers with names want the device, unless one step
takes longer."""
IDLE_S = 0.1
"""A device that nobody has asked for so long is idle: solvers come back at once."""


class Turns:
    """Begins and ends turns, and says when one is over.

    Args:
        lanes: Who waits.
        presence: Who comes and goes.
        lock: Held by whoever looks at these two.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        lanes: Lanes,
        presence: Presence,
        lock: threading.Lock,
        clock: Callable[[], float],
    ) -> None:
        self._lanes, self._presence = lanes, presence
        self._lock, self._clock = lock, clock
        self.holders: list[Identity] = []
        """Whose turn it is."""
        self._latest_s = self._start_s = self._end_s = 0.0
        self._busy_s = -math.inf  # when somebody was last waited for
        self._is_patient = False  # whether what runs waits for an idle device

    def is_shared(self) -> bool:
        """Tell whether several callers with names want the device."""
        with self._lock:
            return self._presence.is_shared()

    def is_idle(self) -> bool:
        """Tell whether nobody has asked for the device for a while."""
        return self._clock() - self._busy_s >= IDLE_S

    def patience_s(self, expected: Mapping[str, float]) -> float | None:
        """Tell after how long somebody may have a turn who has none now; the lock is held.

        Args:
            expected: Seconds that callers who are away are worth waiting for, by name.

        Returns:
            Seconds; None if nobody waits.
        """
        return min([IDLE_S, *expected.values()]) if self._lanes else None

    def note_busy(self) -> None:
        """Take note that somebody was waited for until now."""
        self._busy_s = self._clock()

    def begin(self, run: Run) -> None:
        """Give a run its turn."""
        is_shared = self.is_shared()
        self.holders = [ticket.caller for ticket in run.tickets]
        waits = run.tickets[0].waits
        self._is_patient = waits is not None and waits() and not run.work.is_alone
        self._start_s = start_s = self._clock()
        least_s, most_s = _TURN_S
        turn_s = min(max(least_s, self._latest_s), most_s)
        self._end_s = start_s + (_SHARED_TURN_S if is_shared else turn_s)

    def end(self, run: Run) -> None:
        """Take note that a run has ended its turn, and of what that took."""
        end_s = self._clock()
        seconds = end_s - self._start_s
        run.spent_s += seconds
        if run.tickets[0].waits is None:
            self._busy_s = end_s
        if run.tickets[0].room_bytes is None:
            self._latest_s = seconds

    def is_over(self) -> bool:
        """Tell long work whether its turn is over: if others wait, and it took a while."""
        if self._is_patient:
            if len(self._lanes) < 2:
                return False
            with self._lock:
                return self._lanes.is_wanted()
        now_s = self._clock()
        if now_s < self._end_s or len(self._lanes) > 1:
            return now_s >= self._end_s
        with self._lock:
            expected = self._presence.expected()
            had_s = now_s - self._start_s
            return self._lanes.is_owed(expected, self.holders, had_s)
