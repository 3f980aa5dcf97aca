"""Event loops whose time passes when it is told to: limits without waiting for them."""

import asyncio
import contextlib
import time
from concurrent.futures import Future


class LoopClock:
    """The time of all event loops of this process.

    Args:
        monkeypatch: Ends it.
    """

    def __init__(self, monkeypatch):
        self._ahead_s, self._loops = 0.0, set()

        def now(loop):
            self._loops.add(loop)
            return time.monotonic() + self._ahead_s

        monkeypatch.setattr(asyncio.BaseEventLoop, "time", now)

    def advance(self, seconds):
        """Let so many seconds pass; return when each loop has seen that they have."""
        self._ahead_s += seconds
        for loop in list(self._loops):
            seen = Future()
            with contextlib.suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(seen.set_result, None)
                seen.result()
