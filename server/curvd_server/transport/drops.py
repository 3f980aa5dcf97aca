"""Connections and calls that were ended: counted by reason, and logged.

Whoever is turned away may come back at once, so the log is limited: a few lines for each
reason and second, and how many there were beside them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

from curvd_server.system import logger

_LINES = 5
"""Lines for one reason in one period."""
_PERIOD_S = 1.0
_REPORT_S = 60.0
"""How often it is said how many connections there are, if that has changed."""


class Drops:
    """Counts what was turned away.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._log = clock, logger()
        self._since = clock()
        self._lines: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        """Connections and calls that were ended, by reason."""
        self._report_s, self._reported = clock(), dict[str, object]()

    def add(self, reason: str, peer: str, **facts: object) -> None:
        """Take note of one that was turned away.

        Args:
            reason: A word for it; there are few different ones.
            peer: Who.
            **facts: What else the log should say.
        """
        self.counts[reason] += 1
        if self._clock() - self._since >= _PERIOD_S:
            self.summarise()
        self._lines[reason] += 1
        if self._lines[reason] <= _LINES:
            self._log.warning("dropped", reason=reason, peer=peer, **facts)

    def summarise(self) -> None:
        """Log how many were not logged since the last time."""
        for reason, count in self._lines.items():
            if count > _LINES:
                self._log.warning("dropped", reason=reason, more=count - _LINES)
        self._lines.clear()
        self._since = self._clock()

    def report(self, usage: Mapping[str, int]) -> None:
        """Log what is used of the limits, and what was turned away since the start.

        Args:
            usage: What there is at present, by name.
        """
        now: dict[str, object] = {**usage, "dropped": dict(self.counts)}
        if self._clock() - self._report_s < _REPORT_S or now == self._reported:
            return
        self._report_s, self._reported = self._clock(), now
        self._log.info("connections", **now)
