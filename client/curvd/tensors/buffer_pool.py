"""Memory for vectors, used again when nobody looks at it any more.

Fresh memory of megabytes costs more than filling it: the kernel clears every page, and
takes it back at the end. A caller who multiplies in a loop drops one result while the
next arrives, so the same few buffers do for all of them.
"""

from __future__ import annotations

import itertools
import weakref

import numpy as np
from numpy.typing import NDArray

Buffer = NDArray[np.uint8]

_SMALL_BYTES = 1 << 16
"""Below this clearing fresh pages costs less than looking for used ones."""


class Pool:
    """Buffers that come back by themselves when their last view is gone.

    No lock guards it: a buffer may come back at any moment, also within `take`. Every
    step is a single operation on a dictionary.

    Args:
        idle_bytes: How much memory that nobody uses is kept at most.
    """

    def __init__(self, idle_bytes: int) -> None:
        self._capacity = idle_bytes
        self._idle: dict[int, Buffer] = {}
        self._order = itertools.count()

    @property
    def idle_bytes(self) -> int:
        """Memory that waits to be used again."""
        return sum(memory.nbytes for memory in list(self._idle.values()))

    def take(self, nbytes: int) -> Buffer:
        """Find memory.

        Args:
            nbytes: How much.

        Returns:
            A buffer with any content; it is yours as long as you hold it or a view.
        """
        if nbytes < _SMALL_BYTES:
            return np.empty(nbytes, np.uint8)
        memory = self._reused(nbytes)
        if memory is None:
            memory = np.empty(nbytes, np.uint8)
        # An array of its own for each use: views refer to it, not to the memory behind.
        buffer = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(buffer, self._come_back, memory).atexit = False
        return buffer

    def clear(self) -> None:
        """Return what nobody uses to the system, and keep nothing from now on."""
        self._capacity = 0
        self._idle.clear()

    def _reused(self, nbytes: int) -> Buffer | None:
        for key, memory in list(self._idle.items()):
            if memory.nbytes == nbytes and self._idle.pop(key, None) is not None:
                return memory
        return None

    def _come_back(self, memory: Buffer) -> None:
        self._idle[next(self._order)] = memory
        while self.idle_bytes > self._capacity:
            oldest = next(iter(list(self._idle)), None)
            if oldest is not None:
                self._idle.pop(oldest, None)
