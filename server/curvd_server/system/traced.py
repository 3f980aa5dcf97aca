"""What the call under way is made of, told to whoever traces it.

Where something takes time that belongs to a call, such as waiting for the device, it is
looked up here whether anybody wants to know. Nobody does, unless the server sends traces
and this call is one of those: then it costs that look-up, and nothing else.
"""

from __future__ import annotations

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


TRACED: ContextVar[Traces | None] = ContextVar("traced", default=None)
"""Hears what the call under way is made of; None: nobody wants to know."""
