"""Native code on disk, found by the hash of all that it was made of."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch

from curvd_server.engine.program.native.child import OPTIONS
from curvd_server.system import told

_KEPT = 64
"""Packages on disk; the oldest make room."""


class Packages:
    """A folder of packages of native code, one for each program.

    Args:
        folder: Made if it is not there. What a server that was killed left half done in it
            is removed.
    """

    def __init__(self, folder: Path) -> None:
        with told():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in folder.iterdir():
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        self.folder = folder

    def path(self, text: str) -> Path:
        """Find where the package of a program is, or would be.

        Args:
            text: The program as it is written for the child.

        Returns:
            The file.
        """
        place = torch.backends.cpu.get_cpu_capability()
        if torch.cuda.is_available():
            place += torch.cuda.get_device_name()
        known = f"{torch.__version__} {place} {sorted(OPTIONS.items())} {text}"
        return self.folder / f"{hashlib.sha256(known.encode()).hexdigest()}.pt2"

    def keep(self, made: Path, package: Path) -> None:
        """Move a package that is whole into the folder; the oldest make room.

        Args:
            made: Where the child wrote it, on the same file system.
            package: Where it is to be.
        """
        _seal(package).write_text(_digest(made))
        shutil.move(made, package)
        kept = sorted(self.folder.glob("*.pt2"), key=lambda p: p.stat().st_mtime)
        for old in kept[:-_KEPT]:
            old.unlink()
            _seal(old).unlink(missing_ok=True)


def is_sound(package: Path) -> bool:
    """Tell whether a package is there as it was made: it is code, and would be run.

    Args:
        package: A file, or none.

    Returns:
        Whether its bytes are those that were sealed.
    """
    try:
        return _seal(package).read_text() == _digest(package)
    except (OSError, ValueError):
        return False


def _seal(package: Path) -> Path:
    """Find the file that says what the bytes of a package were."""
    return package.with_suffix(".sha256")


def _digest(package: Path) -> str:
    with package.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
