"""Progress of uploads, openings and queries; bars need the extra ``curvd[progress]``."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from curvd._calls import ObserveOpening, Progress
from curvd.contract import QueryProgress, Stage, StageProgress
from curvd.errors import InvalidSpec, missing


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
        InvalidSpec: If it is none of them.
        ModuleNotFoundError: If a bar is to be drawn and rich is not installed.
    """
    progress = _checked(progress)
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
        InvalidSpec: If it is none of them.
        ModuleNotFoundError: If a line is to be drawn and rich is not installed.
    """
    progress = _checked(progress)
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress or not _is_seen():
        yield lambda progress: None
        return
    with _line_of(what) as draw:
        yield lambda p: draw(_line(what, p), p.products, p.total, p.left_s)


@contextlib.contextmanager
def opening(progress: ObserveOpening | bool) -> Iterator[ObserveOpening | None]:
    """Show how far the opening of a session is.

    Args:
        progress: A callback to pass on, or whether to draw a line on stderr; none is
            drawn where stderr is no terminal.

    Yields:
        The callback; None if nobody looks.

    Raises:
        InvalidSpec: If it is none of them.
        ModuleNotFoundError: If a line is to be drawn and rich is not installed.
    """
    progress = _checked(progress)
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress or not _is_seen():
        yield None
        return
    with _line_of("opening") as draw:
        yield lambda p: draw(str(p), p.done, p.total, p.left_s)


class ClientStages:
    """The stages of an opening that the client does, told as the server tells its own.

    Args:
        observe: Is told; None: nobody is.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        observe: ObserveOpening | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._observe, self._clock = observe, clock

    def exporting(self) -> None:
        """Say that the module is being exported."""
        if self._observe is not None:
            self._observe(StageProgress(stage=Stage.EXPORTING))

    def registering(self, what: str) -> Progress | bool:
        """Say that something is being registered.

        Args:
            what: What.

        Returns:
            ``progress=`` of the upload.
        """
        observe, began_s = self._observe, self._clock()
        if observe is None:
            return False

        def told(done: int, total: int | None) -> None:
            observe(
                StageProgress(
                    stage=Stage.REGISTERING,
                    detail=what,
                    done=done,
                    total=total,
                    elapsed_s=self._clock() - began_s,
                )
            )

        told(0, None)
        return told


P = TypeVar("P", bound="Callable[..., None]")


def _checked(progress: P | bool | None) -> P | bool:
    """Refuse what nobody could be told by.

    Args:
        progress: A callback, or whether to show how far something is; None: do not.

    Returns:
        The same; False in place of None.

    Raises:
        InvalidSpec: If it is something else.
    """
    if progress is None:
        return False
    if not isinstance(progress, bool) and not callable(progress):
        msg = (
            "progress is True, False, or a function that is called with how far the work "
            f"is, got {progress!r}"
        )
        raise InvalidSpec(msg, progress=progress)
    return progress


_Draw = Callable[[str, int, int | None, float | None], None]
"""Takes what is written, how much is done, the total, and the seconds left at most."""


def _is_seen() -> bool:
    """Tell whether somebody would see a line."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


@contextlib.contextmanager
def _line_of(what: str) -> Iterator[_Draw]:
    """Draw a line on stderr, with a bar in it."""
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

        def draw(line: str, done: int, total: int | None, left_s: float | None) -> None:
            bar.update(task, description=line, completed=done, left=_left(left_s))
            # As `update` takes it, None would leave the total of the stage before.
            bar.tasks[0].total = total

        yield draw


def _left(seconds: float | None) -> str:
    """Say how long it will take at most; it ends before if it is good enough."""
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
