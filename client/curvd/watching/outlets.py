"""Where readings go: a CSV file, TensorBoard, or a function."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from curvd.errors import InvalidSpec, missing
from curvd.watching.reading import Reading

Outlets = Any
"""A path, a SummaryWriter, a function of a reading, or several of these."""


class Outlet(Protocol):
    """Takes readings on the thread of the watch."""

    def write(self, reading: Reading) -> None:
        """Take a reading.

        Args:
            reading: The reading.
        """

    def close(self) -> None:
        """Take no more."""


class CsvFile:
    """A table with a row for each reading, complete after each row.

    Args:
        path: The file. A resumed training goes on with the one that is there.
        metrics: Names of the metrics.

    Raises:
        InvalidSpec: If there is a file with other columns, or no folder for it.
    """

    def __init__(self, path: Path, metrics: Sequence[str]) -> None:
        values = [column for name in metrics for column in (name, f"{name}_error")]
        self._columns = ["step", "version", *values, "skipped", "delay_s"]
        held = path.read_text().partition("\n")[0] if path.exists() else ""
        if held and held.split(",") != self._columns:
            msg = (
                f"{path} has other columns, {held}, than {','.join(self._columns)}: name "
                "another file, or move that one"
            )
            raise InvalidSpec(msg)
        if not path.parent.is_dir():
            msg = f"to={str(path)!r}: {path.parent} is no folder; make it first"
            raise InvalidSpec(msg, folder=str(path.parent))
        self._file = path.open("a", newline="")
        self._table = csv.DictWriter(self._file, self._columns, lineterminator="\n")
        if not held:
            self._table.writeheader()
            self._file.flush()

    def write(self, reading: Reading) -> None:
        """Add a row; a metric that failed has an empty cell."""
        self._table.writerow(reading.to_dict())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __str__(self) -> str:
        return self._file.name


class TensorBoard:
    """Curves under ``curvature/``, each with that of its errors.

    Args:
        writer: A SummaryWriter, or what has its `add_scalar`.
        is_ours: Whether to close it in the end.
    """

    def __init__(self, writer: Any, *, is_ours: bool) -> None:
        self._writer, self._is_ours = writer, is_ours

    def write(self, reading: Reading) -> None:
        """Add a point to each curve, at the step of the snapshot."""
        for name, value in reading.values.items():
            self._writer.add_scalar(f"curvature/{name}", value, reading.step)
            if name in reading.errors:
                error = reading.errors[name]
                self._writer.add_scalar(f"curvature/{name}_error", error, reading.step)
        self._writer.flush()

    def close(self) -> None:
        """Close the writer, unless it is the caller's."""
        if self._is_ours:
            self._writer.close()

    def __str__(self) -> str:
        return "TensorBoard"


class Function:
    """Something that is called with each reading.

    Args:
        function: It.
    """

    def __init__(self, function: Callable[[Reading], Any]) -> None:
        self._function = function

    def write(self, reading: Reading) -> None:
        """Call it."""
        self._function(reading)

    def close(self) -> None:
        """Do nothing: it has no end."""

    def __str__(self) -> str:
        return getattr(self._function, "__qualname__", repr(self._function))


def opened(to: Outlets, metrics: Sequence[str]) -> list[Outlet]:
    """Open what readings go to.

    Args:
        to: A path that ends in ``.csv``; another path, where TensorBoard's files go,
            which makes the folder of a run; a SummaryWriter; a function of a reading; a
            sequence of these; or None.
        metrics: Names of the metrics.

    Returns:
        The outlets.

    Raises:
        InvalidSpec: If it is something else.
    """
    if to is None:
        return []
    if isinstance(to, list | tuple):
        return [outlet for each in to for outlet in opened(each, metrics)]
    if isinstance(to, str | os.PathLike):
        path = Path(to)
        if path.suffix == ".csv":
            return [CsvFile(path, metrics)]
        return [TensorBoard(_writer(path), is_ours=True)]
    if hasattr(to, "add_scalar"):
        return [TensorBoard(to, is_ours=False)]
    if callable(to):
        return [Function(to)]
    msg = (
        "readings go to a path (.csv, or a folder for TensorBoard), a SummaryWriter, or a "
        f"function; got a {type(to).__name__}"
    )
    raise InvalidSpec(msg)


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise missing(
            what=f"to={str(folder)!r}, which is no .csv,",
            module="tensorboard",
            extra="tensorboard",
        ) from error
    return SummaryWriter(folder)
