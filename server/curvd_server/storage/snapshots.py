"""The bytes of a file as they were, in memory that belongs to this process.

A mapping of the file itself would change under its readers when somebody writes to the
file, and end the process (SIGBUS) when somebody shortens it. So the bytes are copied
once, into an anonymous file that has no name for others; every reader maps that, and
all of them share its pages until they write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import mmap
import os
import stat
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from curvd.errors import Unavailable
from curvd.tensors import Buffer

_READ_BYTES = 8 << 20
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Stamp(NamedTuple):
    """What the file system says of a file; it changes with the content."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    """Unlike the time of modification, nobody can set it back."""

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """Read it off a status."""
        return cls(
            status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )


class Snapshot:
    """A copy of a file.

    Args:
        path: The path of the file.
        digest: Whether to hash the bytes while they are copied.

    Raises:
        FileNotFoundError: If it is not there.
        OSError: If it cannot be read, or there is no memory for it.
        Unavailable: If it changes while it is read.
    """

    def __init__(self, path: Path, *, digest: bool) -> None:
        sha = hashlib.sha256()
        with _opened(path) as file:
            self.stamp = Stamp.of(os.fstat(file.fileno()))
            flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
            self._memory = os.memfd_create("curvd-snapshot", flags)
            weakref.finalize(self, os.close, self._memory).atexit = False
            os.ftruncate(self._memory, self.size)
            with self._mapped(mmap.ACCESS_WRITE) as whole, memoryview(whole) as target:
                done = 0
                while done < self.size:
                    piece = target[done : done + _READ_BYTES]
                    count = file.readinto(piece) or 0
                    if digest:
                        sha.update(piece[:count])
                    piece.release()
                    if not count:
                        break
                    done += count
            if done < self.size or Stamp.of(os.fstat(file.fileno())) != self.stamp:
                msg = f"{path.name} was written to while it was read; try again"
                raise Unavailable(msg, file=path.name)
        # Whoever is handed it can change it as little as we can.
        fcntl.fcntl(self._memory, fcntl.F_ADD_SEALS, _SEALS)
        self.digest = sha.hexdigest() if digest else None
        """SHA-256 of what was read, if it was asked for."""

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.stamp.size

    def view(self) -> Buffer:
        """Map the bytes.

        Returns:
            [size] Writes to it stay private. It keeps the copy alive.
        """
        if not self.size:
            return np.empty(0, np.uint8)
        mapped = _View(self._memory, self.size, access=mmap.ACCESS_COPY)
        mapped.snapshot = self
        return np.frombuffer(mapped, np.uint8)

    def _mapped(
        self, access: int
    ) -> contextlib.AbstractContextManager[mmap.mmap | bytearray]:
        if not self.size:
            return contextlib.nullcontext(bytearray())
        return mmap.mmap(self._memory, self.size, access=access)


class _View(mmap.mmap):
    """A mapping that keeps what it maps."""

    snapshot: Snapshot


class Region(NamedTuple):
    """Where the bytes of an array lie in memory that another process can map."""

    memory: int
    """The descriptor; it belongs to the snapshot, which the array keeps."""
    offset: int


def region_of(array: NDArray[Any]) -> Region | None:
    """Say where an array lies, for another process of this machine to map it.

    Args:
        array: Contiguous.

    Returns:
        The place; None if it is no view of a snapshot.
    """
    base = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    mapped = base.base
    if isinstance(mapped, memoryview):
        mapped = mapped.obj
    if not isinstance(mapped, _View):
        return None
    return Region(mapped.snapshot._memory, array.ctypes.data - base.ctypes.data)


def mapped(memory: int) -> Buffer:
    """Map the memory of another process's snapshot.

    Args:
        memory: A descriptor; it is closed.

    Returns:
        [size] Writes to it stay private.
    """
    try:
        return np.frombuffer(mmap.mmap(memory, 0, access=mmap.ACCESS_COPY), np.uint8)
    finally:
        os.close(memory)


def digest_of(path: Path) -> tuple[str, Stamp]:
    """Hash a file without keeping it.

    Args:
        path: The path of the file.

    Returns:
        Its SHA-256, and its stamp from before it was read.
    """
    with _opened(path) as file:
        stamp = Stamp.of(os.fstat(file.fileno()))
        return hashlib.file_digest(file, "sha256").hexdigest(), stamp


def _opened(path: Path) -> io.FileIO:
    """Open a file; what has its name and is none (a folder, a pipe) is refused at once.

    Raises:
        OSError: As if the disk could not read it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EIO, "is no file", str(path))
    return io.FileIO(descriptor)
