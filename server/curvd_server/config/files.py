"""Files that settings name, read where an error can name the setting."""

from __future__ import annotations

from pathlib import Path

from curvd.errors import InvalidSpec


def content(path: Path, name: str) -> bytes:
    """Read a file.

    Args:
        path: The file.
        name: The setting that names it, for errors.

    Raises:
        InvalidSpec: If it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        msg = f"cannot read {name} {str(path)!r}: {error.strerror}"
        raise InvalidSpec(msg, file=path) from error
