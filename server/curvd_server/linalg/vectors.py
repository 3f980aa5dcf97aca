"""Arithmetic on long vectors: in parts that fit the cache, sums in double precision.

A sum over millions of float32 elements loses digits that eigenvalues and residuals
need, and a double precision copy of a block of vectors would not fit. So elements are
summed in their own precision within a part, and the parts in double precision. What is
done to a part is done while it is in the cache: memory is what bounds these functions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CPU_PART = 1 << 14
"""Elements; 40 rows of them stay in the cache in float32, and sums stay short."""
_GPU_PART = 1 << 22
"""A device sums in trees and pays for each launch."""


def norms(V: Tensor) -> Tensor:
    """Compute Euclidean norms.

    Args:
        V: [K, P] or [P].

    Returns:
        [K] or a scalar, float64.
    """
    rows = V if V.ndim > 1 else V[None]
    found = dots(rows, rows).sqrt()
    return found if V.ndim > 1 else found[0]


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
        The norm of what is left, a scalar, float64.
    """
    weights = weights.to(basis.dtype)
    total = basis.new_zeros((), dtype=torch.float64)
    for part in _parts(vector):
        piece = vector[part].addmv_(basis[:, part].T, weights, alpha=-1)
        total += piece.square().sum()
    return total.sqrt()


def orthogonalise(
    basis: Tensor, vector: Tensor, *, length: Tensor | None = None, passes: int = 3
) -> tuple[Tensor, Tensor]:
    """Subtract from a vector, in place, what lies in the span of a basis.

    Again as long as a pass removes more than half of what was there: then rounding may
    have left something (Giraud, Langou & Rozloznik, Comput. Math. Appl. 50, 2005).

    Args:
        basis: [m, P], orthonormal rows.
        vector: [P].
        length: The vector's length, if known.
        passes: How many at most.

    Returns:
        The coefficients of what was subtracted: [m], float64, and the length that is
        left.
    """
    total = basis.new_zeros(len(basis), dtype=torch.float64)
    before = norms(vector) if length is None else length
    for _ in range(passes if len(basis) else 0):
        found = coefficients(basis, vector)
        after = subtract(basis, found, vector)
        total += found
        enough = not after < 0.7 * before
        before = after
        if enough:
            break
    return total, before


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
