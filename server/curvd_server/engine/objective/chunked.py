"""Large tensors a chunk at a time: what is summed or compared needs no copy of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from curvd_server.system import yield_point

PIECE = 1 << 18
"""Elements of a chunk; a few of them in float64 fit a core's cache."""


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape alike, along their first axis.

    Between two chunks is a yield point of long work.

    Args:
        tensors: Each ``[n, ...]`` or a scalar, with any strides.

    Yields:
        Views of all of them; at most `PIECE` elements each, or one row.
    """
    rows = [t if t.ndim else t.reshape(1) for t in tensors]
    count = max(1, PIECE * len(rows[0]) // max(1, rows[0].numel()))
    for chunk in zip(*(torch.split(t, count) for t in rows), strict=True):
        yield_point()
        yield chunk


def dot(a: Tensor, b: Tensor) -> float:
    """Multiply and sum in float64."""
    if a.numel() <= PIECE:
        yield_point()
        return float((a.double() * b.double()).sum())
    return float(sum((x.double() * y.double()).sum() for x, y in chunks(a, b)))


def norm(tensor: Tensor) -> float:
    """Compute the Euclidean norm in float64."""
    if tensor.numel() <= PIECE:
        yield_point()
        return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
    return math.sqrt(sum(p.double().square().sum() for (p,) in chunks(tensor)))


def distance(a: Tensor, b: Tensor) -> float:
    """Compute the Euclidean norm of the difference in float64."""
    if a.numel() <= PIECE:
        yield_point()
        return float(torch.linalg.vector_norm(a.double() - b.double()))
    return math.sqrt(
        sum((x.double() - y.double()).square().sum() for x, y in chunks(a, b))
    )
