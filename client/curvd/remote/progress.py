"""Progress of uploads and queries; needs the extra ``curvd[progress]``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from curvd._calls import Progress
from curvd.contract import QueryProgress
from curvd.errors import missing


@contextlib.contextmanager
def shown(progress: Progress | bool, what: str) -> Iterator[Progress | None]:
    """Show how far an upload is.

    Args:
        progress: A callback to pass on, or whether to draw a bar on stderr; none is
            drawn where stderr is no terminal.
        what: Name of what is uploaded.

    Yields:
        The callback; None if nobody looks.

    Raises:
        ModuleNotFoundError: If a bar is to be drawn and rich is not installed.
    """
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress or not sys.stderr.isatty():
        yield None
        return
    try:
        from rich import console
        from rich import progress as bars
    except ModuleNotFoundError as error:
        raise missing(what="progress=True", module="rich", extra="progress") from error
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task(f"uploading {what}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def watched(
    progress: Callable[[QueryProgress], None] | bool, what: str
) -> Iterator[Callable[[QueryProgress], None]]:
    """Show how far a query is.

    Args:
        progress: A callback to pass on, or whether to draw a line on stderr; none is
            drawn where stderr is no terminal.
        what: Name of the query.

    Yields:
        The callback.

    Raises:
        ModuleNotFoundError: If a line is to be drawn and rich is not installed.
    """
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress or not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        yield lambda progress: None
        return
    try:
        from rich import console
        from rich import progress as bars
    except ModuleNotFoundError as error:
        raise missing(what="progress=True", module="rich", extra="progress") from error
    columns = (
        bars.SpinnerColumn(),
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=20),
        bars.TimeElapsedColumn(),
        bars.TextColumn("{task.fields[left]}"),
    )
    with bars.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None, left="")
        yield lambda p: bar.update(
            task,
            description=_line(what, p),
            completed=p.products,
            total=p.total,
            left=_left(p),
        )


def _left(progress: QueryProgress) -> str:
    """Say how long it will take at most; it ends before if it is good enough."""
    seconds = progress.left_s
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"at most {minutes}:{rest:02} left"


def _line(what: str, progress: QueryProgress) -> str:
    # One line: the first estimate and the worst error, not all of them.
    of = "" if progress.total is None else f" of {progress.total}"
    parts = [what, f"{progress.products}{of} products"]
    if progress.estimates:
        parts.append(f"estimate {progress.estimates[0]:.6g}")
    if progress.residuals:
        parts.append(f"error {max(progress.residuals):.1e}")
    return ", ".join(parts)
