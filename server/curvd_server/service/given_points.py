"""Data points that are given in a call: received, judged, and named as the dataset does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvd.errors import InvalidVector, LimitExceeded
from curvd.tensors import safetensors_header
from curvd_server.service.query_call import QueryCall
from curvd_server.service.streams import Chunks


async def received(call: QueryCall, chunks: Chunks) -> dict[str, NDArray[Any]]:
    """Receive the tensors that travel with a request; there may be none.

    Args:
        call: The call.
        chunks: Their file.

    Returns:
        The tensors by name, of any type.

    Raises:
        LimitExceeded: If they are too large.
    """
    if await chunks.is_empty():
        return {}

    def accept(header: safetensors_header.Header) -> int:
        nbytes = safetensors_header.payload_bytes(header)
        if nbytes > call.limits.operand_bytes:
            msg = (
                f"data points of {nbytes} bytes exceed the limit of "
                f"{call.limits.operand_bytes} (operand_bytes): send fewer per call"
            )
            raise LimitExceeded(msg, nbytes=nbytes, limit=call.limits.operand_bytes)
        call.reserve_bytes(3 * nbytes)
        return 0

    return dict(await call.received(chunks, accept))


def named_as(
    names: Sequence[str], tensors: Mapping[str, NDArray[Any]]
) -> Mapping[str, Tensor]:
    """Give tensors that came by position the names that the dataset has for them.

    Args:
        names: These names, in order.
        tensors: By name, or by position as "0", "1", ….

    Returns:
        The tensors by name; which there must be is not judged here.

    Raises:
        InvalidVector: If lengths differ, there is nothing, or a number is not finite.
    """
    by_position = {str(i): name for i, name in enumerate(names)}
    if set(tensors) <= set(by_position) and set(tensors) != set(names):
        tensors = {by_position[name]: array for name, array in tensors.items()}
    lengths = {name: len(array) if array.ndim else 0 for name, array in tensors.items()}
    if len(set(lengths.values())) != 1 or not max(lengths.values()):
        msg = f"data points need tensors of one common length above 0, got {lengths}"
        raise InvalidVector(msg, lengths=str(lengths))
    return {name: _tensor(name, array) for name, array in tensors.items()}


def _tensor(name: str, array: NDArray[Any]) -> Tensor:
    if array.dtype == np.uint16:  # bfloat16, which NumPy has not
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        msg = f"data points must be finite; {name!r} is not"
        raise InvalidVector(msg, tensor=name)
    return torch.from_numpy(array)
