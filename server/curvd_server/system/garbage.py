"""Full collections of garbage, which hold up everybody, beside work whose objects stay.

A full collection looks at every object of the process and holds the GIL meanwhile, so no
product, no event loop and no yield point comes in between: 3.4 s beside the traces of a
model of a thousand layers, and 18 times while it is opened. What it finds there are a few
hundred objects, because the nodes of a trace live as long as their session.
"""

from __future__ import annotations

import contextlib
import gc
import math
import threading
import time
from collections.abc import Iterator

_NEVER = 2**31 - 1
_MANY = 100
"""Younger collections, of some thousand new objects each, after which what was made is
set aside. Looking at less takes a moment."""
_lock = threading.Lock()
_under_way: list[Aside] = []
_usual = gc.get_threshold()
_PAUSE_S = 10.0
"""Between looks for garbage before somebody is refused."""
_looked_s = -math.inf


class Aside:
    """Tells whether objects of a work were set aside."""

    some = False


@contextlib.contextmanager
def none_while_building() -> Iterator[Aside]:
    """Put full collections off while objects are made that stay.

    Yields:
        Says at the end whether there were so many that they are set aside, where no
        collection looks until `look_at_all`.
    """
    global _usual
    aside = Aside()
    with _lock:
        if not _under_way:
            if gc.get_threshold()[2] < _NEVER:  # else a client of this process exports
                _usual = gc.get_threshold()
            gc.set_threshold(*_usual[:2], _NEVER)
        _under_way.append(aside)
    try:
        yield aside
    finally:
        with _lock:
            if gc.get_count()[2] > _MANY:
                gc.collect(1)
                gc.freeze()
                for each in _under_way:
                    each.some = True
            _under_way.remove(aside)
            if not _under_way:
                gc.set_threshold(*_usual)


def collect_if_due() -> None:
    """Have a full collection that is due at once, where nobody waits for an answer.

    The next one to make objects would have it in the middle of a call.
    """
    with _lock:
        if not _under_way and gc.get_count()[2] > gc.get_threshold()[2]:
            gc.collect()


def look_at_all() -> None:
    """Collect what was set aside and is not used any more; the rest stays aside."""
    is_some_aside = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if is_some_aside:
        gc.freeze()


def look_before_refusing() -> bool:
    """Collect garbage before somebody is refused memory, which may lie in it.

    As it holds up everybody, whoever asks for too much again and again has it happen once
    in ten seconds.

    Returns:
        Whether it was done.
    """
    global _looked_s
    now_s = time.monotonic()
    with _lock:
        if now_s - _looked_s < _PAUSE_S:
            return False
        _looked_s = now_s
    look_at_all()
    return True
