"""How long a session lives after the last call on it.

A lease is measured on a clock that nobody can set: a step of the wall clock ends no
session early and keeps none for ever. That clock begins anew with each process, so what
remains of a lease is written down from time to time, and a restart goes on from there:
the time while no server ran does not count, because nobody could renew then, and a
server that restarts often still ends what nobody uses.
"""

from __future__ import annotations

from collections.abc import Callable

_STEP_S = 60.0
"""Idle seconds after which they are written down; of short leases a quarter."""


class Remaining:
    """What remains of one lease.

    Args:
        lease_s: Its length; None: it has no end.
        remaining_s: What was written down; None: all of it.
        monotonic: Seconds that nobody can set.
    """

    def __init__(
        self,
        lease_s: float | None,
        remaining_s: float | None,
        monotonic: Callable[[], float],
    ) -> None:
        self._lease_s, self._monotonic = lease_s, monotonic
        self.noted(remaining_s)
        spent_s = 0.0
        if lease_s is not None and self._noted_s is not None:
            spent_s = lease_s - self._noted_s
        self._used_s = monotonic() - spent_s

    @property
    def seconds(self) -> float | None:
        """Until it ends; None: never."""
        if self._lease_s is None:
            return None
        return self._used_s + self._lease_s - self._monotonic()

    @property
    def is_over(self) -> bool:
        """Whether it ran out."""
        seconds = self.seconds
        return seconds is not None and seconds <= 0

    def touch(self) -> None:
        """Begin anew."""
        self._used_s = self._monotonic()

    def to_note(self, *, at_the_end: bool = False) -> tuple[float | None] | None:
        """Say what is to be written down now.

        Args:
            at_the_end: Whether the process ends, so that small changes count, too.

        Returns:
            The seconds, or None for all of them, in a tuple; None if nothing is: what
            is written is near enough.
        """
        seconds, lease_s = self.seconds, self._lease_s
        if seconds is None or lease_s is None:
            return None
        noted_s = lease_s if self._noted_s is None else self._noted_s
        if seconds > noted_s:  # it was used since: a crash must not end it early
            return (None,)
        step_s = 0.0 if at_the_end else min(_STEP_S, lease_s / 4)
        return (max(0.0, seconds),) if seconds < noted_s - step_s else None

    def noted(self, remaining_s: float | None) -> None:
        """Take note of what is written; what makes no sense counts as all of it."""
        self._noted_s = None
        if remaining_s is not None and self._lease_s is not None:
            if 0 <= remaining_s <= self._lease_s:
                self._noted_s = remaining_s
