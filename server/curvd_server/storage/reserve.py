"""Space that is kept for deletions: to delete, a database has to write a little first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

_BYTES = 256 << 10
"""More than the journals of a deletion in both files of the catalogue."""


class Reserve:
    """A file that gives its space away when the disk is full.

    Args:
        path: The file; made if there is space for it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fill()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Leave its space to what is inside; taken again afterwards, if it is free.

        Yields:
            Nothing.
        """
        self._change(lambda descriptor: os.ftruncate(descriptor, 0))
        try:
            yield
        finally:
            self._fill()

    def _fill(self) -> None:
        """Take the space, if it is there; who finds none goes on without."""
        self._change(lambda descriptor: os.posix_fallocate(descriptor, 0, _BYTES))

    def _change(self, change: Callable[[int], None]) -> None:
        # What somebody has put in its place is left alone: a link, a pipe, a folder.
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        with contextlib.suppress(OSError):
            descriptor = os.open(self._path, flags, 0o600)
            try:
                change(descriptor)
            finally:
                os.close(descriptor)
