"""Ctrl-C while a command is being imported."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Have an interrupt end the process at once, as before it could handle any.

    An import that is interrupted by an exception leaves a traceback, or an error of the
    library that is half imported; what runs in C does not see it at all.

    Yields:
        Nothing.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
