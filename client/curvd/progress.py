"""A progress bar for uploads; needs the extra ``curvd[progress]``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from curvd._uploads import Progress


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
        msg = "progress=True needs rich: pip install 'curvd[progress]'"
        raise ModuleNotFoundError(msg, name="rich") from error
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
