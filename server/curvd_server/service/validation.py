"""What is refused before it reaches the queue.

After batching, one bad request would fail its neighbours; and sizes come from
strangers, so they are judged before anything is allocated.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvd.contract import Dtype, ParameterLayout
from curvd.errors import InvalidSpec, InvalidVector, LimitExceeded
from curvd.tensors import NARROW, Header, first_not_finite
from curvd_server.config import LimitsConfig

MESSAGE_BYTES = (4 << 20) - (64 << 10)
"""Tensors in one message: gRPC's peers take 4 MiB by default, headers included."""


def vector_dtype(dtype: Dtype) -> np.dtype[Any]:
    """Tell the element type in which a session's vectors travel.

    Args:
        dtype: The element type of the session.

    Returns:
        float64 for float64 sessions, else float32.
    """
    return np.dtype(np.float64 if dtype is Dtype.FLOAT64 else np.float32)


def check_upload(total_bytes: int, offset: int, limits: LimitsConfig) -> None:
    """Refuse an upload by what it announces.

    Args:
        total_bytes: The bytes of the whole file.
        offset: Where its first bytes belong.
        limits: The limits of the server.

    Raises:
        InvalidSpec: If the numbers make no sense.
        LimitExceeded: If the file is too large.
    """
    if total_bytes < 8 or not 0 <= offset <= total_bytes:
        msg = (
            "upload.total_bytes must be at least 8 and offset within it, got "
            f"{total_bytes} and {offset}"
        )
        raise InvalidSpec(msg, total_bytes=total_bytes, offset=offset)
    if total_bytes > limits.upload_bytes:
        msg = (
            f"an upload of {total_bytes} bytes exceeds this server's limit of "
            f"{limits.upload_bytes} (upload_bytes)"
        )
        raise LimitExceeded(msg, total_bytes=total_bytes, limit=limits.upload_bytes)


def check_operand(
    header: Header,
    *,
    matrix: bool | None,
    layout: ParameterLayout,
    dtype: Dtype,
    limits: LimitsConfig,
) -> int:
    """Judge an operand by its header.

    Args:
        header: The header of the safetensors file that was announced.
        matrix: Whether [K, P] is wanted, else [P]; None: either.
        layout: The layout of the session.
        dtype: The element type of the session.
        limits: The limits of the server.

    Returns:
        K; 1 for a vector.

    Raises:
        InvalidVector: If it is not the one tensor ``v`` of the right type and shape.
        LimitExceeded: If it is too large.
    """
    if set(header) != {"v"}:
        names = ", ".join(map(repr, header)) or "none"
        msg = f"an operand is one tensor named 'v'; the tensors sent are {names}"
        raise InvalidVector(msg, tensors=names)
    tensor, name = header["v"], "F64" if dtype is Dtype.FLOAT64 else "F32"
    if tensor.dtype not in (name, *NARROW):
        msg = (
            f"the operand has element type {tensor.dtype}; this session's is {name}, and "
            f"{' and '.join(NARROW)} are widened to it"
        )
        raise InvalidVector(msg, dtype=tensor.dtype, expected=name)
    return check_shape(
        tensor.shape, matrix=matrix, layout=layout, dtype=dtype, limits=limits
    )


def check_shape(
    shape: tuple[int, ...],
    *,
    matrix: bool | None,
    layout: ParameterLayout,
    dtype: Dtype,
    limits: LimitsConfig,
) -> int:
    """Judge an operand by its shape.

    Args:
        shape: The shape of the operand.
        matrix: Whether [K, P] is wanted, else [P]; None: either.
        layout: The layout of the session.
        dtype: The element type of the session.
        limits: The limits of the server.

    Returns:
        K; 1 for a vector.

    Raises:
        InvalidVector: If the shape is another.
        LimitExceeded: If it is too large.
    """
    axes = (1, 2) if matrix is None else (1 + matrix,)
    if len(shape) not in axes or shape[-1] != layout.size:
        wants = {1: f"[{layout.size}]", 2: f"[K, {layout.size}]"}
        want = " or ".join(wants[n] for n in axes)
        msg = f"the operand has shape {list(shape)}; this session's is {want}"
        raise InvalidVector(msg, shape=shape, parameter_count=layout.size)
    columns = shape[0] if len(shape) == 2 else 1
    # Whatever type it travels in, what it takes here is what counts.
    nbytes = math.prod(shape) * vector_dtype(dtype).itemsize
    for what, value, limit in (
        ("columns", columns, limits.columns),
        ("bytes", nbytes, limits.operand_bytes),
    ):
        if value > limit:
            msg = (
                f"the operand has {value} {what}; the limit is {limit}. Send fewer "
                "columns per call"
            )
            raise LimitExceeded(msg, value=value, limit=limit)
    return columns


def check_message(nbytes: int) -> None:
    """Refuse a result that does not fit into one message.

    Args:
        nbytes: Its size.

    Raises:
        LimitExceeded: If it is larger.
    """
    if nbytes > MESSAGE_BYTES:
        msg = (
            f"the result has {nbytes} bytes; one message holds {MESSAGE_BYTES} at "
            "most. Use MatVec or MatMat, or store_as"
        )
        raise LimitExceeded(msg, nbytes=nbytes, limit=MESSAGE_BYTES)


def check_finite(
    values: NDArray[Any], *, layout: ParameterLayout, first: int = 0
) -> None:
    """Refuse NaN and infinity, and name the place.

    Args:
        values: [K, P], or any part of it, flat.
        layout: The layout of the session.
        first: Index of the first value in the flat [K, P].

    Raises:
        InvalidVector: If a value is not finite.
    """
    flat = values.reshape(-1)
    found = first_not_finite(flat)
    if found is None:
        return
    column, index = divmod(first + found, layout.size)
    at = max(
        (p for p in layout.parameters if p.offset <= index and p.size),
        key=lambda p: p.offset,
    )
    msg = (
        f"column {column} has {flat[found]} at index {index}, in parameter "
        f"{at.name!r}; operands must be finite"
    )
    raise InvalidVector(msg, column=column, index=index, parameter=at.name)
