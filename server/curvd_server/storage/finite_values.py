"""Which numbers a dataset or a state may hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvd.contract import Dtype
from curvd.errors import InvalidSpec, StateMismatch
from curvd.tensors import first_beyond, first_nan, first_not_finite

_STATISTICS = ("running_mean", "running_var")
"""Last part of the names of BatchNorm's buffers."""
_INFINITE_FROM = {
    Dtype.FLOAT32: 2.0**128 - 2.0**103,
    Dtype.BFLOAT16: 2.0**128 - 2.0**119 - 2.0**103,  # by way of float32
}
"""Smallest magnitudes that are rounded to infinity."""


def check_finite_data(name: str, dtype: str, array: NDArray[Any]) -> None:
    """Refuse a tensor of a dataset that is not finite.

    Args:
        name: The name of the tensor.
        dtype: safetensors element type; BF16 arrays are uint16 bits.
        array: The values; read in segments, which stay in the cache.

    Raises:
        InvalidSpec: If a value is not finite.
    """
    start = first_not_finite(array.reshape(-1), bits=dtype == "BF16")
    if start is not None:
        row = start // max(1, math.prod(array.shape[1:]))
        msg = f"tensor {name!r} is not finite in data point {row}; remove it or mend it"
        raise InvalidSpec(msg, tensor=name, data_point=row)


def check_finite_state(
    name: str, dtype: str, array: NDArray[Any], *, is_buffer: bool
) -> None:
    """Refuse a tensor of a state with values that nothing can be computed from.

    Buffers may be infinite, because masks are (-inf in what is added to logits); the
    statistics of BatchNorm may not.

    Args:
        name: The name of the tensor.
        dtype: safetensors element type; BF16 arrays are uint16 bits.
        array: The values.
        is_buffer: Whether it is no parameter.

    Raises:
        StateMismatch: If a value is NaN, or infinite where that has no meaning.
    """
    flat, bits = array.reshape(-1), dtype == "BF16"
    if is_buffer and name.rpartition(".")[2] not in _STATISTICS:
        kind, want, found = "buffer", "without NaN", first_nan(flat, bits=bits)
    else:
        kind = "buffer" if is_buffer else "parameter"
        want, found = "finite", first_not_finite(flat, bits=bits)
    if found is None:
        return
    value = float(
        (np.uint32(flat[found]) << 16).view(np.float32) if bits else flat[found]
    )
    index = [int(i) for i in np.unravel_index(found, array.shape)]
    msg = (
        f"{kind} {name!r} has {value} at index {index} and must be {want}: a training "
        "run that diverged? Take a state from before"
    )
    raise StateMismatch(msg, tensor=name, index=index, value=value)


def check_representable(
    tensors: Mapping[str, NDArray[Any]], dtype: Dtype, *, what: str
) -> None:
    """Refuse float64 and float32 values that are infinite in a session's own type.

    Args:
        tensors: The tensors, by name.
        dtype: The dtype of the session.
        what: They are, for the message.

    Raises:
        InvalidSpec: If a value is too large.
    """
    limit = _INFINITE_FROM.get(dtype)
    if limit is None:
        return
    for name, array in tensors.items():
        if array.dtype.kind != "f" or float(np.finfo(array.dtype).max) < limit:
            continue
        found = first_beyond(array.reshape(-1), limit)
        if found is not None:
            value = float(array.reshape(-1)[found])
            index = [int(i) for i in np.unravel_index(found, array.shape)]
            msg = (
                f"{what} {name!r} has {value} at index {index}, which is infinite in a "
                f"session of type {dtype}: open it as F64, or scale the values"
            )
            raise InvalidSpec(msg, tensor=name, index=index, value=value)
