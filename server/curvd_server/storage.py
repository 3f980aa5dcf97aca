"""Blobs on disk: safetensors files under the SHA-256 of their bytes.

``<data_dir>/blobs/<digest>`` is complete and verified; ``<digest>.part`` is an upload
that may go on. Two uploads of the same bytes help each other: what one of them has
written, the other need not. Methods block on the disk; call them off the event loop.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from curvd import tensorfile
from curvd.errors import (
    InvalidSpec,
    InvalidTensors,
    LimitExceeded,
    NotFound,
)
from curvd_server.mounts import Mounts
from curvd_server.partials import Partial, Upload

ABANDONED_S = 24 * 3600.0
"""An upload that nobody went on with, or referred to, for so long is removed."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_digest(digest: str) -> str:
    """Refuse what is no SHA-256, and so could be a path.

    Args:
        digest: From a stranger.

    Returns:
        The digest.

    Raises:
        InvalidSpec: Unless it is 64 lower-case hexadecimal digits.
    """
    if _DIGEST.fullmatch(digest) is None:
        msg = f"digest must be 64 lower-case hexadecimal digits, got {digest[:80]!r}"
        raise InvalidSpec(msg, digest=digest[:80])
    return digest


@dataclass(frozen=True)
class Blob:
    """A complete safetensors file, mapped into memory."""

    digest: str
    header: tensorfile.Header
    arrays: Mapping[str, NDArray[Any]]
    """Tensor name to a view of the file; BF16 as uint16 bits. Writes stay private."""
    total_bytes: int


class BlobStore:
    """The blobs of one data directory.

    Args:
        directory: Where they lie; made if it is not there.
        mounts: Finds further ones, which lie where their owner put them.
    """

    def __init__(self, directory: Path, mounts: Mounts | None = None) -> None:
        self._directory = directory
        self._mounts = mounts
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._partials: dict[str, Partial] = {}
        self._held: Counter[str] = Counter()

    def has(self, digest: str) -> bool:
        """Tell whether a blob is complete."""
        mounts = self._mounts
        return self._path(digest).exists() or (
            mounts is not None and mounts.holds(digest)
        )

    def committed_bytes(self, digest: str) -> int:
        """Tell from where an upload goes on."""
        with self._lock:
            partial = self._partials.get(digest)
            if partial is not None:
                return partial.size
        try:
            return self._path(digest, ".part").stat().st_size
        except FileNotFoundError:
            return 0

    @contextlib.contextmanager
    def held(self, digest: str) -> Iterator[None]:
        """Keep a blob from being removed before something refers to it.

        Args:
            digest: Of the blob, which need not be there yet.

        Yields:
            Nothing.
        """
        with self._lock:
            self._held[digest] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held[digest] -= 1

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
        """
        with self._lock:
            partial = self._partials.get(digest)
            if partial is None:
                partial = Partial(self._path(digest, ".part"))
                self._partials[digest] = partial
            partial.users += 1
        try:
            if offset > partial.size:
                msg = (
                    f"upload.offset {offset} is beyond the {partial.size} bytes that "
                    "have arrived: go on from there"
                )
                raise InvalidSpec(msg, offset=offset, committed_bytes=partial.size)
            yield Upload(partial, self._path(digest), offset, total_bytes)
        finally:
            with self._lock:
                partial.users -= 1
                if not partial.users:
                    partial.close()
                    del self._partials[digest]

    def open(self, digest: str) -> Blob:
        """Map a complete blob.

        Args:
            digest: Which.

        Returns:
            Its tensors; nothing is read before it is looked at.

        Raises:
            NotFound: If it is not there.
            InvalidTensors: If it is no safetensors file.
            LimitExceeded: If its header is too large.
        """
        path = self._path(digest)
        if self._mounts is not None and not path.exists():
            path = self._mounts.path(digest) or path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                header, start = read_header(file, size)
            # Copy-on-write: torch wants memory that it could write to.
            payload = (
                np.memmap(path, np.uint8, mode="c", offset=start, shape=size - start)
                if size > start
                else np.empty(0, np.uint8)
            )
        except FileNotFoundError:
            msg = f"blob {digest} is not on this server"
            raise NotFound(msg, digest=digest) from None
        arrays = {name: tensor.view(payload) for name, tensor in header.items()}
        return Blob(digest, header, arrays, size)

    def release(self, digest: str, needed: Callable[[], set[str]]) -> None:
        """Remove a blob that nothing needs any more.

        Args:
            digest: Of the blob. One that is held goes at a later `sweep`.
            needed: Finds the digests to keep. It is asked while nobody can begin to
                hold the blob, so that a new reference is never missed.
        """
        with self._lock:
            if not self._held[digest] and digest not in needed():
                self._path(digest).unlink(missing_ok=True)

    def sweep(self, referenced: set[str], *, now_s: float | None = None) -> None:
        """Remove what nothing refers to and nobody goes on with; for start-up.

        Args:
            referenced: Digests to keep.
            now_s: Seconds since the epoch.
        """
        now_s = time.time() if now_s is None else now_s
        for path in self._directory.iterdir():
            idle_s = now_s - path.stat().st_mtime
            if path.name not in referenced and idle_s > ABANDONED_S:
                path.unlink()

    def _path(self, digest: str, suffix: str = "") -> Path:
        return self._directory / (check_digest(digest) + suffix)


def read_header(file: BinaryIO, size: int) -> tuple[tensorfile.Header, int]:
    """Read and check the header of a safetensors file.

    Args:
        file: At its beginning.
        size: Bytes in the file.

    Returns:
        The header, and the offset of the payload.

    Raises:
        InvalidTensors: If it is malformed, or the payload has another size.
        LimitExceeded: If it is too large.
    """
    length = int.from_bytes(file.read(8), "little")
    start = 8 + length
    if length > tensorfile.MAX_HEADER_BYTES:
        msg = (
            f"the safetensors header announces {length} bytes; the limit is "
            f"{tensorfile.MAX_HEADER_BYTES}. Send fewer tensors, or flatten them into one"
        )
        raise LimitExceeded(msg, header_bytes=length, limit=tensorfile.MAX_HEADER_BYTES)
    if size < start:
        msg = f"the file has {size} bytes and ends within its header of {start}"
        raise InvalidTensors(msg, total_bytes=size)
    header = tensorfile.load_header(file.read(length))
    if size - start != tensorfile.payload_bytes(header):
        msg = (
            f"the file has {size - start} bytes of payload, but its header describes "
            f"{tensorfile.payload_bytes(header)}"
        )
        raise InvalidTensors(msg, payload_bytes=size - start)
    return header, start
