"""Ending calls whose other side neither sends nor reads.

A call under way holds memory and a place in the queue of the device, so it must not
wait for ever. While nobody else needs what it holds it may wait long; as soon as a
caller is turned away, those that have waited for more than a moment give theirs back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from curvd.errors import Unavailable
from curvd_server.transport.drops import Drops

T = TypeVar("T")

_PRESSED_S = 5.0
"""Patience with a call while others are turned away."""


class Stalled(Unavailable):
    """The other side of a call neither sends nor reads."""


class StallGuard:
    """Limits how long calls wait for their other side.

    Args:
        stall_s: Seconds for one message, to come or to be taken.
        drops: Is told of calls that were ended.
    """

    def __init__(self, stall_s: float, drops: Drops) -> None:
        self.stall_s, self._drops = stall_s, drops
        self._waiting: dict[asyncio.Timeout, float] = {}

    async def watch(self, awaited: Awaitable[T], peer: str, task: str) -> T:
        """Wait for a message to come or to be taken.

        Args:
            awaited: Ends when it has.
            peer: The peer whose message it is, for the log.
            task: What the peer has to do, for its error.

        Returns:
            The result of `awaited`.

        Raises:
            Stalled: If it takes too long.
        """
        loop = asyncio.get_running_loop()
        timeout = asyncio.timeout(self.stall_s)
        self._waiting[timeout] = start_s = loop.time()
        try:
            async with timeout:
                return await awaited
        except TimeoutError:
            if not timeout.expired():
                raise
            waited_s = loop.time() - start_s
            self._drops.add("stalled", peer, seconds=round(waited_s, 1))
            msg = (
                f"the client did not {task} within {waited_s:.3g} s, at most "
                f"{self.stall_s:g} are allowed (stall_s), and fewer while other callers "
                "are turned away: send and read as messages come, or use smaller chunks"
            )
            raise Stalled(msg, limit=self.stall_s) from None
        finally:
            del self._waiting[timeout]

    def press(self) -> None:
        """End calls that have waited for more than a moment: others need the room."""
        now = asyncio.get_running_loop().time()
        for timeout, start_s in self._waiting.items():
            if now - start_s >= _PRESSED_S and not timeout.expired():
                timeout.reschedule(now)
