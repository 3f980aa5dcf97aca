"""Vectors with fewer bits on the wire: bfloat16 and float16, half the bytes of float32.

Values are rounded to nearest, ties to even, when they leave, and widened without loss
when they arrive; whatever is computed is computed in the session's own type. float64
values pass through float32 on their way to bfloat16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from curvd.errors import InvalidSpec
from curvd.tensors.buffer_pool import Buffer

NARROW = ("BF16", "F16")
"""safetensors element types that vectors may travel in, beside the session's own."""
ITEM_BYTES = 2

_LARGEST = {"BF16": "3.4e38", "F16": "65504"}
_NAN = 0x7FC0


def narrow(values: NDArray[np.floating], dtype: str) -> NDArray[np.uint16]:
    """Round values; the inverse of `widen`, up to rounding.

    Args:
        values: [n], float32 or float64.
        dtype: ``BF16`` or ``F16``.

    Returns:
        Their bits: [n].

    Raises:
        InvalidSpec: If a finite value is too large for the type.
    """
    with np.errstate(over="ignore"):
        if dtype == "F16":
            bits = values.astype("<f2").view("<u2")
            infinite = np.uint16(0x7C00)
        else:
            bits = _bfloat16(values.astype("<f4", copy=False))
            infinite = np.uint16(0x7F80)
    too_large = np.flatnonzero((bits & np.uint16(0x7FFF)) == infinite)
    for index in too_large:
        if np.isfinite(values[index]):
            msg = (
                f"{values[index]:g} does not fit {dtype}, whose largest value is "
                f"{_LARGEST[dtype]}; use BF16 for its range, or the session's own type"
            )
            raise InvalidSpec(msg, value=values[index], dtype=dtype)
    return bits


def widen(raw: Buffer, dtype: str, out: NDArray[np.floating]) -> None:
    """Turn bits into values, exactly.

    Args:
        raw: [2 n] bytes.
        dtype: ``BF16`` or ``F16``.
        out: [n] receives the values.
    """
    if dtype == "F16":
        out[...] = raw.view("<f2")
        return
    bits = raw.view("<u2")
    if out.dtype == np.float32:
        np.left_shift(bits, 16, out=out.view("<u4"), dtype="<u4")
    else:
        out[...] = (bits.astype("<u4") << np.uint32(16)).view("<f4")


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view("<u4")
    # Half of the last place, a little less before even numbers: ties go to even.
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    high = (rounded >> np.uint32(16)).astype("<u2")
    broken = np.isnan(values)
    if broken.any():  # rounding may have carried it out of the exponent
        high[broken] = _NAN
    return np.asarray(high, np.uint16)
