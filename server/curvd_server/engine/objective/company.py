"""Who computes an objective: this process alone, or several in step, with a part each.

What is decided by a number has to be decided alike everywhere. So numbers that each
process has a part of are put together here, and a process that is alone has all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class Company(Protocol):
    """Processes that hold parts of the same parameters and run the same steps."""

    @property
    def rank(self) -> int:
        """Of this process."""

    @property
    def shares(self) -> bool:
        """Whether there are others, so that nothing may be decided here alone."""

    def total(self, values: Sequence[float]) -> list[float]:
        """Add numbers over all processes, in the order of ranks.

        Args:
            values: This process' summands, as many as the others have.
        """

    def norms(self, values: Sequence[float]) -> list[float]:
        """Make norms of whole vectors of the norms of their parts.

        Args:
            values: Norms of this process' parts, as many as the others have.
        """

    def most(self, values: Sequence[float]) -> list[float]:
        """Find the largest over all processes of each number.

        Args:
            values: This process' numbers, as many as the others have.
        """

    def all_pass(self, check: Callable[[], None]) -> None:
        """Make a check that has to be passed by all processes.

        Args:
            check: Raises one of our errors; computes nothing that others take part in.
        """


class Alone:
    """One process that has all parameters; a `Company`."""

    rank = 0
    shares = False

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the numbers; see `Company`."""
        return list(values)

    def norms(self, values: Sequence[float]) -> list[float]:
        """Return the numbers; see `Company`."""
        return list(values)

    def most(self, values: Sequence[float]) -> list[float]:
        """Return the numbers; see `Company`."""
        return list(values)

    def all_pass(self, check: Callable[[], None]) -> None:
        """Make the check; see `Company`."""
        check()


ALONE: Company = Alone()
