"""The end of a process that was told to end, whatever its threads do.

Python waits for threads that compute, and no thread can be stopped from outside: one that
never returns would keep the process, its memory and its port for ever.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from curvd_server.system.logs import logger

ABANDONED = 1
"""Exit status of a process that left work behind."""


def end_within(
    seconds: float,
    under_way: Callable[[], Sequence[str]],
    *,
    end: Callable[[int], object] = os._exit,
) -> None:
    """End this process after so long, if it is still there; returns at once.

    Nothing that was acknowledged is lost: what is stored was written before its call was
    answered. The log says what was abandoned, and is flushed.

    Args:
        seconds: Until when it should have ended of itself.
        under_way: Names what goes on.
        end: Ends the process; replaced in tests.
    """

    def watch() -> None:
        time.sleep(seconds)
        threads = sorted(
            thread.name
            for thread in threading.enumerate()
            if not thread.daemon and thread is not threading.main_thread()
        )
        logger().error("abandoned", work=list(under_way()), threads=threads)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        end(ABANDONED)

    threading.Thread(target=watch, name="end", daemon=True).start()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Start processes that ignore Ctrl-C, before they can say that they do.

    A terminal sends SIGINT to all processes of a command. One that still imports Python's own
    modules would end with a traceback; it inherits what is blocked here.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
