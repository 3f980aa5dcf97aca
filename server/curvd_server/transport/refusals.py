"""How fast a caller who is at a quota is told so: the first at once, then in a steady pace.

A refusal takes time of the event loop, and who asks again without a pause would take as much
of it as he has connections. So each caller with a name has so many refusals at
once and so many a second; further ones are told later, to a caller who waits. Nothing of his
call is held meanwhile but its connection, and nobody else's calls are slowed.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

PER_SECOND = 50.0
"""Refusals of one caller."""
AT_ONCE = 50
"""Refusals without a pause, of a caller who had none lately."""
LONGEST_S = 10.0
"""Longest time that a refusal is put off."""


class Refusals:
    """Paces the refusals of each caller. On the event loop.

    Args:
        per_second: Refusals of one caller.
        at_once: Those that are not put off.
        longest_s: Longest time that one is put off.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        per_second: float = PER_SECOND,
        at_once: int = AT_ONCE,
        longest_s: float = LONGEST_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._each_s, self._burst_s = 1 / per_second, at_once / per_second
        self._longest_s, self._clock = longest_s, clock
        # When all that was refused so far has had its time; those in the past are dropped.
        self._until_s: dict[str, float] = {}

    def pause_s(self, caller: str) -> float:
        """Count a refusal, and say how long to wait before it is told.

        Args:
            caller: Whose call it is.

        Returns:
            Seconds.
        """
        now_s = self._clock()
        if caller not in self._until_s:  # others may have left for ever
            self._until_s = {n: t for n, t in self._until_s.items() if t > now_s}
        # A backlog beyond the longest pause would only be owed.
        most_s = now_s + self._burst_s + self._longest_s
        until_s = max(self._until_s.get(caller, now_s), now_s) + self._each_s
        self._until_s[caller] = min(until_s, most_s)
        return min(max(0.0, until_s - now_s - self._burst_s), self._longest_s)

    async def pace(self, caller: str, remaining_s: float | None) -> None:
        """Wait until a refusal may be told; at once for who has no name.

        Args:
            caller: Whose call it is.
            remaining_s: Until the call's deadline, before which he is told why; None: it
                has none.
        """
        if caller and (pause_s := self.pause_s(caller)):
            most_s = math.inf if remaining_s is None else max(0.0, remaining_s) / 2
            await asyncio.sleep(min(pause_s, most_s))
