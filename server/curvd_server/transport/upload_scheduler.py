"""The order in which large requests are read when several come at once.

Vectors that are read side by side all arrive when the last one does, and the device waits
for the first of them as long. Read one after the other, each arrives as early as it can.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

_LOOK_S = 0.01
"""How often the one whose turn it is must have made progress."""
_LEAST_BYTES = 1 << 20
"""The progress; who is slower holds nobody up, and is held up by nobody."""
_LOOKS = 5
"""After so many of them it is the next one's turn."""


class UploadSource(Protocol):
    """Somebody whose large request comes."""

    @property
    def bytes_received(self) -> int:
        """Bytes that came so far."""

    def resume(self) -> None:
        """Read again, if nothing else is in the way."""


class Timer(Protocol):
    """Something that is going to be done."""

    def cancel(self) -> None:
        """Leave it."""


def _later(seconds: float, work: Callable[[], None]) -> Timer:
    return asyncio.get_running_loop().call_later(seconds, work)


class UploadScheduler:
    """Says who has to wait. Small requests never do: they are not announced here.

    Args:
        later: Has something done in so many seconds.
    """

    def __init__(
        self, later: Callable[[float, Callable[[], None]], Timer] = _later
    ) -> None:
        self._queue: dict[UploadSource, None] = {}
        self._later = later
        self._timer: Timer | None = None
        self._looks = self._received_before = 0

    def waits(self, upload: UploadSource) -> bool:
        """Whether another one is read first.

        Args:
            upload: Who asks.
        """
        return upload in self._queue and upload is not self._first()

    def join(self, upload: UploadSource) -> None:
        """Queue up.

        Args:
            upload: Its request is large, and there is more of it.
        """
        self._queue[upload] = None
        if len(self._queue) == 2:  # before, there was nobody to hold up
            self._begin()

    def leave(self, upload: UploadSource) -> None:
        """Leave the queue: the request has come, or its connection is gone.

        Args:
            upload: It need not be in the queue.
        """
        if upload not in self._queue:
            return
        was_first = upload is self._first()
        del self._queue[upload]
        if was_first or len(self._queue) == 1:  # one alone is not watched
            self._begin()

    def _first(self) -> UploadSource:
        return next(iter(self._queue))

    def _begin(self) -> None:
        """Begin the turn of the first."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._queue:
            return
        first = self._first()
        self._looks, self._received_before = 0, first.bytes_received
        if len(self._queue) > 1:
            self._watch()
        first.resume()

    def _watch(self) -> None:
        self._timer = self._later(_LOOK_S, self._look)

    def _look(self) -> None:
        first = self._first()
        came = first.bytes_received - self._received_before
        self._received_before = first.bytes_received
        self._looks += 1
        if came < _LEAST_BYTES:
            self.leave(first)
        elif self._looks >= _LOOKS:
            self._queue[first] = self._queue.pop(first)
            self._begin()
        else:
            self._watch()
