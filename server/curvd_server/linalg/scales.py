"""Which numbers algorithms can compute with: those whose squares are numbers of their type.

Norms and inner products are sums of squares, in the type of vectors within a part and in
float64 beyond it; variances of such sums are squares again, in float64. Where those under-
or overflow, an algorithm does not fail: it believes what is left of them. So what is out of
range is refused, at the first product that shows it, and a power of two brings it back.

Vectors that callers give are no products of the operator: they are brought into range, by a
power of two each, and so is what is made of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvd.errors import ScaleOutOfRange
from curvd_server.linalg import vectors


def units_of(peaks: Tensor, dtype: torch.dtype) -> Tensor:
    """Choose by which powers of two vectors are divided, so that they can be squared.

    Args:
        peaks: [K] About their largest elements, float64.
        dtype: Their type, of which each power and its reciprocal are numbers.

    Returns:
        [K] Powers of two just above the peaks, float64; 1 for vectors of zeros.
    """
    limits = torch.finfo(dtype)
    seen = peaks.clamp(8 * limits.tiny, limits.max / 8)
    powers = torch.ldexp(torch.ones_like(peaks), torch.frexp(seen).exponent)
    return torch.where(peaks > 0, powers, 1.0)


def multiply_by_powers(
    V: Tensor, units: Tensor, peaks: Tensor, *, what: str, remedy: str
) -> None:
    """Multiply vectors by powers of two, in place, if the results are numbers of their type.

    Args:
        V: [K, ...].
        units: [K] The powers, float64.
        peaks: [K] About the largest elements of the vectors, float64.
        what: Names a vector in an error; ``{row}`` is its index.
        remedy: What to do about it; ``{factor}`` is the power of two that helps.

    Raises:
        ScaleOutOfRange: If one would overflow, or have no digits left.
    """
    limits = torch.finfo(V.dtype)
    least, most = math.frexp(limits.tiny)[1], math.frexp(limits.max)[1]
    exponents = torch.frexp(peaks).exponent + torch.frexp(units).exponent - 1
    bad = (peaks > 0) & ((exponents < least) | (exponents > most))
    if bad.any():
        row = int(bad.nonzero()[0])
        exponent = int(exponents[row])
        # The factor is a number of the type, too.
        power = max(least + 8, min(-exponent, most - 8))
        msg = (
            f"{what.format(row=row)} has elements of about 2**{exponent}, which are no numbers "
            f"of {V.dtype} ({limits.tiny:.1e} to {limits.max:.1e}): "
            f"{remedy.format(factor=_power(power))} and scale the answer back"
        )
        if V.dtype is not torch.float64:
            msg += ", or make the session in 'F64'"
        raise ScaleOutOfRange(msg, row=row, exponent=exponent)
    V.mul_(units.to(V).reshape(-1, *[1] * (V.ndim - 1)))


def _power(exponent: int) -> str:
    """Write a power of two as Python."""
    return f"2.0**{exponent}" if exponent >= 0 else f"2.0**({exponent})"


class Range:
    """The sizes that a map may have.

    Args:
        dtype: Element type of its vectors.
        size: P.
    """

    def __init__(self, dtype: torch.dtype, size: int) -> None:
        own, sums = torch.finfo(dtype), torch.finfo(torch.float64)
        self._dtype = dtype
        self.least = max(own.tiny**0.5 / own.eps, (sums.tiny / sums.eps**2) ** 0.25)
        """Of a map: squares of residuals, down to its rounding, are numbers then."""
        most = min(own.max**0.5, sums.max**0.25)
        self.most = most / math.sqrt(max(1, size))
        """Of an element of a product: P squares can be added then."""
        self._is_seen = False

    def check(self, V: Tensor, result: Tensor, peak: float, number: int) -> None:
        """Refuse a product that is too large, or the first ones if they are too small.

        Unit vectors show a column of the map each, and others may be larger: who
        multiplies with all of them asks `check_peak` at the end.

        Args:
            V: [K, P] What was multiplied.
            result: [K, P].
            peak: Its largest element.
            number: Products so far.

        Raises:
            ScaleOutOfRange: If it is.
        """
        if peak > self.most:
            raise self._error(peak, number)
        if self._is_seen or not peak:
            return
        longest = float(V.abs().amax())
        # No norm is needed where elements alone show that the map is large enough.
        self._is_seen = peak >= self.least * longest or bool(
            (torch.count_nonzero(V, dim=1) == 1).all()
        )
        if self._is_seen:
            return
        V, rows = V.double() / longest, result.double() / peak
        stretch = (vectors.dots(rows, rows) / vectors.dots(V, V)).sqrt().amax()
        # Of random vectors it is the Frobenius norm over sqrt(P).
        found = float(stretch) * math.sqrt(V.shape[1]) * (peak / longest)
        if found < self.least:
            raise self._error(found, number)
        self._is_seen = True

    def check_peak(self, peak: float) -> None:
        """Refuse a whole map whose largest element is too small; zero is not.

        Args:
            peak: The element.

        Raises:
            ScaleOutOfRange: If it is.
        """
        if 0 < peak < self.least:
            raise self._error(peak, None)

    def _error(self, found: float, number: int | None) -> ScaleOutOfRange:
        power = -math.frexp(found)[1]
        also = "" if self._dtype is torch.float64 else ", or make the session in 'F64'"
        who = "the operator" if number is None else f"product {number} of the query"
        msg = (
            f"{who} has elements of about {found:.1e}: squares of such numbers, and of their "
            f"rounding, are not numbers of {self._dtype} (which takes {self.least:.1e} to "
            f"{self.most:.1e}), so nothing that is computed from them holds; ask this of "
            f"({_power(power)} * H) and scale the answer back{also}"
        )
        return ScaleOutOfRange(msg, product=number, scale=found)
