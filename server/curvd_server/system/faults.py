"""What the operating system refuses, in our words: disks that are full, memory that is."""

from __future__ import annotations

import contextlib
import errno
import inspect
import traceback
from collections.abc import Iterator
from typing import TypeVar

from curvd.errors import CurvdError, DiskFull, FailedPrecondition, OutOfMemory

E = TypeVar("E", bound=BaseException)

_GIVES_WAY = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR

FREE_SOME = (
    "have the server's operator free some space in its data directory, then try again; "
    "nothing that was acknowledged is lost"
)
"""What to do about a full disk."""


def typed(error: BaseException) -> CurvdError | None:
    """Find the error that a caller is told.

    Args:
        error: Whatever was raised.

    Returns:
        Ours; None if it is no shortage, and so perhaps a defect.
    """
    if isinstance(error, CurvdError):
        return error
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"the server's disk is full: {FREE_SOME}")
    if is_out_of_memory(error) or number == errno.ENOMEM:
        msg = (
            "the server's host has no memory left for this call"
            f"{f' ({str(error)[:200]})' if str(error) else ''}: send less at once, delete stored "
            "vectors or sessions, or have its operator lower memory_bytes"
        )
        return OutOfMemory(msg)
    if number in (errno.EMFILE, errno.ENFILE):
        msg = "the server has no file descriptors left: close connections, or try again"
        return OutOfMemory(msg)
    return None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether Python, NumPy or torch ran out of memory, on whichever device.

    Args:
        error: Whatever was raised; torch's is known by its name and words.

    Returns:
        Whether it is one of theirs.
    """
    if isinstance(error, MemoryError):
        return True
    torchs = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, RuntimeError) and (
        torchs or "can't allocate memory" in str(error)
    )


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Raise our errors in place of the system's, while something is written.

    Yields:
        Nothing.

    Raises:
        DiskFull: If the disk takes no more.
        FailedPrecondition: If it cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        known = typed(error)
        if known is None:
            msg = (
                f"the server cannot write its data directory: {error.strerror}; its "
                "operator has to look at the disk and the rights of the folder"
            )
            known = FailedPrecondition(msg)
        raise known from error


def released(error: E) -> E:
    """Let go of the frames through which an error came.

    Whoever keeps an error, such as a future, is often held by one of these frames, or by one
    that called it or waited; in such a circle all that they worked with, a session's data
    say, would stay until a full collection of garbage, which may be far away. Where one of
    ours came from is no news; where a defect was stays with it as text, which logs print.

    Args:
        error: Was caught by the caller, who keeps it.

    Returns:
        The same.
    """
    is_defect = isinstance(error, Exception) and not isinstance(error, CurvdError)
    if error.__traceback__ is not None and is_defect:
        # What was released before has said all but the way since.
        before = bool(getattr(error, "__notes__", ()))
        way = traceback.format_tb(error.__traceback__)
        error.add_note("".join(way if before else traceback.format_exception(error)))
    links: list[BaseException | None] = [error]
    seen = set[int]()
    while links:
        link = links.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        for frame, _ in traceback.walk_tb(link.__traceback__):
            # One that gave way may go on, if several wait for what failed; up to Python
            # 3.12 clearing it would end it.
            if not frame.f_code.co_flags & _GIVES_WAY:
                with contextlib.suppress(RuntimeError):  # it runs: whoever calls this
                    frame.clear()
        link.__traceback__ = None
        # `raise … from None` hides a context, but keeps it.
        links += [link.__cause__, link.__context__]
    return error
