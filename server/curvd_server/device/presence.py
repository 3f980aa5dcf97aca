"""Which callers with names want a device: now, lately, or again in a moment.

A caller who waits for each answer before he asks again wants the device all the time, and yet
is not in the queue when his answer leaves. Whoever queues would then take the device for a
turn each time, and he would wait for it each time: "deceptive idleness" (Iyer and Druschel,
Anticipatory scheduling, 2001). So who usually comes back at once is expected for as long as
that usually takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

_LATELY_S = 1.0
"""How long after his latest request a caller counts as one of several."""
_SOON_S = 4e-3
"""Who usually comes back later than this is not expected: the device would idle."""
_PATIENCE = 2.0
"""How many times as long as usual he may take."""
_NEW = 0.2
"""How much the latest absence counts for what is usual."""


@dataclass(slots=True)
class _Caller:
    """What is known of one."""

    came_s: float
    """When he last asked."""
    requests: int = 0
    """Which have come and not ended."""
    left_s: float = 0.0
    """When the last of them ended."""
    usual_s: float | None = None
    """How long he usually stays away; None: nobody knows."""


class Presence:
    """Notes who comes and goes. Not for several threads at once.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._callers: dict[str, _Caller] = {}

    def came(self, name: str) -> None:
        """Take note of a request.

        Args:
            name: Whose; empty: nobody's in particular, which counts for nothing.
        """
        if not name:
            return
        now_s = self._clock()
        caller = self._callers.get(name)
        if caller is None:  # others have left, perhaps for ever
            self._callers = {
                n: c
                for n, c in self._callers.items()
                if c.requests or c.came_s > now_s - _LATELY_S
            }
            caller = self._callers[name] = _Caller(now_s)
        elif not caller.requests:
            away_s = min(now_s - caller.left_s, 4 * _SOON_S)
            usual_s = away_s if caller.usual_s is None else caller.usual_s
            caller.usual_s = usual_s + _NEW * (away_s - usual_s)
        caller.requests += 1
        caller.came_s = now_s

    def ended(self, name: str) -> None:
        """Take note that a request is answered, or given up."""
        caller = self._callers.get(name)
        if caller is not None:
            caller.requests -= 1
            caller.left_s = self._clock()

    def is_shared(self) -> bool:
        """Tell whether several callers with names have asked for the device lately."""
        if len(self._callers) < 2:
            return False
        since_s = self._clock() - _LATELY_S
        return sum(c.came_s > since_s for c in self._callers.values()) > 1

    def expected(self) -> dict[str, float]:
        """Tell who is away and will be back in a moment.

        Returns:
            Seconds that he is worth waiting for, by name.
        """
        now_s = self._clock()
        return {
            name: remaining_s
            for name, c in self._callers.items()
            if not c.requests
            and c.usual_s is not None
            and c.usual_s <= _SOON_S
            and (remaining_s := c.left_s + _PATIENCE * c.usual_s - now_s) > 0
        }
