"""Files that are on their way: appended to, hashed as they grow, kept when verified."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from curvd.errors import DiskFull, InvalidTensors, LimitExceeded, Unavailable
from curvd_server.system import FREE_SOME, told

MOST_PARTIALS = 1000
"""Uploads that are not complete."""
_READ_BYTES = 8 << 20


class Partial:
    """A file that grows, and the hash of what is in it.

    Args:
        path: The path of the file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.users = path, 0
        self.announced = 0
        """Bytes that the largest of its uploads wants to bring it to."""
        self.is_complete = False
        """Whether it has become a blob, or was one already."""
        self.lock = threading.Lock()
        with told():
            self.file = open(path, "ab", buffering=0, opener=_at_once)
        self.size = path.stat().st_size
        self.sha = hashlib.sha256()
        self.hashed = 0

    def append(self, data: memoryview) -> None:
        """Write at the end.

        Args:
            data: What to write.

        Raises:
            DiskFull: If the disk does not take it; then nothing is added.
            FailedPrecondition: If it cannot be written for another reason, likewise.
        """
        self.catch_up()
        with told():
            try:
                written = 0
                while written < data.nbytes:
                    count = self.file.write(data[written:])
                    if not count:  # what takes no byte would take none for ever
                        raise OSError(errno.EIO, os.strerror(errno.EIO))
                    written += count
            except OSError:
                self.file.truncate(self.size)
                raise
        self.sha.update(data)
        self.size += data.nbytes
        self.hashed = self.size

    def catch_up(self) -> None:
        """Hash what an earlier upload has left; only that is read again."""
        if self.hashed == self.size:
            return
        with self.path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                self.sha.update(block)
        self.hashed = self.size

    def clear(self) -> None:
        """Drop what is there."""
        self.file.truncate(0)
        self.size = self.hashed = 0
        self.sha = hashlib.sha256()

    def close(self) -> None:
        """Close the file; what is in it stays."""
        self.file.close()


class Upload:
    """Appends to a blob that is not complete.

    Args:
        partial: The file, perhaps shared with another upload of the same bytes.
        path: Where the complete blob goes.
        offset: Where the next bytes belong.
        total_bytes: Size of the whole file.
        arrived: Given the complete file, verified, and where it goes.
    """

    def __init__(
        self,
        partial: Partial,
        path: Path,
        offset: int,
        total_bytes: int,
        arrived: Callable[[Path, Path], None],
    ) -> None:
        self._partial, self._path, self._arrived = partial, path, arrived
        self._position, self._total = offset, total_bytes
        self._found = partial.size

    def write(self, data: memoryview) -> None:
        """Take the next bytes.

        Args:
            data: What follows what was written before.

        Raises:
            InvalidTensors: If there are more than announced.
        """
        if self._position + data.nbytes > self._total:
            msg = f"more than the {self._total} bytes that the upload announces"
            raise InvalidTensors(msg, total_bytes=self._total)
        with self._partial.lock:
            known = self._partial.size - self._position
            if known < 0:
                msg = "another upload of the same digest brought other bytes; ask again"
                raise Unavailable(msg, digest=self._path.name)
            if known < data.nbytes and not self._partial.is_complete:
                self._partial.append(data[known:])
        self._position += data.nbytes

    def finish(self) -> bool:
        """Verify and keep the blob if it is complete.

        Returns:
            Whether it is; what has arrived is kept in any case.

        Raises:
            InvalidTensors: If the bytes do not have the digest; they are dropped.
            Unavailable: If so, and some of them were here before.
        """
        if self._position < self._total:
            return False
        partial = self._partial
        with partial.lock:
            if partial.is_complete:
                return True  # the other upload of the same bytes was first
            partial.catch_up()
            digest = partial.sha.hexdigest()
            if digest != self._path.name or partial.size != self._total:
                partial.clear()
                if self._found:
                    # Perhaps the fault is ours, or that of whoever sent those.
                    msg = (
                        f"the {self._found} bytes that were here before and those that "
                        "arrived now do not make the file; send all of them again"
                    )
                    raise Unavailable(msg, digest=self._path.name)
                msg = (
                    f"the bytes that arrived have SHA-256 {digest}, the upload announces "
                    f"{self._path.name}; nothing of them was kept"
                )
                raise InvalidTensors(msg, digest=digest, announced=self._path.name)
            with told():
                os.fsync(partial.file.fileno())
                self._arrived(partial.path, self._path)
                fsync_directory(self._path.parent)
            partial.is_complete = True
        return True


def make_room(
    path: Path, total_bytes: int, busy: Mapping[Path, int], *, limit_bytes: int
) -> None:
    """Refuse an upload that does not fit, after the oldest idle ones made room.

    Those go first of whoever has most, so that nobody drives out others' by many of his own.

    Args:
        path: Where it goes; perhaps a part of it is there.
        total_bytes: The size that it will have.
        busy: Uploads under way, and what they will have.
        limit_bytes: The most bytes of all uploads in that folder together.

    Raises:
        LimitExceeded: If others under way leave it no room.
        DiskFull: If the disk has none.
    """
    found = {}
    for file in path.parent.glob("*.part"):
        with contextlib.suppress(FileNotFoundError):  # it was completed meanwhile
            found[file] = file.lstat()
    sizes = {file: status.st_size for file, status in found.items()}
    committed = sizes.pop(path, 0)
    idle = sorted(sizes.keys() - busy.keys(), key=lambda p: found[p].st_mtime)
    sizes.update(busy)

    def are_too_many() -> bool:
        return len(sizes) >= MOST_PARTIALS

    def is_full() -> bool:
        return are_too_many() or sum(sizes.values()) + total_bytes > limit_bytes

    while idle and is_full():
        weights = dict.fromkeys(idle, 1) if are_too_many() else sizes
        victim = _oldest_of_the_largest(idle, weights)
        idle.remove(victim)
        sizes.pop(victim)
        victim.unlink(missing_ok=True)
    if is_full():
        msg = (
            f"{len(sizes)} uploads of {sum(sizes.values())} bytes are under way; "
            f"{total_bytes} more would exceed the limit of {limit_bytes} "
            f"(partial_bytes) or of {MOST_PARTIALS} uploads. Wait until some are "
            "complete"
        )
        raise LimitExceeded(msg, limit=limit_bytes)
    free = shutil.disk_usage(path.parent).free
    if total_bytes - committed > free:
        msg = (
            f"the upload needs {total_bytes - committed} bytes more, and the disk "
            f"has {free} free: {FREE_SOME}"
        )
        raise DiskFull(msg, free_bytes=free)


def _oldest_of_the_largest(idle: Sequence[Path], weights: Mapping[Path, int]) -> Path:
    """Choose among idle uploads, the oldest first: one of the caller who has most."""
    held: Counter[str] = Counter()
    for path in idle:
        held[path.suffixes[0]] += weights[path]
    return max(idle, key=lambda path: held[path.suffixes[0]])  # the first of equals


def fsync_directory(directory: Path) -> None:
    """Have what was renamed in a folder survive a crash of the machine."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _at_once(path: str, flags: int) -> int:
    """Open without waiting: a pipe that has the name of a file has no reader."""
    return os.open(path, flags | os.O_NONBLOCK, 0o600)
