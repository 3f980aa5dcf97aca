"""Callers give up between mini-batches."""

from __future__ import annotations

from collections.abc import Callable

from curvd.errors import Cancelled


def never() -> bool:
    """Never cancel."""
    return False


def check_cancelled(cancelled: Callable[[], bool]) -> None:
    """Raise `Cancelled` if the caller gave up; called between mini-batches."""
    if cancelled():
        msg = "the caller gave up; the product stopped between two mini-batches"
        raise Cancelled(msg)
