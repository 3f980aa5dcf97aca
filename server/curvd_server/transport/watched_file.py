"""Files that say who may call: read again when they change."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from curvd.errors import InvalidSpec
from curvd_server.system import logger

T = TypeVar("T")

_LOOK_S = 1.0
"""How often a file is asked whether it changed."""


class WatchedFile(Generic[T]):
    """What a file says, as of a second ago at most.

    Args:
        path: The file.
        read: Reads it; raises InvalidSpec if that cannot be.
        what: What is in it, for the log.
        count: How many of these there are, likewise.
        monotonic: Seconds that nobody can set.

    Raises:
        InvalidSpec: If it cannot be read now. Later, what was read before goes on.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[Path], T],
        what: str,
        count: Callable[[T], int],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._read, self._monotonic = path, read, monotonic
        self._what, self._count = what, count
        self._stamp = _stamp(path)
        self._known = read(path)
        self._looked_s = monotonic()

    def get(self) -> T:
        """Say what it says."""
        now = self._monotonic()
        if now - self._looked_s >= _LOOK_S:
            self._looked_s = now
            self.look()
        return self._known

    def look(self) -> T:
        """Read it again if it has changed, and say what it says."""
        if _stamp(self._path) != self._stamp:
            self.reload()
        return self._known

    def reload(self) -> None:
        """Read it again; if it cannot be used, what was read before goes on."""
        stamp = _stamp(self._path)
        try:
            self._known = self._read(self._path)
        except InvalidSpec as error:
            logger().error(f"{self._what} not read", error=str(error))
        else:
            count = {self._what: self._count(self._known)}
            logger().info(f"{self._what} read", file=str(self._path), **count)
        self._stamp = stamp  # a broken file is not complained of every second


def text_of(path: Path, what: str, *, why: str) -> str:
    """Read a file that only its owner may change.

    Args:
        path: The file.
        what: What is in it, for errors.
        why: What others could do if they could write to it, likewise.

    Returns:
        Its text.

    Raises:
        InvalidSpec: If it cannot be read, or others may write to it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        msg = f"cannot read the {what} in {str(path)!r}: {problem}"
        raise InvalidSpec(msg, file=path) from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        msg = f"others may write to {path} (mode {mode:04o}), and so {why}: chmod go-w {path}"
        raise InvalidSpec(msg, file=path)
    return text


def _stamp(path: Path) -> tuple[int, ...]:
    """Say what the file system says of a file; it changes with the content."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
