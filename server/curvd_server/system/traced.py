"""What the call under way is made of, told to whoever traces it.

Where something takes time that belongs to a call, such as waiting for the device, it is
looked up here whether anybody wants to know. Nobody does, unless the server sends traces
and this call is one of those: then it costs that look-up, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Protocol


class Traces(Protocol):
    """Hears what one call is made of. Threads may share it."""

    def add(
        self, name: str, began_s: float, ended_s: float, **attributes: str | int | float
    ) -> None:
        """Take note of something that has ended.

        Args:
            name: What it was; one of few words.
            began_s: When it began, on the clock of `time.monotonic`.
            ended_s: When it ended, likewise.
            **attributes: What else is known of it.
        """


class _Together:
    """Tells several who trace the same thing."""

    def __init__(self, each: list[Traces]) -> None:
        self._each = each

    def add(
        self, name: str, began_s: float, ended_s: float, **attributes: str | int | float
    ) -> None:
        """Tell all of them; see `Traces.add`."""
        for traced in self._each:
            traced.add(name, began_s, ended_s, **attributes)


def together(each: Iterable[Traces | None]) -> Traces | None:
    """Make one of those who trace calls that something is done for at once.

    Args:
        each: Who hears of each call; None: nobody does.

    Returns:
        Who tells all of them; None if there is nobody.
    """
    found = [traced for traced in each if traced is not None]
    return _Together(found) if len(found) > 1 else next(iter(found), None)


TRACED: ContextVar[Traces | None] = ContextVar("traced", default=None)
"""Hears what the call under way is made of; None: nobody wants to know."""
