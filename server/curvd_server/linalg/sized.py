"""Lengths and inner products of vectors of any size, whose squares need not be numbers.

For what is no algorithm on a map: gradients of data points, and vectors that are stored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvd.errors import ScaleOutOfRange
from curvd_server.linalg import vectors
from curvd_server.linalg.scales import units_of
from curvd_server.linalg.space import Space

_USUAL = 2.0**20
"""Vectors whose largest elements are at most so large, or so small, need no unit."""


def in_units(V: Tensor) -> tuple[Tensor, Tensor]:
    """Divide vectors by a power of two each, which is exact, if they need it.

    Args:
        V: [K, P].

    Returns:
        [K, P] that can be squared, V itself if it can, and the powers: [K], float64.
    """
    peaks = Space.of(V).peaks(V)
    units = units_of(peaks, V.dtype)
    if not len(V) or (units.amax() <= _USUAL and units.amin() >= 1 / _USUAL):
        return V, torch.ones_like(units)
    return V / units[:, None].to(V), units


def lengths(V: Tensor) -> Tensor:
    """Compute Euclidean norms.

    Args:
        V: [K, P].

    Returns:
        [K], float64.
    """
    wide = V.dtype is torch.float64  # of others, squares are numbers there
    scaled, units = in_units(V) if wide else (V, V.new_ones((), dtype=torch.float64))
    found: Tensor = torch.linalg.vector_norm(scaled, dim=1, dtype=torch.float64)
    return found * units


def sized_products(
    A: tuple[Tensor, Tensor], B: tuple[Tensor, Tensor], *, what: str, remedy: str
) -> Tensor:
    """Compute inner products of all rows with all rows.

    Args:
        A: [K, P] in its units, and these: see `in_units`.
        B: [L, P] likewise.
        what: Names what is computed, in an error.
        remedy: What to do about it.

    Returns:
        [K, L], float64.

    Raises:
        ScaleOutOfRange: If the largest is no number of float64.
    """
    found = vectors.cross(B[0], A[0])
    powers = torch.frexp(A[1]).exponent[:, None] + torch.frexp(B[1]).exponent - 2
    check_exponents(found, powers, torch.float64, what=what, remedy=remedy)
    # One after the other: the product of both powers need not be a number.
    half = powers // 2
    return torch.ldexp(torch.ldexp(found, half), powers - half)


def check_exponents(
    values: Tensor, powers: Tensor, dtype: torch.dtype, *, what: str, remedy: str
) -> None:
    """Refuse values that would overflow, or all be too small to have digits.

    One that is too small beside others is as good as zero.

    Args:
        values: Any shape, float64.
        powers: Exponents of powers of two that they are yet to be multiplied by.
        dtype: Of which they are to be numbers.
        what: Names them.
        remedy: What to do about it.

    Raises:
        ScaleOutOfRange: If they are.
    """
    if values.isinf().any():
        msg = f"{what} overflows {values.dtype}: {remedy}"
        raise ScaleOutOfRange(msg)
    used = values.isfinite() & (values != 0)  # NaN says itself what it is
    if not used.any():
        return
    exponent = int((torch.frexp(values).exponent + powers)[used].max())
    limits = torch.finfo(dtype)
    least, most = math.frexp(limits.tiny)[1], math.frexp(limits.max)[1]
    if not least <= exponent <= most:
        msg = (
            f"{what} is about 2**{exponent}, and numbers of {dtype} are from "
            f"{limits.tiny:.1e} to {limits.max:.1e}: {remedy}"
        )
        raise ScaleOutOfRange(msg, exponent=exponent)


def as_type(values: Tensor, dtype: torch.dtype, *, what: str, remedy: str) -> Tensor:
    """Round values to a type, if they are numbers of it: see `check_exponents`.

    Args:
        values: Any shape, float64.
        dtype: The type.
        what: Names them.
        remedy: What to do about it.

    Returns:
        The same shape.
    """
    none = torch.zeros((), dtype=torch.int32, device=values.device)
    check_exponents(values, none, dtype, what=what, remedy=remedy)
    return values.to(dtype)
