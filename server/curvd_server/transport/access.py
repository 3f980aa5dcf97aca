"""One line of the log for each call, as far as somebody can read so many.

What failed always has a line. Of what went well a method has a few in each second, and then
one that says how many there were `more`.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import time
from collections import Counter
from collections.abc import Callable

from curvd_server.system import logger, logs

_PERIOD_S = 1.0
_WELL = "OK"
USUAL_LINES = 10
"""Lines of one method in a second, unless the server's operator says otherwise."""


class AccessLog:
    """Writes lines of calls that have ended.

    Args:
        lines: Of one method in one second at most, of calls that went well.
        clock: Seconds.
    """

    def __init__(
        self, lines: int = USUAL_LINES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._clock, self._log = lines, clock, logger()
        self._since = clock()
        self._ended: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, rpc: str, code: str, seconds: float, peer: Callable[[], str]) -> None:
        """Take note of a call that ends; on the event loop.

        Args:
            rpc: The method.
            code: Of its status.
            seconds: How long it took.
            peer: Tells who called.
        """
        if not logs.is_written("info"):
            return
        if code == _WELL and not self._has_room(rpc):
            return
        say = functools.partial(
            self._log.info,
            "call",
            rpc=rpc,
            code=code,
            seconds=round(seconds, 6),
            peer=peer(),
        )
        # After the answer has left: writing takes as long as a small product.
        asyncio.get_running_loop().call_soon(say)

    def summarise(self) -> None:
        """Say how many calls had no line since the last time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        ended, self._ended, self._since = self._ended, Counter(), self._clock()
        for rpc, count in ended.items():
            if count > self._most:
                # Not as a line of whoever happens to call now.
                contextvars.Context().run(
                    self._log.info, "call", rpc=rpc, code=_WELL, more=count - self._most
                )

    def _has_room(self, rpc: str) -> bool:
        if self._clock() - self._since >= _PERIOD_S:
            self.summarise()
        self._ended[rpc] += 1
        has_room = self._ended[rpc] <= self._most
        if not has_room and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_PERIOD_S, self.summarise)
        return has_room
