"""Nystroem sketches: what random products tell of a map's largest eigenvalues.

``A Omega (Omega' A Omega)^+ (A Omega)'`` in the stable, shifted form of Frangella, Tropp &
Udell (SIAM J. Matrix Anal. Appl. 44, 2023, algorithm 2.1), grown by columns: no product is
wasted on a rank that turns out to be too small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvd.contract import Distribution, Stop
from curvd.errors import FailedPrecondition
from curvd_server.linalg.base import Products, Progress, Query
from curvd_server.linalg.block_krylov import factors
from curvd_server.linalg.low_rank import LowRank
from curvd_server.linalg.scales import units_of

_FIRST = 16
"""Rank to begin with; it doubles as long as that pays."""
_LEAST = 10
"""Values below so many dampings are not worth a product (their section 5.3)."""
_PROBES = 1 << 33
"""Index of the first probe of a sketch."""
_SHIFTS = 128
"""Doublings of the shift that are tried: from one rounding on, far beyond the map itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NystromResult:
    """A sketch, and what it took."""

    sketch: LowRank
    """Empty where the map was found not to be positive semi-definite."""
    smallest: float
    """Smallest eigenvalue of the map on the span of the probes."""
    products: int
    stopped: Stop
    """CONVERGED: more rank would not pay, or was not asked for."""


def nystrom(
    products: Products,
    rank: int,
    *,
    damping: float = 0.0,
    columns: int | None = None,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> Query[NystromResult]:
    """Sketch a positive semi-definite map.

    Args:
        products: The map A.
        rank: Probes, at most P.
        damping: Of the systems to come. If positive, the rank grows only until the
            smallest value is below ten times it, or until what the last growth saves is
            less than it cost.
        columns: Right-hand sides to come, for what growing saves; None: many.
        tolerance: Of the systems to come, likewise.
        seed: Of the probes.

    Yields:
        The smallest value so far, after each growth.

    Returns:
        The sketch; of fewer probes if products or time ran out.
    """
    growing = _Growing(products, seed)
    rank = min(rank, products.size)
    values = torch.zeros(0, dtype=torch.float64)
    stopped: Stop | None = None
    while growing.count < rank:
        wanted = max(_FIRST, growing.count) if damping > 0 else rank
        wanted = products.allowed(min(wanted, rank - growing.count)) or 1
        stopped = products.refusal(wanted)
        if stopped is not None:
            break
        before = float(values[-1]) if len(values) else None
        growing.grow(wanted)
        if growing.smallest < -growing.rounding:
            stopped = Stop.NEGATIVE_CURVATURE
            break
        values = growing.values()
        least = float(values[-1])
        before = float(values[0]) if before is None else before
        yield Progress(
            iteration=growing.count, products=products.done, estimates=(least,)
        )
        if damping > 0 and (
            least <= _LEAST * damping
            or not _pays(before, least, wanted, damping, columns, tolerance)
        ):
            break
    bad = stopped is Stop.NEGATIVE_CURVATURE
    return NystromResult(
        sketch=LowRank(products.space.empty(0), values[:0].numpy())
        if bad
        else growing.sketch(),
        smallest=growing.smallest,
        products=products.done,
        stopped=stopped or Stop.CONVERGED,
    )


def _pays(
    before: float,
    least: float,
    cost: int,
    damping: float,
    columns: int | None,
    tolerance: float,
) -> bool:
    """Say whether the last growth saved more products than it cost.

    Conjugate gradients take about ``sqrt(condition) log(2 / tolerance) / 2`` steps; the
    condition of the preconditioned map is about ``1 + least / damping``.

    Args:
        before: The smallest value before; the largest one, if there was no sketch.
        least: The smallest value now.
        cost: Products of the growth.
        damping: Positive.
        columns: Right-hand sides; None: so many that everything pays.
        tolerance: Of their residuals.

    Returns:
        Whether it did.
    """
    if columns is None:
        return True
    roots = math.sqrt(1 + before / damping) - math.sqrt(1 + least / damping)
    return columns * roots * math.log(2 / tolerance) / 2 > cost


class _Growing:
    """Probes Omega, orthonormal, and their products.

    Args:
        products: The map A.
        seed: Of the probes.
    """

    def __init__(self, products: Products, seed: int) -> None:
        self._products, self._space, self._seed = products, products.space, seed
        self._omega, self._y = self._space.empty(0), self._space.empty(0)
        self._unit: float | None = None
        """A power of two by which products are divided, so that the squares of any can be
        summed; None until one is not zero."""
        self._least = math.inf
        """Smallest eigenvalue of the core, divided likewise."""
        self.smallest = math.inf

    @property
    def count(self) -> int:
        """Number of probes."""
        return len(self._omega)

    @property
    def rounding(self) -> float:
        """How negative rounding may make an eigenvalue of a map that has none."""
        return self._true(
            self._products.rounding * float(self._space.norms(self._y).max())
        )

    def grow(self, columns: int) -> None:
        """Add probes, at a product each.

        Args:
            columns: How many.
        """
        products = self._products
        W = products.space.probes(
            Distribution.NORMAL,
            self._seed,
            range(_PROBES + self.count, _PROBES + self.count + columns),
        )
        for _ in range(2):
            if self.count:
                found = self._space.cross(self._omega, W)
                W = self._space.add(W, found, self._omega, alpha=-1)
            W, _, _ = factors(self._space, W, W)
        Y = products(W)
        if self._unit is None:
            peak = self._space.peak(Y)
            if peak:
                wide = torch.tensor([peak], dtype=torch.float64)
                self._unit = float(units_of(wide, Y.dtype))
        if self._unit is not None:
            Y = Y / self._unit
        self._omega, self._y = torch.cat((self._omega, W)), torch.cat((self._y, Y))
        self._least = float(torch.linalg.eigvalsh(self._core())[0])
        self.smallest = self._true(self._least)

    def values(self) -> Tensor:
        """Compute the sketch's eigenvalues: [count], descending, float64."""
        if self._unit is None:  # the zero map
            return torch.zeros(self.count, dtype=torch.float64)
        _, triangle = self._shifted()
        gram = self._space.cross(
            self._y, self._y
        )  # the shift is far below its rounding
        inner = torch.linalg.solve_triangular(triangle, gram, upper=False)
        inner = torch.linalg.solve_triangular(triangle, inner.T, upper=False)
        values: Tensor = torch.linalg.eigvalsh((inner + inner.T) / 2)
        return values.clamp_min(0).flip(0) * self._unit

    def sketch(self) -> LowRank:
        """Make the sketch: eigenvectors and values."""
        if self._unit is None:  # no product, or the zero map
            return LowRank(self._omega[:0], np.zeros(0))
        shift, triangle = self._shifted()
        Y = torch.add(self._y, self._omega, alpha=shift)
        self._space.witness(triangle)
        F = torch.linalg.solve_triangular(triangle.to(Y.dtype), Y, upper=False)
        Q, _, turn = factors(self._space, F, F)
        # F = turn' Q: with the singular values of turn, A is about F'F - shift.
        left, sizes, _ = torch.linalg.svd(turn, full_matrices=False)
        values = (sizes**2 - shift).clamp_min(0)
        # What the shift may have made is no eigenvalue.
        used = values > max(shift, self._products.rounding * float(sizes.max()) ** 2)
        found = self._space.combine(left[:, used].T, Q)
        return LowRank(found, (values[used] * self._unit).cpu().numpy())

    def _true(self, value: float) -> float:
        """Return to the scale of the map."""
        return value if self._unit is None else value * self._unit

    def _core(self) -> Tensor:
        core = self._space.cross(self._omega, self._y)
        return (core + core.T) / 2

    def _shifted(self) -> tuple[float, Tensor]:
        """Shift the map by as little as makes it positive: the shift, and the factor."""
        core = self._core()
        eps = torch.finfo(self._products.dtype).eps
        shift = eps * float(self._space.norms(self._y).norm()) + max(
            0.0, -2 * self._least
        )
        for _ in range(_SHIFTS):
            shifted = core + shift * torch.eye(self.count, dtype=core.dtype).to(core)
            triangle, failed = torch.linalg.cholesky_ex(shifted)
            if not failed:
                return shift, triangle
            shift *= 2
        msg = (
            f"the products of {self.count} probes have no Cholesky factor, however shifted "
            f"(their smallest eigenvalue is {self.smallest:.3g}): they are no products of a "
            "positive semi-definite map; check the parameters, or make the session with "
            "dtype='F64'"
        )
        raise FailedPrecondition(msg, rank=self.count)
