"""Who has had how much of a device: callers share its time, by their weights.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): what a caller has had, divided by his
weight, is his virtual time, and who has had least goes first. A caller who was away begins
where the others are, so that nobody saves up time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from curvd_server.system import Identity


class Shares:
    """Virtual times of callers. Not for several threads at once.

    Args:
        weight: Says how large a caller's share is, in comparison with others'.
    """

    def __init__(self, weight: Callable[[Identity], float]) -> None:
        self._weight = weight
        self._had_s: dict[str, float] = {}
        self._now_s = 0.0

    def had(self, callers: Collection[str]) -> Mapping[str, float]:
        """Tell how much of the device each has had; who has had least comes first.

        Args:
            callers: Names of all who want it.

        Returns:
            Seconds, over the weights; they compare, and mean nothing else.
        """
        there = [self._had_s[name] for name in callers if name in self._had_s]
        self._now_s = now_s = max(self._now_s, min(there, default=self._now_s))
        # Who was away owes what he had beyond the others; who owes nothing is forgotten,
        # and is new when he comes, before all whose turn was under way.
        owed = {n: had_s for n, had_s in self._had_s.items() if had_s > now_s}
        new_s = math.nextafter(now_s, -math.inf)
        known = dict.fromkeys(self._had_s.keys() & set(callers), now_s)
        self._had_s = {**dict.fromkeys(callers, new_s), **known, **owed}
        return self._had_s

    def charge(self, callers: Collection[Identity], seconds: float) -> None:
        """Count time of the device.

        Args:
            callers: Who had it together; one comes as often as he has parts in it.
            seconds: How long all of them had it.
        """
        for caller in callers:
            part_s = seconds / len(callers) / self._weight(caller)
            had_s = self._had_s.get(caller.name, self._now_s)
            self._had_s[caller.name] = had_s + part_s

    def is_ahead(
        self, callers: Collection[Identity], seconds: float, others: Collection[str]
    ) -> bool:
        """Tell whether a turn that is not over has made callers richer than others.

        Args:
            callers: Who have it together.
            seconds: How long they have had it.
            others: Names of the others.
        """
        least_s = min(self._had_s.get(name, self._now_s) for name in others)
        return any(
            self._had_s.get(caller.name, self._now_s)
            + seconds / len(callers) / self._weight(caller)
            > least_s
            for caller in callers
        )
