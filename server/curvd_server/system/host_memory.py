"""One limit for what the server holds in its host's memory.

Whoever is about to hold much asks here first: snapshots of datasets and states, stored
vectors, and the operands and results of calls under way. Caches ask, too, but stand in
nobody's way: what they hold is theirs only while nobody else wants it.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

import psutil

from curvd.errors import CurvdError, LimitExceeded, Overloaded

SNAPSHOTS = "datasets and states"
VECTORS = "stored vectors"
CALLS = "calls under way"
RESULTS = "kept results"
_REMEDIES = {
    SNAPSHOTS: "delete sessions",
    VECTORS: "delete stored vectors",
    CALLS: "wait for the calls",
}
_SHARE = 0.8
"""Of the machine's or the container's memory, unless the operator says otherwise."""
_RETRY_S = 1.0


class HostMemory:
    """What is held, and by what.

    Args:
        limit_bytes: The most bytes of all together; none by default.
    """

    def __init__(self, limit_bytes: float = math.inf) -> None:
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        self._total = 0
        # Given back by finalizers, which may run within `take`: no lock for them.
        self._back: deque[tuple[str, int]] = deque()
        self._cached: dict[str, Callable[[], int]] = {}

    def take(self, kind: str, nbytes: int) -> None:
        """Hold memory; `give` gives it back.

        Args:
            kind: What for, one of the names of this module.
            nbytes: How much.

        Raises:
            LimitExceeded: If there is not so much, even when all calls are over.
            Overloaded: If there will be when they are.
        """
        with self._lock:
            self._settle()
            if self._total + nbytes > self.limit_bytes:
                raise self._refused(kind, nbytes)
            self._add(kind, nbytes)

    def give(self, kind: str, nbytes: int) -> None:
        """Give memory back; from anywhere, finalizers included."""
        self._back.append((kind, nbytes))

    def cached(self, kind: str, nbytes: Callable[[], int]) -> None:
        """Get to know a cache.

        Args:
            kind: What is in it.
            nbytes: Says how much it holds.
        """
        self._cached[kind] = nbytes

    def free(self) -> float:
        """Tell what a cache may still take; negative: it is to let go of so much."""
        with self._lock:
            self._settle()
            free = self.limit_bytes - self._total
        for size in self._cached.values():
            free -= size()
        return free

    def held(self) -> dict[str, int]:
        """Tell who holds how much."""
        with self._lock:
            self._settle()
            held = dict(self._held)
        return held | {kind: size() for kind, size in self._cached.items()}

    def _settle(self) -> None:
        while self._back:
            kind, nbytes = self._back.popleft()
            self._add(kind, -nbytes)

    def _add(self, kind: str, nbytes: int) -> None:
        self._held[kind] += nbytes
        self._total += nbytes

    def _refused(self, kind: str, nbytes: int) -> CurvdError:
        held = ", ".join(f"{k} {n}" for k, n in sorted(self._held.items()) if n)
        msg = (
            f"{nbytes} bytes more for {kind} exceed the server's limit of "
            f"{self.limit_bytes} bytes of its host's memory (memory_bytes); it holds "
            f"{held or 'nothing'}"
        )
        kept = self._total - self._held[CALLS]
        if kept + nbytes <= self.limit_bytes:
            msg += f"; retry in {_RETRY_S} s"
            return Overloaded(msg, retry_after_s=_RETRY_S, limit=self.limit_bytes)
        most = max(_REMEDIES, key=lambda k: self._held[k])
        msg += f". {_REMEDIES[most].capitalize()}, or send less"
        return LimitExceeded(msg, limit=self.limit_bytes)


def default_bytes() -> int:
    """Say how much memory a server may hold, unless its operator says.

    Returns:
        Four fifths of what the machine has, or the container may use.
    """
    total = psutil.virtual_memory().total
    for file in (
        Path("/sys/fs/cgroup/memory.max"),
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ):
        try:
            total = min(total, int(file.read_text()))
        except (OSError, ValueError):  # it is not there, or says "max"
            continue
    return int(total * _SHARE)
