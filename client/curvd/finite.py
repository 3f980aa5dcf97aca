"""Looking for NaN and infinity at the speed of memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SEGMENT = 1 << 16
"""Elements that are looked at together: their verdicts stay in the cache."""


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
    for start in range(0, len(values), _SEGMENT):
        part = values[start : start + _SEGMENT]
        finite = (part & 0x7F80) != 0x7F80 if bits else np.isfinite(part)
        if not finite.all():
            return start + int(np.argmin(finite))
    return None
