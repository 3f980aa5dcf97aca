"""The folder in which a server keeps what must survive: made, judged, and owned by one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from curvd.errors import CurvdError, FailedPrecondition, InvalidSpec
from curvd_server.system import faults, logger

_PRIVATE = "run"
"""Folder in the data directory for what lives as long as the process."""
_TORCHS_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_LITTLE_BYTES = 256 << 20
"""Free space below which a server says so at its start."""
_FOLDERS = ("blobs", "compiled", "mounts")
"""What a server keeps folders for in its data directory."""


@contextlib.contextmanager
def owned(data_dir: Path) -> Iterator[None]:
    """Keep other servers off a data directory; the kernel forgets if we crash.

    Args:
        data_dir: Made if it is not there.

    Yields:
        Nothing.

    Raises:
        InvalidSpec: If it or a folder of it is none, or the server may not write to it.
        DiskFull: If the disk takes no more.
        FailedPrecondition: If another server uses it, or others may write to it.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = open(data_dir / "lock", "w", opener=_at_once)
    except OSError as error:
        raise _refused(data_dir, error) from error
    with file:
        for name in _FOLDERS:
            _check_folder(data_dir / name)
        for folder in (data_dir, data_dir / "compiled"):
            _check_rights(folder)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            msg = f"another server uses the data directory {data_dir}; choose another"
            raise FailedPrecondition(msg, data_dir=data_dir) from None
        free = shutil.disk_usage(data_dir).free
        if free < _LITTLE_BYTES:
            logger().warning(
                "disk almost full", free_bytes=free, data_dir=str(data_dir)
            )
        yield


@contextlib.contextmanager
def private_folder(data_dir: Path) -> Iterator[Path]:
    """Make a folder for what lives as long as the process; nothing of it is left.

    It lies in the data directory, so that what a killed server has left is found, and
    has a short name, because the address of a Unix socket holds 107 bytes.

    Args:
        data_dir: The data directory of this server.

    Yields:
        The folder, under a name that is good in this process.
    """
    folder = data_dir / _PRIVATE
    shutil.rmtree(folder, ignore_errors=True)
    with faults.told():
        folder.mkdir(mode=0o700)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def torchs_folder(data_dir: Path) -> Iterator[None]:
    """Have torch make the folder of its settings in the data directory.

    By itself it does so in the system's temporary folder, under a name that anybody on
    the machine can guess.

    Args:
        data_dir: The data directory of this server.

    Yields:
        Nothing.
    """
    if _TORCHS_FOLDER in os.environ:  # the operator's wish
        yield
        return
    os.environ[_TORCHS_FOLDER] = str(data_dir.absolute() / _PRIVATE / "torch")
    try:
        yield
    finally:
        del os.environ[_TORCHS_FOLDER]


def _at_once(path: str, flags: int) -> int:
    """Open without waiting: a pipe that has the name of a file has no reader."""
    return os.open(path, flags | os.O_NONBLOCK, 0o600)


def _refused(data_dir: Path, error: OSError) -> CurvdError:
    known = faults.typed(error)
    if known is not None:
        return known
    msg = (
        f"cannot use data_dir {str(data_dir)!r}: {error.strerror}; name a folder that the "
        "server may write to, or make (--data-dir)"
    )
    return InvalidSpec(msg, data_dir=data_dir)


def _check_folder(folder: Path) -> None:
    """Refuse what has the name of a folder and is none, or cannot be used."""
    if not os.path.lexists(folder):
        return  # it is made when it is needed
    if not folder.is_dir():
        what = "a link to nothing" if folder.is_symlink() else "no folder"
        msg = (
            f"{folder} is {what}, and the server keeps its files in a folder of this "
            "name: move it away, or name another data directory (--data-dir)"
        )
        raise InvalidSpec(msg, data_dir=folder)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        msg = (
            f"the server may not read and write {folder}: give its user the rights, or "
            "name another data directory (--data-dir)"
        )
        raise InvalidSpec(msg, data_dir=folder)


def _check_rights(folder: Path) -> None:
    """Refuse a folder that others may write to: code is loaded from it."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return
    mode = stat.S_IMODE(status.st_mode)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        msg = (
            f"others may write to {folder} (mode {mode:04o}), and the server loads code "
            f"and data from it: chmod go-w {folder}, or name a folder in it that does "
            "not exist yet (--data-dir); it is made for this user alone"
        )
        raise FailedPrecondition(msg, data_dir=folder, mode=f"{mode:04o}")
    if status.st_uid not in (0, os.geteuid()):
        msg = (
            f"{folder} belongs to user {status.st_uid}, not to the server's "
            f"({os.geteuid()}), and the server loads code and data from it: chown it, or "
            "name another (--data-dir)"
        )
        raise FailedPrecondition(msg, data_dir=folder, owner=status.st_uid)
