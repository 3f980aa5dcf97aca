"""Disks that are really full."""

import errno
import os
import shutil
import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """A disk of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "none", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command).returncode:
        pytest.skip("only root mounts a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def filled(folder, but=0):
    """Leave no byte free, or so many.

    Args:
        folder: Of the disk.
        but: Bytes to leave free.

    Returns:
        The file to delete.
    """
    spare = folder / "spare"
    if but:
        spare.write_bytes(bytes(but))
    path = folder / "filler"
    with path.open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC
    spare.unlink(missing_ok=True)
    return path
