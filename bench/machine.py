"""What a bench runs on, and beside: busy processes, and what copying memory costs here."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

_BYTES = 256 << 20
_ROUNDS = 5


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Have `count` processes that compute all the time."""
    others = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(count)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def memory() -> str:
    """Measure what bounds a transport between processes of one machine.

    Returns:
        One line: GB/s of a copy within memory that is there, and microseconds for the
        first touch of a page of 4 KiB.
    """
    source = np.ones(_BYTES, np.uint8)
    target = np.ones_like(source)
    copy_s = _median_s(lambda: np.copyto(target, source))

    def touch() -> None:
        with mmap.mmap(-1, _BYTES) as fresh:
            np.frombuffer(fresh, np.uint8)[:: mmap.PAGESIZE] = 1

    touch_s = _median_s(touch)
    return (
        f"memory: {_BYTES / copy_s / 1e9:.1f} GB/s copied, "
        f"{touch_s / (_BYTES / mmap.PAGESIZE) * 1e6:.2f} us for a fresh page"
    )


def _spin() -> None:
    number = 1
    while True:
        number = (number * 31 + 7) % 1_000_003


def _median_s(work: Callable[[], None]) -> float:
    times = []
    for _ in range(_ROUNDS):
        start_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)
