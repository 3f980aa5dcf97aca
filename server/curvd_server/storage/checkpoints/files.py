"""Files below one folder, read piece by piece, each time as they were when first seen."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curvd.errors import FailedPrecondition, InvalidTensors, Unavailable
from curvd.tensors import Buffer
from curvd_server.storage.snapshots import Stamp


@dataclass(frozen=True, slots=True)
class File:
    """A regular file below the root. It is open only while it is read."""

    root: Path
    """Resolved."""
    path: Path
    stamp: Stamp
    """From when it was first seen."""

    @classmethod
    def at(cls, root: Path, path: Path) -> File:
        """Look at a file.

        Raises:
            FailedPrecondition: If it is no file below the root, or cannot be read.
        """
        descriptor = _opened(root, path)
        try:
            return cls(root, path, Stamp.of(os.fstat(descriptor)))
        finally:
            os.close(descriptor)

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.stamp.size

    def read(self, start: int, nbytes: int) -> Buffer:
        """Read some of its bytes.

        Args:
            start: Offset of the first.
            nbytes: How many.

        Returns:
            [nbytes] In memory of its own.

        Raises:
            InvalidTensors: If it ends before.
            Unavailable: If it has changed since it was first seen.
        """
        if start < 0 or nbytes < 0 or start + nbytes > self.size:
            msg = (
                f"{self.path.name} has {self.size} bytes, where bytes {start} to "
                f"{start + nbytes} should be: the checkpoint is damaged, or not complete"
            )
            raise InvalidTensors(msg, file=self.path.name)
        data = np.empty(nbytes, np.uint8)
        descriptor = _opened(self.root, self.path)
        try:
            done = 0
            while done < nbytes:
                count = os.preadv(descriptor, [data[done:].data], start + done)
                if not count:
                    break
                done += count
            changed = done < nbytes or Stamp.of(os.fstat(descriptor)) != self.stamp
        finally:
            os.close(descriptor)
        if changed:
            msg = (
                f"{self.path.name} was written to while the checkpoint was read; try "
                "again once it is complete"
            )
            raise Unavailable(msg, file=self.path.name)
        return data


def _opened(root: Path, path: Path) -> int:
    """Open a file, and make sure where it is once it cannot be exchanged any more."""
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags)
    except OSError as error:
        msg = f"{path.name} of the checkpoint cannot be read: {error.strerror}"
        raise FailedPrecondition(msg, file=path.name) from error
    except ValueError as error:  # a zero byte, or half a character
        msg = f"the checkpoint names a file {path.name!r}, which no file can be called"
        raise InvalidTensors(msg) from error
    is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
    found = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    if not is_file or not found.is_relative_to(root):
        os.close(descriptor)
        msg = (
            f"{path.name} of the checkpoint is no file below checkpoints_root, perhaps a "
            "link that leads out of it: the server reads nothing else"
        )
        raise FailedPrecondition(msg, file=path.name)
    return descriptor
