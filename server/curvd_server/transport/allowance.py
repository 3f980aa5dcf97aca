"""Time of the event loop for connections that have not earned trust yet.

Accepting, greeting, encrypting, and reading what leads to no successful call costs
little each time, but strangers decide how often. All of it together gets a share of the
loop's time, first come, first served; calls of known clients have the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

_SHARE = 0.2
"""The share of the time that passes."""
_BURST_S = 0.1
"""Time that can be saved up: some hundred clients may connect at once."""


class Allowance:
    """Rations time.

    Args:
        share: The share of the time that passes.
        burst_s: What can be saved up.
        clock: Seconds.
    """

    def __init__(
        self,
        share: float = _SHARE,
        burst_s: float = _BURST_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._share, self._burst_s, self._clock = share, burst_s, clock
        self._left_s, self._at = burst_s, clock()
        self._queue: deque[Callable[[], None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def spent(self) -> bool:
        """Whether a newcomer has to wait."""
        return bool(self._queue) or self._refilled() <= 0

    def spend(self, seconds: float) -> None:
        """Take note of time that was used."""
        self._left_s = self._refilled() - seconds

    @contextlib.contextmanager
    def charged(self) -> Iterator[None]:
        """Measure the time that is used in here, without waiting."""
        start = self._clock()
        try:
            yield
        finally:
            self.spend(self._clock() - start)

    def wait(self, work: Callable[[], None]) -> None:
        """Do something when it is its turn.

        Args:
            work: It says itself what it used.
        """
        self._queue.append(work)
        self._arm()

    async def turn(self) -> None:
        """Wait until there is time; others of the loop are always let through."""
        if not self.spent:
            await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        self.wait(lambda: None if future.done() else future.set_result(None))
        await future

    def _refilled(self) -> float:
        now = self._clock()
        self._left_s += (now - self._at) * self._share
        self._left_s, self._at = min(self._left_s, self._burst_s), now
        return self._left_s

    def _arm(self) -> None:
        if self._timer is None and self._queue:
            seconds = max(0.0, -self._refilled()) / self._share
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(seconds, self._next)

    def _next(self) -> None:
        self._timer = None
        if self._queue and self._refilled() > 0:
            self._queue.popleft()()
        self._arm()
