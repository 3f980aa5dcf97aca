"""What products take: whether one is short enough for its caller's thread, or gives way."""

from __future__ import annotations

import math
import weakref

from curvd_server.device.requests import Multiplies

_FIRST_GUESS_S = 0.1
_SHORT_S = 1e-3
"""Products up to here may hold up an event loop: handing one to another thread and back
costs about half of that, and the loop gets little done meanwhile."""
_FORGET = 0.8
"""How much of an operator's slowest product lately still counts after one more."""
_EASE = 1.1
"""How much longer its quickest counts after one more: data that are no longer kept make
products slow for good."""
LONG_S = 0.05
"""Products that take longer, or are not known yet, give way to others."""
SHARED_LONG_S = 2e-3
"""The same while several callers with names want the device: each may have a short product,
and waits for one step of another's."""


class Paces:
    """Seconds of the products that ran. Not for several threads at once."""

    def __init__(self) -> None:
        self._seconds_per_column = _FIRST_GUESS_S
        # Operators come and go.
        self.slowest_s = weakref.WeakKeyDictionary[Multiplies, float]()
        """Of each column of an operator's slowest product lately."""
        # Seconds of the quickest run lately of so many columns, up to a factor of two: what
        # it takes when nothing is in its way. A busy machine makes no product a long one.
        self._quickest = weakref.WeakKeyDictionary[Multiplies, dict[int, float]]()

    def is_short(self, operator: Multiplies, columns: int) -> bool:
        """Tell whether a product is known to take hardly any time.

        Args:
            operator: What is multiplied.
            columns: How many.
        """
        seconds = self._guess_s(operator, columns)
        return seconds <= LONG_S and self._at_best_s(operator, columns) <= _SHORT_S

    def is_long(self, operator: Multiplies, columns: int, *, is_shared: bool) -> bool:
        """Tell whether a product takes so long that it gives way.

        Args:
            operator: What is multiplied.
            columns: How many.
            is_shared: Whether several callers with names want the device.
        """
        if not is_shared:
            return self._guess_s(operator, columns) > LONG_S
        return self._at_best_s(operator, columns) > SHARED_LONG_S

    def count(
        self, operator: Multiplies, columns: int, seconds: float, *, complete: bool
    ) -> None:
        """Take note of a run.

        Args:
            operator: What was multiplied.
            columns: How many, at least one.
            seconds: What it took.
            complete: Whether it ran to its end: then it may be the quickest.
        """
        pace_s = seconds / columns
        # A moving average: what a column costs changes with who asks.
        self._seconds_per_column += 0.2 * (pace_s - self._seconds_per_column)
        slowest_s = self.slowest_s.get(operator, 0.0)
        self.slowest_s[operator] = max(pace_s, _FORGET * slowest_s)
        if complete:
            known = self._quickest.setdefault(operator, {})
            width = columns.bit_length()
            known[width] = min(seconds, _EASE * known.get(width, math.inf))

    def wait_s(self, columns: int) -> float:
        """Guess how long columns under way will take, whatever their operators."""
        return self._seconds_per_column * columns

    def _at_best_s(self, operator: Multiplies, columns: int) -> float:
        known = self._quickest.get(operator, {})
        return known.get(columns.bit_length(), self._guess_s(operator, columns))

    def _guess_s(self, operator: Multiplies, columns: int) -> float:
        return self.slowest_s.get(operator, math.inf) * columns
