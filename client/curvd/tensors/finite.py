"""Looking for NaN, infinity and what is too large, at the speed of memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SEGMENT = 1 << 17
"""Elements that are looked at together: their verdicts stay in the cache."""
_SUMMED = 1 << 20
"""Elements that are summed at once; a sum leaves nothing behind."""


def first_not_finite(values: NDArray[Any], *, bits: bool = False) -> int | None:
    """Find the first NaN or infinity.

    Args:
        values: [n]
        bits: Whether they are bfloat16 as uint16.

    Returns:
        Its index; None if all are finite.
    """
    if not bits and values.dtype.kind != "f":
        return None
    if bits:
        return _first(values, lambda part: (part & 0x7F80) != 0x7F80)
    return _first(values, np.isfinite, surely=_sums_up)


def first_nan(values: NDArray[Any], *, bits: bool = False) -> int | None:
    """Find the first NaN; arguments and result as of `first_not_finite`."""
    if bits:
        return _first(values, lambda part: (part & 0x7FFF) <= 0x7F80)
    return None if values.dtype.kind != "f" else _first(values, lambda x: x == x)


def first_beyond(values: NDArray[Any], limit: float) -> int | None:
    """Find the first finite value whose magnitude is not below a limit.

    Args:
        values: [n] Floating point.
        limit: Positive.

    Returns:
        Its index; None if all are below, or infinite.
    """
    return _first(values, lambda part: ~(np.abs(part) >= limit) | ~np.isfinite(part))


def _sums_up(part: NDArray[Any]) -> bool:
    """Whether the sum is finite, and so every value: neither NaN nor infinity cancels.

    Half the time of a verdict for each value. A sum may overflow where no value has.
    """
    return math.isfinite(np.einsum("i->", part))


def _first(
    values: NDArray[Any],
    good: Callable[[NDArray[Any]], NDArray[Any]],
    surely: Callable[[NDArray[Any]], bool] = lambda part: False,
) -> int | None:
    """Find the first value that is not good.

    Args:
        values: [n]
        good: A verdict for each value.
        surely: A quick verdict for all of them; False if there is to be a closer look.

    Returns:
        Its index; None if all are good.
    """
    for start in range(0, len(values), _SUMMED):
        part = values[start : start + _SUMMED]
        found = None if surely(part) else _first_of(part, good)
        if found is not None:
            return start + found
    return None


def _first_of(
    values: NDArray[Any], good: Callable[[NDArray[Any]], NDArray[Any]]
) -> int | None:
    """Find the first value that is not good, looking at pieces that fit the cache."""
    for start in range(0, len(values), _SEGMENT):
        verdicts = good(values[start : start + _SEGMENT])
        if not verdicts.all():
            return start + int(np.argmin(verdicts))
    return None
