"""Files of blobs whose bytes are what their digests say.

Disks forget. A file is hashed when it is first used after a start, and again whenever it was
touched, before anything depends on it. One that has another digest is moved aside, to
``<digest>.damaged``, so that the same content can be uploaded again.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from curvd.errors import (
    CurvdError,
    DataLoss,
    FailedPrecondition,
    LimitExceeded,
    NotFound,
)
from curvd_server.storage.blobs import check_digest
from curvd_server.storage.mounts import Mounts
from curvd_server.storage.snapshots import Snapshot, Stamp, digest_of
from curvd_server.system import (
    SNAPSHOTS,
    HostMemory,
    logger,
    look_before_refusing,
    told,
)

DAMAGED = ".damaged"


class SoundFiles:
    """The files of one folder, and those that their owner put elsewhere.

    Args:
        directory: Where they lie, under their digests.
        mounts: Finds further ones.
        needed_by: Names what needs a blob, for whoever has to be told that it is lost.
        memory: The memory of the host, which files that are open share with others.
    """

    def __init__(
        self,
        directory: Path,
        mounts: Mounts | None,
        needed_by: Callable[[str], list[str]],
        memory: HostMemory,
    ) -> None:
        self._directory, self._mounts = directory, mounts
        self._needed_by, self._memory = needed_by, memory
        self._lock = threading.Lock()
        # What the file of a blob looked like when its bytes had the digest.
        self._sound: dict[str, Stamp] = {}
        self._snapshots: weakref.WeakValueDictionary[str, Snapshot] = (
            weakref.WeakValueDictionary()
        )
        # Of those who read a blob now: the second waits for what the first brings.
        self._reading: weakref.WeakValueDictionary[str, _Turn] = (
            weakref.WeakValueDictionary()
        )

    def path(self, digest: str, suffix: str = "") -> Path:
        """Say where a blob's file is to lie.

        Args:
            digest: Its digest.
            suffix: Of another file about the same blob.

        Returns:
            The place.

        Raises:
            InvalidSpec: If that is no digest.
        """
        return self._directory / (check_digest(digest) + suffix)

    def is_mounted(self, digest: str) -> bool:
        """Tell whether a blob lies where its owner put it."""
        return self._mounts is not None and self._mounts.holds(digest)

    def find(self, digest: str) -> Path:
        """Find the file of a blob, wherever it lies.

        Args:
            digest: Its digest.

        Returns:
            The file.

        Raises:
            NotFound: If there is none.
            DataLoss: If there was one, and something needs it.
        """
        path = self.path(digest)
        if not path.exists():
            found = None if self._mounts is None else self._mounts.path(digest)
            if found is None:
                raise self._missing(digest)
            path = found
        return path

    def is_sound(self, digest: str) -> bool:
        """Tell whether a blob's file is there, undamaged.

        Args:
            digest: Its digest. The file is hashed, unless that was done since the start.

        Returns:
            Whether it is there. If it was damaged, it has been moved aside.

        Raises:
            FailedPrecondition: If the server may not read it.
        """
        try:
            path = self.find(digest)
            with self._turn(digest):
                if not self.is_known(digest, Stamp.of(path.stat())):
                    with self._readable(digest, path):
                        found, stamp = digest_of(path)
                    self._judge(digest, path, found, stamp)
        except (CurvdError, FileNotFoundError) as error:
            if isinstance(error, FailedPrecondition) and self.path(digest).exists():
                raise  # it is ours, and an upload could not help
            if not isinstance(error, NotFound):
                logger().warning("unsound", blob=digest, error=str(error))
            return False
        return True

    def snapshot(self, digest: str) -> Snapshot:
        """Read a file whole, unless somebody has it open.

        Args:
            digest: The digest of the blob.

        Returns:
            Its bytes as they were when they had the digest.

        Raises:
            NotFound: If it is not there.
            DataLoss: If its bytes were damaged.
            FailedPrecondition: If it lies outside and was changed there.
            LimitExceeded: If the host has no memory for it.
        """
        path = self.find(digest)
        with self._turn(digest):
            snapshot = self._snapshots.get(digest)
            try:
                if snapshot is None or snapshot.stamp != Stamp.of(path.stat()):
                    snapshot = self._read(digest, path)
            except FileNotFoundError:
                raise self._missing(digest) from None
            self._snapshots[digest] = snapshot
        return snapshot

    def is_known(self, digest: str, stamp: Stamp) -> bool:
        """Tell whether a file that looks like this has its digest."""
        return self._sound.get(digest) == stamp

    def note(self, digest: str, stamp: Stamp) -> None:
        """Take note that a file that looks like this has its digest."""
        self._sound[digest] = stamp

    def forget(self, digest: str) -> None:
        """Take note that a file has gone."""
        self._sound.pop(digest, None)

    def _read(self, digest: str, path: Path) -> Snapshot:
        with self._readable(digest, path):
            known = self.is_known(digest, Stamp.of(path.stat()))
            snapshot = self._snapshot(path, digest=not known)
        if snapshot.digest is not None:
            self._judge(digest, path, snapshot.digest, snapshot.stamp)
        elif not self.is_known(digest, snapshot.stamp):
            return self._read(digest, path)  # it was touched since we looked
        return snapshot

    @contextlib.contextmanager
    def _readable(self, digest: str, path: Path) -> Iterator[None]:
        """Take what the disk cannot read for damaged, and say what the rights forbid."""
        try:
            yield
        except PermissionError as error:
            msg = (
                f"the server may not read {path.name} in {path.parent}: {error.strerror}; "
                "its operator has to give it the right, then try again"
            )
            raise FailedPrecondition(msg, digest=digest) from error
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self._refuse(digest, path, "cannot be read")

    def _snapshot(self, path: Path, *, digest: bool) -> Snapshot:
        """Copy a file, as long as the host has memory for it."""
        size, give = path.stat().st_size, self._memory.give
        try:
            self._memory.take(SNAPSHOTS, size)
        except LimitExceeded:
            if not look_before_refusing():
                raise
            self._memory.take(SNAPSHOTS, size)
        try:
            snapshot = Snapshot(path, digest=digest)
        except BaseException:
            give(SNAPSHOTS, size)
            raise
        weakref.finalize(snapshot, give, SNAPSHOTS, size).atexit = False
        return snapshot

    def _judge(self, digest: str, path: Path, found: str, stamp: Stamp) -> None:
        """Take note that bytes have their digest, or refuse them."""
        if found != digest:
            self._refuse(digest, path, f"has SHA-256 {found} now")
        self.note(digest, stamp)

    def _refuse(self, digest: str, path: Path, why: str) -> NoReturn:
        """Move a damaged blob aside, and say what is lost."""
        self._sound.pop(digest, None)
        if path.parent != self._directory:
            assert self._mounts is not None
            raise self._mounts.changed(digest)
        aside = path.with_suffix(DAMAGED)
        with told():
            if aside.is_dir() or path.is_dir():  # the one cannot take the other's place
                shutil.rmtree(aside, ignore_errors=True)
                aside.unlink(missing_ok=True)
            path.replace(aside)
        error = self._lost(digest, f"{why}; the file was moved aside to {aside.name}")
        logger().error("damaged", blob=digest, error=str(error))
        raise error

    def _missing(self, digest: str) -> CurvdError:
        if self._needed_by(digest):
            return self._lost(digest, "is not in the data directory any more")
        msg = f"blob {digest} is not on this server"
        return NotFound(msg, digest=digest)

    def _lost(self, digest: str, why: str) -> DataLoss:
        needed_by = self._needed_by(digest)
        what = f"what {'; '.join(needed_by[:8])} needs" if needed_by else "an upload"
        msg = (
            f"the server's disk has lost {what}: blob {digest} {why}. Register or upload "
            "the same content again, and whatever needs it works again"
        )
        return DataLoss(msg, digest=digest, lost="; ".join(needed_by))

    @contextlib.contextmanager
    def _turn(self, digest: str) -> Iterator[None]:
        with self._lock:
            turn = self._reading.setdefault(digest, _Turn())
        with turn.lock:
            yield


class _Turn:
    """Whoever holds its lock reads a blob."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
