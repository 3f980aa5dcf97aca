"""What calls there were, how long they took, and what connections there are.

Written to by the event loop for each call, so it costs a microsecond; read by whoever looks,
on any thread. What it tells apart is bounded: methods of ours and codes of gRPC.
"""

from __future__ import annotations

import bisect
import time
from collections import Counter
from collections.abc import Callable, Mapping

BOUNDS_S = (
    *(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    *(100.0, 300.0, 1000.0),
)
"""Seconds up to which the calls of one bucket take: half a decade each, from a small
product to a long query."""


class Durations:
    """How long the calls of one method took."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        """Calls in each bucket; the last one has no bound."""
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        """Count a call.

        Args:
            seconds: How long it took.
        """
        self.counts[bisect.bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds


class Tally:
    """Counts the calls that were let through to our methods, whoever carried them.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began_s = clock, clock()
        self.ended: Counter[tuple[str, ...]] = Counter()
        """Calls that have ended, by method and code."""
        self.durations: dict[str, Durations] = {}
        """Of those, by method."""
        self.under_way = 0
        """Calls that have begun and not ended."""
        self.dropped: Mapping[str, int] = {}
        """Connections and calls that were turned away, by reason; see `Drops`."""
        self.connections: Callable[[], Mapping[str, int]] = dict
        """Tells what connections take; nothing where grpcio has the port."""

    @property
    def age_s(self) -> float:
        """Seconds since the server began."""
        return self._clock() - self._began_s

    def end(self, rpc: str, code: str, seconds: float) -> None:
        """Count a call that ends.

        Args:
            rpc: The method.
            code: Of its status.
            seconds: How long it took.
        """
        self.ended[rpc, code] += 1
        self.durations.setdefault(rpc, Durations()).add(seconds)
