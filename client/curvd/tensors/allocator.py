"""Settings of the C allocator for processes that move large vectors."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator

# Parameter numbers of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8

# gRPC allocates and frees every message. With glibc's defaults the pages go back to
# the kernel each time, and faulting them in again costs more than copying; with these,
# 40 MB and more move 1.2-1.6 times faster. A larger mmap threshold makes torch's
# temporaries stay on the heap and fragment it.
_SETTINGS = (
    (_M_MMAP_THRESHOLD, 32 << 20),
    (_M_TRIM_THRESHOLD, 128 << 20),
    (_M_TOP_PAD, 16 << 20),
    (_M_ARENA_MAX, 1),
)

_EXACT_BYTES = 1 << 20
_one_change = threading.Lock()
_exact = 0
"""How many contexts of `exact_allocator` are open; beside it, who changes it."""


def tune_allocator() -> bool:
    """Set up glibc's malloc for vectors of megabytes, for the whole process.

    The command line and the server call this at start-up. A library must not change
    its host process, so `import curvd` does not: call it early in a program of yours
    that moves vectors of 4 MB and more.

    Returns:
        Whether it took effect: True on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False  # musl
    return all([mallopt(parameter, value) == 1 for parameter, value in _SETTINGS])


@contextlib.contextmanager
def exact_allocator() -> Iterator[None]:
    """Give memory of 1 MiB and more back to the system at once, for as long as it is open.

    On the heap small blocks take the ends of holes that large ones have left, so that the
    next large ones do not fit there: work that holds a layer at a time grew by a model. All
    of the process pays with fresh pages meanwhile.

    Yields:
        Nothing.
    """
    _change(1)
    try:
        yield
    finally:
        _change(-1)


def _change(by: int) -> None:
    global _exact
    with _one_change:
        before, _exact = _exact, _exact + by
        if sys.platform.startswith("linux") and not (before and _exact):
            usual = dict(_SETTINGS)[_M_MMAP_THRESHOLD]
            # musl has no mallopt, and needs none.
            with contextlib.suppress(OSError, AttributeError):
                libc = ctypes.CDLL("libc.so.6")
                libc.mallopt(_M_MMAP_THRESHOLD, _EXACT_BYTES if _exact else usual)


def trim_allocator() -> bool:
    """Give memory that is free back to the system, wherever on the heap it is.

    With the settings above glibc keeps what was freed, and gives nothing back of what
    lies below a block in use. A server that was crowded for a moment would be as large
    ever after. Nothing is allocated meanwhile: some milliseconds for 100 MB.

    Returns:
        Whether there was something to give back.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL("libc.so.6").malloc_trim(0))
    except (OSError, AttributeError):
        return False  # musl
