"""Extremal eigenpairs: thick-restart Lanczos that can start from a subspace.

From one start vector this is the thick-restart Lanczos method (Wu & Simon, SIAM J.
Matrix Anal. Appl. 22, 2000). From the eigenvectors of a similar operator it is the
generalised Davidson method (Morgan & Scott, SIAM J. Sci. Stat. Comput. 7, 1986)
without preconditioner, which keeps what the start vectors know: each step adds the
residual of a pair that has not converged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from curvd.choices import Stop, Which
from curvd_server.queries.band import Band, Floats
from curvd_server.queries.base import Products, Progress, Query

_SMALL_BYTES = 64 << 20
_SMALL_BASIS = 256
_OFTEN = 64
"""Above this many columns not every step looks at the Ritz pairs: that costs c^3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EigshResult:
    """Eigenpairs, largest eigenvalue first."""

    values: tuple[float, ...]
    vectors: Tensor
    """[k, P], orthonormal."""
    residuals: tuple[float, ...]
    """``|Ax - λx|`` of each pair."""
    tolerances: tuple[float, ...]
    """What each residual was asked to reach, rounding of the operator included."""
    asymmetry: float
    """``|H - H^T| / 2`` of the operator projected on the basis: its noise."""
    iterations: int
    restarts: int
    products: int
    stopped: Stop


def default_basis(k: int, size: int, vector_bytes: int) -> int:
    """Choose how many vectors a basis has before a restart.

    A restart forgets, which costs products: many of them at a clustered end of a
    spectrum. So there is none while vectors are small.

    Args:
        k: Wanted pairs.
        size: P.
        vector_bytes: Memory of a vector.

    Returns:
        2k + 20, or as many as fit 64 MiB, but no more than 256; at most P.
    """
    fitting = min(_SMALL_BASIS, _SMALL_BYTES // max(1, vector_bytes))
    return min(size, max(2 * k + 20, fitting))


def eigsh(
    products: Products,
    k: int,
    *,
    which: Which = Which.LARGEST,
    tolerance: float = 1e-6,
    basis: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
) -> Query[EigshResult]:
    """Compute k extremal eigenpairs of a symmetric map.

    Args:
        products: The map.
        k: How many, in [1, P].
        which: Which end of the spectrum.
        tolerance: A pair has converged at ``|Ax - λx| <= tolerance * |λ|``, or when
            the rounding of the operator allows no better.
        basis: Columns of the basis before a restart, at most P; None: see
            `default_basis`.
        start: [s, P] Vectors that are near the wanted ones, any scale; the memory is
            that of ``basis + s`` vectors.
        seed: Of the random start vector.

    Yields:
        Ritz values, and their residuals.

    Returns:
        The pairs; the best so far if products or time ran out.
    """
    size = basis or default_basis(k, products.size, products.vector_bytes)
    size = min(products.size, max(size, k + 2))
    band = Band(products, size, None if start is None else start[: size - 1], seed)
    pairs = _Pairs.of(band, k, which, tolerance)
    given = band.pending
    iterations = restarts = 0
    while True:
        stopped = products.refusal() if band.count else None
        if stopped is not None or band.count == size:
            band.settle()
        complete = band.count == products.size
        if stopped is not None or complete or _due(band):
            pairs = _Pairs.of(band, k, which, tolerance)
            if pairs.done(k) and not band.settled:
                band.settle()
                pairs = _Pairs.of(band, k, which, tolerance)
            if complete or pairs.done(k):
                stopped = Stop.CONVERGED
        yield Progress(
            iteration=iterations,
            products=products.done,
            estimates=tuple(pairs.values.tolist()),
            residuals=tuple(pairs.residuals.tolist()),
        )
        if stopped is not None:
            break
        if band.pending > 1 and iterations >= given and pairs.open.any():
            band.aim(band.c @ pairs.turn[:, pairs.hardest])
        if band.count == size:
            band.shrink(pairs.kept(k, which))
            restarts += 1
        band.grow()
        iterations += 1
    return EigshResult(
        values=tuple(pairs.values.tolist()),
        vectors=band.combine(pairs.turn),
        residuals=tuple(pairs.residuals.tolist()),
        tolerances=tuple(pairs.wanted.tolist()),
        asymmetry=pairs.asymmetry,
        iterations=iterations,
        restarts=restarts,
        products=products.done,
        stopped=stopped,
    )


def _due(band: Band) -> bool:
    """Say whether it is time to look at the Ritz pairs."""
    c = band.count
    return band.pending > 1 or c <= _OFTEN or c == band.size or c % (c // 32) == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pairs:
    """The wanted Ritz pairs, largest value first, and how good they are."""

    values: Floats
    """[k]; fewer if the basis has fewer."""
    turn: Floats
    """[c, k] Coefficients of the vectors."""
    residuals: Floats
    wanted: Floats
    """[k] Residual that each shall reach."""
    open: NDArray[np.bool_]
    """[k] Which have not."""
    hardest: int
    """The open pair that converges last."""
    asymmetry: float
    all: tuple[Floats, Floats]
    """[c] All Ritz values, ascending, and [c, c] their coefficients."""

    @classmethod
    def of(cls, band: Band, k: int, which: Which, tolerance: float) -> _Pairs:
        """Compute them."""
        ritz, turns = band.ritz()
        ranked = select(ritz, k, which)
        order = ranked[np.argsort(-ritz[ranked], kind="stable")]
        values, turn = ritz[order], turns[:, order]
        asymmetry = float(np.linalg.norm(band.h - band.h.T, 2)) / 2 if len(ritz) else 0
        floor = 8 * band.eps * band.scale + 2 * asymmetry
        wanted = np.maximum(tolerance * np.abs(values), floor)
        residuals = band.residuals(turn, values)
        open_ = residuals > wanted
        late = [i for i in ranked if open_[order == i].all()]
        return cls(
            values=values,
            turn=turn,
            residuals=residuals,
            wanted=wanted,
            open=open_,
            hardest=int(np.flatnonzero(order == late[-1])[0]) if late else 0,
            asymmetry=asymmetry,
            all=(ritz, turns),
        )

    def done(self, k: int) -> bool:
        """Say whether all that were wanted have converged."""
        return len(self.values) == k and not self.open.any()

    def kept(self, k: int, which: Which) -> Floats:
        """Choose the Ritz vectors that survive a restart: [c, l]."""
        ritz, turns = self.all
        return turns[:, keep_of(ritz, k, which, self.values[self.open])]


def select(values: Floats, k: int, which: Which) -> NDArray[np.intp]:
    """Choose k of ascending values, the one that converges first first.

    Args:
        values: [m], ascending.
        k: How many; all if there are fewer.
        which: Which end.

    Returns:
        Indices.
    """
    order = np.arange(len(values))
    if which is Which.SMALLEST:
        ranked = order
    elif which is Which.LARGEST:
        ranked = order[::-1]
    elif which is Which.LARGEST_MAGNITUDE:
        ranked = np.argsort(-np.abs(values), kind="stable")
    else:
        # Alternately from the top and the bottom; an odd k takes one more at the top.
        ends = np.empty(len(values), dtype=np.intp)
        ends[0::2] = order[::-1][: (len(values) + 1) // 2]
        ends[1::2] = order[: len(values) // 2]
        ranked = ends
    return ranked[:k]


def keep_of(values: Floats, k: int, which: Which, goals: Floats) -> NDArray[np.intp]:
    """Choose the Ritz vectors that survive a restart.

    To keep more widens the gap between a goal and what is left to be told apart from
    it, to keep fewer leaves more steps until the next restart. A cycle damps by a
    Chebyshev polynomial over the interval of what is left, which grows by
    ``exp(degree * arccosh(1 + 2 gap / width))`` at a goal; the largest exponent wins
    (Yamazaki, Bai, Simon, Wang & Wu, ACM Trans. Math. Softw. 37, 2010). Outliers at
    the far end are better met by a root each than by a wider interval.

    Args:
        values: [m], ascending.
        k: Wanted pairs.
        which: Which end.
        goals: Values of the wanted pairs that have not converged.

    Returns:
        Indices of at least k, fewer than m - 1.
    """
    m = len(values)
    ranked = select(values, m, which)

    def exponent(kept: int) -> float:
        far = np.sort(np.abs(values[ranked[kept:]] - goals[:, None]))[:, ::-1]
        gap, degree = far[:, -1:], np.arange(m - kept, 1, -1)
        width = np.maximum(far[:, :-1] - gap, np.finfo(np.float64).tiny)
        growth = degree * np.arccosh(1 + 2 * gap / width)
        return float(growth.max(axis=1).min())

    return ranked[: max(range(k, max(k + 1, m - 1)), key=exponent)]
