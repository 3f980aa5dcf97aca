"""Blobs on disk: safetensors files under the SHA-256 of their bytes.

``<data_dir>/blobs/<digest>`` is complete; ``<digest>.part`` is an upload that may go on.
Two uploads of the same bytes by one caller help each other: what one of them has written,
the other need not. Methods block on the disk; call them off the event loop.

A digest proves nothing, the bytes do. A blob is there for whoever has sent all of it, as long
as something of his needs it (`claims`), and for nobody else: others have to send it, too, into
a file of their own (``<digest>.<caller>.part``), and what lies on the disk once cannot be told
from what does not lie there at all.

A record goes before its blob does. In between ``<digest>.leaving`` says so, so that a server
that was killed there finds what it has left when it starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from curvd.errors import (
    InvalidSpec,
)
from curvd.tensors import safetensors_header
from curvd_server.storage.blobs import Blob, read_header
from curvd_server.storage.claims import Claims
from curvd_server.storage.mounts import Mounts
from curvd_server.storage.partial_upload import Partial, Upload, make_room
from curvd_server.storage.snapshots import Stamp
from curvd_server.storage.sound_files import DAMAGED, SoundFiles
from curvd_server.system import (
    HostMemory,
    Quotas,
    calling,
    logger,
    told,
)
from curvd_server.system.quotas import DISK_BYTES, UPLOADS

_WATCHED_S = 3600.0
"""How long this process must have seen that nobody uses a file before it is removed: the
clock may have been set meanwhile."""

_ABANDONED_S = 600.0
"""After which what a caller has sent, and nothing needs, makes room for what he sends."""
_LEAVING, _PART = ".leaving", ".part"


def _nothing(digest: str | None = None) -> Mapping[str, set[str]]:
    """Say that nothing refers to any blob."""
    return {}


class BlobStore:
    """The blobs of one data directory.

    Args:
        directory: Where they lie; made if it is not there.
        mounts: Finds further ones, which lie where their owner put them.
        needed_by: Names what needs a blob, for whoever has to be told that it is lost.
        partial_bytes: Disk of all uploads that are not complete.
        partial_s: How long one is kept that nobody goes on with, or refers to.
        memory: The memory of the host, which open blobs share with others; None: no limit.
        referrers: Tells who owns what refers to blobs (digest -> names of owners), to one of
            a digest or to any: who has sent those that are there from before, and what must
            stay. It is asked while nobody can begin to hold a blob, so that no new reference
            is missed.
        quotas: What single callers may have on the disk.
    """

    def __init__(
        self,
        directory: Path,
        mounts: Mounts | None = None,
        needed_by: Callable[[str], list[str]] = lambda digest: [],
        *,
        partial_bytes: int = 128 << 30,
        partial_s: float = 24 * 3600.0,
        memory: HostMemory | None = None,
        referrers: Callable[[str | None], Mapping[str, set[str]]] = _nothing,
        quotas: Quotas | None = None,
    ) -> None:
        self._quotas = quotas or Quotas()
        self._referrers = referrers
        self._claims = Claims(referrers(None), time.time())
        self._partial_bytes, self._partial_s = partial_bytes, partial_s
        # When this process began to see that nobody uses a file.
        self._watched: dict[str, float] = {}
        self._directory = directory
        self._files = SoundFiles(directory, mounts, needed_by, memory or HostMemory())
        self._make_directory()
        self._lock = threading.Lock()
        self._partials: dict[str, Partial] = {}

    def has(self, digest: str) -> bool:
        """Tell whether a blob is there for the caller, without a look at its bytes."""
        if self._was_sent(digest) and self._path(digest).exists():
            return True
        return self._files.is_mounted(digest)

    def is_sound(self, digest: str) -> bool:
        """Tell whether a blob is there for the caller, undamaged; if not, it is welcome.

        Args:
            digest: The digest of the blob. It is hashed, unless that was done since the start.

        Returns:
            Whether it is there. If it was damaged, it has been moved aside.

        Raises:
            FailedPrecondition: If the server may not read it.
        """
        if not self._files.is_mounted(digest) and not self._was_sent(digest):
            return False
        return self._files.is_sound(digest)

    def committed_bytes(self, digest: str) -> int:
        """Tell from where an upload of the caller's goes on."""
        path = self._part(digest)
        with self._lock:
            partial = self._partials.get(path.stem)
            if partial is not None:
                return partial.size
        try:
            return path.lstat().st_size
        except FileNotFoundError:
            return 0

    def size(self, digest: str) -> int:
        """Tell how large a complete blob is; 0 if it is not there.

        Args:
            digest: The digest of the blob.
        """
        try:
            return self._files.find(digest).stat().st_size
        except OSError:
            return 0

    def check_quota(self, digest: str, total_bytes: int) -> None:
        """Refuse an upload that the caller has no quota for.

        Args:
            digest: SHA-256 of the whole file.
            total_bytes: Its size.

        Raises:
            LimitExceeded: If the caller's disk or uploads do not allow it.
        """
        with self._lock:
            self._check_quota(self._part(digest), total_bytes)

    @contextlib.contextmanager
    def held(self, digest: str) -> Iterator[None]:
        """Keep a blob from being removed before something refers to it.

        Args:
            digest: The digest of the blob, which need not be there yet.

        Yields:
            Nothing.
        """
        name = calling().name
        with self._lock:
            self._claims.hold(digest, name)
        try:
            yield
        finally:
            with self._lock:
                self._claims.let_go(digest, name)

    @contextlib.contextmanager
    def upload(self, digest: str, *, offset: int, total_bytes: int) -> Iterator[Upload]:
        """Write a blob, or the rest of one.

        Args:
            digest: SHA-256 that the whole file must have.
            offset: Where the first bytes belong; at most the committed bytes.
            total_bytes: Size of the whole file.

        Yields:
            Takes the bytes. Leaving early keeps what has arrived.

        Raises:
            InvalidSpec: If the offset would leave a gap.
            LimitExceeded: If other uploads take the room.
            DiskFull: If the disk has none.
        """
        path = self._part(digest)
        with self._lock:
            partial = self._partials.get(path.stem)
            if partial is None:
                self._give_up(self._check_quota(path, total_bytes))
                busy = {p.path: p.announced for p in self._partials.values()}
                self._make_directory()  # somebody may have removed it
                with told():
                    make_room(path, total_bytes, busy, limit_bytes=self._partial_bytes)
                partial = self._partials[path.stem] = Partial(path)
            partial.announced = max(partial.announced, total_bytes)
            partial.users += 1
        try:
            if offset > partial.size:
                msg = (
                    f"upload.offset {offset} is beyond the {partial.size} bytes that "
                    "have arrived: go on from there"
                )
                raise InvalidSpec(msg, offset=offset, committed_bytes=partial.size)
            yield Upload(
                partial, self._path(digest), offset, total_bytes, self._arrived
            )
        finally:
            with self._lock:
                partial.users -= 1
                if not partial.users:
                    partial.close()
                    del self._partials[path.stem]

    def open(self, digest: str) -> Blob:
        """Read a complete blob, unless somebody has it open.

        Args:
            digest: The digest.

        Returns:
            Its tensors.

        Raises:
            NotFound: If it is not there.
            DataLoss: If its bytes were damaged.
            FailedPrecondition: If it lies outside and was changed there.
            InvalidTensors: If it is no safetensors file.
            LimitExceeded: If its header is too large.
        """
        snapshot = self._files.snapshot(digest)
        data = snapshot.view()
        header, start = read_header(data)
        arrays = {n: tensor.view(data[start:]) for n, tensor in header.items()}
        metadata = safetensors_header.load_metadata(data[8:start].tobytes())
        return Blob(digest, header, arrays, snapshot.size, metadata)

    def write(
        self, digest: str, pieces: Iterable[memoryview], total_bytes: int
    ) -> None:
        """Keep a blob that the server puts together itself, unless it is there.

        Args:
            digest: Its SHA-256.
            pieces: Its bytes.
            total_bytes: How many.

        Raises:
            LimitExceeded: If uploads take the room.
            DiskFull: If the disk has none.
        """
        if self.is_sound(digest):
            return
        with self.upload(digest, offset=0, total_bytes=total_bytes) as writer:
            for piece in pieces:
                writer.write(piece)
            assert writer.finish()

    def hand_over(self, digest: str, owner: str) -> None:
        """Note whose a blob has become that the caller has sent.

        Args:
            digest: The digest of the blob.
            owner: Who owns what refers to it now; his claim ends by `release`.
        """
        name = calling().name
        if owner != name:
            with self._lock:
                self._claims.add(digest, owner, time.time())
                self._claims.put_off(digest, name)

    def mark_leaving(self, digest: str, owner: str) -> None:
        """Note on the disk that what needs a blob is about to go, before it does.

        Args:
            digest: The digest of the blob, which `release` is to be told of afterwards.
            owner: Who needed it until now.
        """
        with self._lock:
            if self._claims.of_blob(digest).keys() - {owner}:
                return  # it stays for others
        # On a disk that is full there may be no room for a note, and there must be a way
        # to make some: then it is a file that nothing needs, which `sweep` finds.
        with contextlib.suppress(OSError):
            self._path(digest, _LEAVING).touch(mode=0o600)

    def collect(self) -> None:
        """Remove what a deletion has left that was cut off; before anybody calls."""
        needed = self._referrers(None)
        for note in self._directory.glob(f"*{_LEAVING}"):
            if note.stem not in needed:
                with contextlib.suppress(InvalidSpec):  # a file that is not ours
                    self._path(note.stem).unlink(missing_ok=True)
                    logger().info("collected", blob=note.stem)
            note.unlink(missing_ok=True)

    def release(self, digest: str, owner: str | None = None) -> None:
        """Take a blob from somebody none of whose things needs it any more.

        With the last claim to it the file goes; one that somebody holds, at a later `sweep`.

        Args:
            digest: The digest of the blob.
            owner: Who needed it until now; None: the caller.
        """
        if owner is None and not self._was_sent(digest):
            return
        name = calling().name if owner is None else owner
        with self._lock:
            needed_by = self._referrers(digest).get(digest, set())
            if name not in needed_by:
                if not self._claims.is_held(digest, name):
                    self._claims.drop(digest, name)
                if digest in self._claims.held():
                    self._claims.put_off(digest, name)
                elif not needed_by:
                    self._remove_unclaimed(digest)
            self._path(digest, _LEAVING).unlink(missing_ok=True)

    def sweep(self, *, now_s: float, monotonic_s: float) -> None:
        """Remove what nothing refers to and nobody goes on with; now and then.

        Args:
            now_s: Seconds since the epoch.
            monotonic_s: Seconds that nobody can set.
        """
        with self._lock:
            held, needed = self._claims.held(), self._referrers(None)
            for digest, name in self._claims.due():
                if name not in needed.get(digest, ()):
                    self._claims.drop(digest, name)
                    if digest not in needed:
                        self._remove_unclaimed(digest)
            used = needed.keys() | self._partials.keys() | held
            watched, self._watched = self._watched, {}

            def is_over(name: str, since_s: float) -> bool:
                """Tell whether something is old, and was watched long enough as well."""
                first_s = watched.get(name, monotonic_s)
                patience_s = min(self._partial_s, _WATCHED_S)
                over = now_s - since_s > self._partial_s
                if over and monotonic_s - first_s >= patience_s:
                    return True
                self._watched[name] = first_s
                return False

            for path in self._directory.iterdir():
                if path.suffix == DAMAGED or path.name.partition(".")[0] in held:
                    continue
                claims = self._claims.of_blob(path.name)
                for name in claims.keys() - needed.get(path.name, set()):
                    if claims[name] > now_s:  # the clock was set back
                        self._claims.add(path.name, name, now_s)
                    elif is_over(f"{path.name} {name}", claims[name]):
                        self._claims.drop(path.name, name)
                if path.stem in used:
                    continue
                since_s = path.lstat().st_mtime
                if since_s > now_s:
                    os.utime(path, (now_s, now_s))
                    since_s = now_s
                if is_over(path.name, since_s) and not self._claims.of_blob(path.name):
                    path.unlink()

    def _remove_unclaimed(self, digest: str) -> None:
        """Remove a blob that nothing refers to, unless somebody has a claim to it."""
        if not self._claims.of_blob(digest):
            self._path(digest).unlink(missing_ok=True)
            self._files.forget(digest)

    def _arrived(self, part: Path, path: Path) -> None:
        """Keep a file whose bytes were hashed as they came, unless it lies here already."""
        digest = path.name
        with self._lock:
            sent_s = part.stat().st_mtime
            try:
                known = self._files.is_known(digest, Stamp.of(path.stat()))
            except OSError:  # nothing, or what rot has made of it
                known = False
            if known:
                part.unlink()
            else:
                part.rename(path)
                self._files.note(digest, Stamp.of(path.stat()))
            self._claims.add(digest, calling().name, sent_s)

    def _check_quota(self, path: Path, total_bytes: int) -> list[Path]:
        """Refuse an upload that the caller has no quota for.

        Args:
            path: Where it goes.
            total_bytes: Its size.

        Returns:
            What of his makes room for it, the oldest first: uploads that nobody is sending,
            and what was complete long ago and nothing needs.

        Raises:
            LimitExceeded: If even without those there is no room.
        """
        quota = self._quotas.of(calling())
        if quota.disk_bytes is None and quota.uploads is None:
            return []
        sizes: dict[Path, int] = {}
        idle: list[tuple[float, Path]] = []
        for part in self._directory.glob(f"*{path.suffixes[0]}.part"):
            partial = self._partials.get(part.stem)
            with contextlib.suppress(FileNotFoundError):
                status = part.stat()
                sizes[part] = status.st_size
                if partial is None:
                    idle.append((status.st_mtime, part))
                else:  # it will have all that was announced
                    sizes[part] = max(status.st_size, partial.announced)
        sizes.pop(path, None)
        uploads = len(sizes)
        needed, now_s = self._referrers(None), time.time()
        for digest, sent_s in self._claims.of_caller(calling().name).items():
            with contextlib.suppress(FileNotFoundError):
                sizes[self._path(digest)] = self._path(digest).stat().st_size
                is_needed = calling().name in needed.get(digest, ())
                if not is_needed and now_s - sent_s > _ABANDONED_S:
                    idle.append((sent_s, self._path(digest)))
        going, held = [], sum(sizes.values())
        for _, file in sorted(idle):
            over = (
                quota.disk_bytes is not None and held + total_bytes > quota.disk_bytes
            )
            many = quota.uploads is not None and uploads >= quota.uploads
            is_part = file.suffix == _PART
            if file == path or file.name.partition(".")[0] in self._claims.held():
                continue  # somebody is about to go on with it
            if over or (many and is_part):
                going.append(file)
                held, uploads = held - sizes[file], uploads - is_part
        self._quotas.check(UPLOADS, uploads, 1)
        self._quotas.check(DISK_BYTES, held, total_bytes)
        return going

    def _give_up(self, files: Iterable[Path]) -> None:
        """Remove uploads of the caller's, and take from him what is complete."""
        for file in files:
            if file.suffix == _PART:
                file.unlink(missing_ok=True)
            else:
                self._claims.drop(file.name, calling().name)
                if file.name not in self._referrers(file.name):
                    self._remove_unclaimed(file.name)

    def _was_sent(self, digest: str) -> bool:
        """Tell whether the caller has sent all bytes of a blob, or need not have."""
        return self._claims.has(digest, calling().name)

    def _part(self, digest: str) -> Path:
        """Find the place of what the caller has sent of a blob."""
        name = calling().name
        whose = hashlib.sha256(name.encode()).hexdigest()[:32]
        return self._path(digest, f".{whose}.part" if name else ".part")

    def _make_directory(self) -> None:
        with told():
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _path(self, digest: str, suffix: str = "") -> Path:
        return self._files.path(digest, suffix)
