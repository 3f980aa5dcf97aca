"""Datasets that lie on the server: safetensors files in one folder, used where they are.

A client names one; a name is never a path. ``<data_dir>/mounts/<digest>`` remembers which
file had that SHA-256, and its size and time, so that it is hashed once and a file that
was changed since is noticed. Methods block on the disk; call them off the event loop.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from curvd.errors import DatasetNotFound, FailedPrecondition, InvalidSpec
from curvd_server.system import told

SUFFIX = ".safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}")


def check_name(name: str) -> str:
    """Refuse what is no name, and so could be a path.

    Args:
        name: The name that a caller gave, not checked yet.

    Returns:
        The name.

    Raises:
        InvalidSpec: Unless it is letters, digits, ``_``, ``.`` and ``-``, without ``..``.
    """
    if _NAME.fullmatch(name) is None or ".." in name:
        msg = (
            "the name of a dataset has 1 to 128 letters, digits, '_', '.' and '-', begins "
            f"with a letter or digit and has no '..', got {name[:80]!r}"
        )
        raise InvalidSpec(msg, name=name[:80])
    return name


@dataclass(frozen=True, slots=True)
class _Known:
    """A file that was hashed."""

    name: str
    size: int
    mtime_ns: int


class Mounts:
    """The datasets of one folder.

    Args:
        root: The root of the files ``<name>.safetensors``; None if there are none.
        directory: Where their digests are remembered; made when needed.
    """

    def __init__(self, root: Path | None, directory: Path) -> None:
        self._root = None if root is None else root.resolve()
        self._directory = directory

    def names(self) -> tuple[str, ...]:
        """List the datasets."""
        if self._root is None:
            return ()
        found = (f.name.removesuffix(SUFFIX) for f in self._root.glob(f"*{SUFFIX}"))
        return tuple(sorted(n for n in found if self._file(n) is not None))

    def digest(self, name: str) -> str:
        """Hash a dataset, unless that was done.

        Args:
            name: The name that a caller gave, not checked yet.

        Returns:
            SHA-256 of its file, by which `path` finds it from now on.

        Raises:
            DatasetNotFound: If there is no such dataset.
        """
        path = self._file(check_name(name))
        if path is None:
            raise self._not_found(name)
        known = _stamp(name, path)
        for file in self._directory.glob("[0-9a-f]*"):
            if _read(file) == known:
                return file.name
        try:
            with path.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            msg = (
                f"dataset {name!r} cannot be read: {error.strerror}; the server's "
                "operator has to look at its file"
            )
            raise FailedPrecondition(msg, name=name) from error
        self._remember(digest, known)
        return digest

    def holds(self, digest: str) -> bool:
        """Tell whether `path` finds a file."""
        try:
            return self.path(digest) is not None
        except FailedPrecondition:
            return False

    def path(self, digest: str) -> Path | None:
        """Find the file of a dataset.

        Args:
            digest: As `digest` gave it.

        Returns:
            The file; None if none was known to have this digest.

        Raises:
            FailedPrecondition: If it has changed since, or is gone.
        """
        known = _read(self._directory / digest)
        if known is None:
            return None
        path = self._file(known.name)
        if path is None or _stamp(known.name, path) != known:
            raise self._changed(known.name, digest, is_gone=path is None)
        return path

    def changed(self, digest: str) -> FailedPrecondition:
        """Forget a file whose bytes have another digest now.

        Args:
            digest: As `digest` gave it; that hashes again.

        Returns:
            The error for whoever needs the file.
        """
        file = self._directory / digest
        known = _read(file)
        file.unlink(missing_ok=True)
        return self._changed(known.name if known else "?", digest, is_gone=False)

    @staticmethod
    def _changed(name: str, digest: str, *, is_gone: bool) -> FailedPrecondition:
        msg = (
            f"dataset {name!r} {'is gone' if is_gone else 'was changed'} since it was "
            "registered; register it again, or put the file back"
        )
        return FailedPrecondition(msg, name=name, digest=digest)

    def _file(self, name: str) -> Path | None:
        """Find a file in the folder itself; a link that leads out of it is none."""
        if self._root is None or _NAME.fullmatch(name) is None:
            return None
        try:
            path = (self._root / f"{name}{SUFFIX}").resolve()
        except (OSError, RuntimeError):  # a link that leads to itself
            return None
        return path if path.is_file() and path.is_relative_to(self._root) else None

    def _remember(self, digest: str, known: _Known) -> None:
        with told():
            self._write(digest, known)

    def _write(self, digest: str, known: _Known) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self._directory / f".{digest}"
        with new.open("w") as file:
            json.dump(asdict(known), file)
            file.flush()
            os.fsync(file.fileno())
        place = self._directory / digest
        if place.is_dir():
            place.rmdir()
        new.rename(place)

    def _not_found(self, name: str) -> DatasetNotFound:
        names = self.names()
        near = difflib.get_close_matches(name, names, n=3) or names[:3]
        msg = f"no dataset {name!r} is mounted on this server" + (
            f"; near it are {', '.join(map(repr, near))}"
            if near
            else "; its operator can mount some with datasets_root"
        )
        return DatasetNotFound(msg, name=name)


def _stamp(name: str, path: Path) -> _Known:
    status = path.stat()
    return _Known(name, status.st_size, status.st_mtime_ns)


def _read(file: Path) -> _Known | None:
    if not file.is_file():  # nor a pipe, which would be waited for
        return None
    try:
        known = _Known(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):  # it is made again when it is missed
        return None
    return known if isinstance(known.name, str) else None
