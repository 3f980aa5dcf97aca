"""Values that nobody else can write to."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvd.tensors import loaded, to_numpy


def copied(value: Any) -> NDArray[Any] | None:
    """Copy an array or tensor to the host's memory, once.

    Args:
        value: Anything.

    Returns:
        Its values, row-major, in memory of their own; bfloat16 tensors become float32.
        None if it is neither array nor tensor.
    """
    seen = to_numpy(value)
    if seen is None or (_is_elsewhere(value, seen) and seen.flags.c_contiguous):
        return seen
    return np.array(seen, order="C")


def _is_elsewhere(value: Any, seen: NDArray[Any]) -> bool:
    """Tell whether seeing a tensor as NumPy was a copy already: off a GPU, or widened."""
    torch = loaded("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return False
    return bool(value.data_ptr() != seen.ctypes.data)
