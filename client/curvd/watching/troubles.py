"""Errors that a training is not to notice: counted, and said once."""

from __future__ import annotations

import logging

logger = logging.getLogger("curvd")


class Troubles:
    """What went wrong so far; the first error of each row of them is logged.

    Args:
        name: Whose troubles, at the beginning of what is logged.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._in_a_row: dict[str, int] = {}
        self.count = 0
        """Of all errors."""
        self.last: Exception | None = None
        """The latest error."""

    def add(self, what: str, error: Exception, *, ends: bool = False) -> int:
        """Count an error.

        Args:
            what: What failed; each thing has a row of its own.
            error: How.
            ends: Whether the watch ends by it, which is logged in any case.

        Returns:
            How often this has failed in a row.
        """
        self.count += 1
        self.last = error
        in_a_row = self._in_a_row[what] = self._in_a_row.get(what, 0) + 1
        if in_a_row == 1 or ends:
            logger.warning(
                "%s: %s failed, %s: %s; the training goes on, and %s",
                self._name,
                what,
                type(error).__name__,
                error,
                "the watch ends" if ends else "so does the watch",
            )
        return in_a_row

    def over(self, what: str) -> None:
        """Say that it worked.

        Args:
            what: What did.
        """
        if failed := self._in_a_row.pop(what, 0):
            logger.info("%s: %s works again after %d errors", self._name, what, failed)
