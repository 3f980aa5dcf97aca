"""Sums over elements that are here: in parts that fit the cache, in double precision.

A sum over millions of float32 elements loses digits that eigenvalues and residuals
need, and a double precision copy of a block of vectors would not fit. So elements are
summed in their own precision within a part, and the parts in double precision. What is
done to a part is done while it is in the cache: memory is what bounds these functions.

Whether these elements are all of a vector or some of it is not known here: algorithms ask
their `Space`, which does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CPU_PART = 1 << 14
"""Elements; 40 rows of them stay in the cache in float32, and sums stay short."""
_GPU_PART = 1 << 22
"""A device sums in trees and pays for each launch."""


def dots(U: Tensor, V: Tensor) -> Tensor:
    """Compute inner products row by row.

    Args:
        U: [K, P].
        V: [K, P].

    Returns:
        [K], float64.
    """
    total = U.new_zeros(len(U), dtype=torch.float64)
    for part in _parts(U):
        total += (U[:, part] * V[:, part]).sum(1)
    return total


def coefficients(basis: Tensor, vector: Tensor) -> Tensor:
    """Compute inner products with the rows of a basis.

    Args:
        basis: [m, P].
        vector: [P].

    Returns:
        [m], float64.
    """
    total = basis.new_zeros(len(basis), dtype=torch.float64)
    for part in _parts(vector):
        total += basis[:, part] @ vector[part]
    return total


def cross(basis: Tensor, vectors: Tensor) -> Tensor:
    """Compute inner products of all rows with all rows, reading each once.

    Args:
        basis: [m, P].
        vectors: [K, P].

    Returns:
        [K, m], float64.
    """
    shape = (len(vectors), len(basis))
    total = basis.new_zeros(shape, dtype=torch.float64)
    for part in _parts(vectors):
        # In this order BLAS is the quickest: the narrow matrix first.
        total += vectors[:, part] @ basis[:, part].T
    return total


def subtract(basis: Tensor, weights: Tensor, vector: Tensor) -> Tensor:
    """Subtract a combination of rows from a vector, in place.

    Args:
        basis: [m, P].
        weights: [m].
        vector: [P].

    Returns:
        The square of the norm of what is left, a scalar, float64.
    """
    weights = weights.to(basis.dtype)
    total = basis.new_zeros((), dtype=torch.float64)
    for part in _parts(vector):
        piece = vector[part].addmv_(basis[:, part].T, weights, alpha=-1)
        total += piece.square().sum()
    return total


def coefficients_each(bases: Tensor, vectors: Tensor) -> Tensor:
    """Compute inner products of each vector with the rows of its own basis.

    Args:
        bases: [K, m, P].
        vectors: [K, P].

    Returns:
        [K, m], float64.
    """
    total = bases.new_zeros(bases.shape[:2], dtype=torch.float64)
    for part in _parts(vectors):
        # The vector first: the other way round takes four times as long.
        total += (vectors[:, None, part] @ bases[:, :, part].mT)[:, 0]
    return total


def subtract_each(bases: Tensor, weights: Tensor, vectors: Tensor) -> Tensor:
    """Subtract from each vector a combination of the rows of its own basis, in place.

    Args:
        bases: [K, m, P].
        weights: [K, m].
        vectors: [K, P].

    Returns:
        The squares of the norms of what is left, [K], float64.
    """
    weights = weights.to(bases.dtype)[:, None]
    total = bases.new_zeros(len(bases), dtype=torch.float64)
    for part in _parts(vectors):
        piece = vectors[:, part]
        piece -= (weights @ bases[:, :, part])[:, 0]
        total += piece.square().sum(1)
    return total


def rotate(basis: Tensor, turn: Tensor, first: int = 0) -> None:
    """Replace some rows of a basis by combinations of its rows, in place.

    Args:
        basis: [m, P].
        turn: [l, m], l not above m - first.
        first: The first row that is replaced.
    """
    turn = turn.to(basis)
    for part in _parts(basis):
        piece = basis[:, part]
        piece[first : first + len(turn)] = turn @ piece


def _parts(V: Tensor) -> Iterator[slice]:
    size, step = V.shape[-1], _GPU_PART if V.is_cuda else _CPU_PART
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
