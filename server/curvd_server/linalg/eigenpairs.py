"""Extremal eigenpairs: thick-restart Lanczos that can start from a subspace.

From one start vector this is the thick-restart Lanczos method (Wu & Simon, SIAM J.
Matrix Anal. Appl. 22, 2000). From the eigenvectors of a similar operator it is the
generalised Davidson method (Morgan & Scott, SIAM J. Sci. Stat. Comput. 7, 1986)
without preconditioner, which keeps what the start vectors know: each step adds the
residual of a pair that has not converged. When the wanted pairs have converged, what
their start vectors could not see is searched for: see `copies`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from curvd.contract import Stop, Which
from curvd_server.linalg.band import Band, Floats
from curvd_server.linalg.base import Products, Progress, Query
from curvd_server.linalg.copies import Converged, Edge, missing
from curvd_server.linalg.ritz import keep_of, select

_SMALL_BYTES = 64 << 20
_SMALL_BASIS = 256
_SEARCH = 32
_INVARIANT = 0.25
"""Largest residual of what is nearly invariant, relative to its distance from an edge."""
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


def search_basis(vector_bytes: int) -> int:
    """Choose how many vectors a search for missing eigenvectors holds.

    Args:
        vector_bytes: Memory of a vector.

    Returns:
        32, or as many as fit 64 MiB, but no more than 256.
    """
    return max(_SEARCH, min(_SMALL_BASIS, _SMALL_BYTES // max(1, vector_bytes)))


def eigsh(
    products: Products,
    k: int,
    *,
    which: Which = Which.LARGEST,
    tolerance: float = 1e-6,
    basis: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    copies: bool = True,
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
        seed: Of random vectors.
        copies: Whether to search for what the start vectors cannot see.

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
    found: list[Tensor] = []
    searches = _Searches(products, tolerance, seed)
    iterations = restarts = 0

    def progress() -> Progress:
        return Progress(
            iteration=iterations,
            products=products.done,
            estimates=tuple(pairs.values.tolist()),
            residuals=tuple(pairs.residuals.tolist()),
        )

    while True:
        stopped = products.refusal() if band.count else None
        if stopped is not None or band.count == size:
            band.settle()
        complete = band.count == products.size
        looked = stopped is not None or complete or _due(band)
        if looked:
            pairs = _Pairs.of(band, k, which, tolerance)
            if pairs.converged(k) and not band.settled:
                band.settle()
                pairs = _Pairs.of(band, k, which, tolerance)
        yield progress()
        if complete:
            stopped = Stop.CONVERGED
        elif looked and not found and (good := pairs.converged(k)):
            edges = good.edges(which, generic=start is None) if copies else []
            if not edges:
                stopped = Stop.CONVERGED
            elif searches.pay(band):
                known = pairs.known(band, edges)
                more = yield from searches.search(known, edges, progress)
                found = [] if more is None else list(more)
                if not found:
                    stopped = products.refusal() if more is None else Stop.CONVERGED
        if stopped is not None:
            break
        if band.pending > 1 and iterations >= given and pairs.open.any():
            band.aim(band.c @ pairs.turn[:, pairs.hardest])
        if band.count == size:
            band.shrink(pairs.kept(k, which))
            restarts += 1
        if found:
            band.adopt(found.pop())
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


class _Searches:
    """Searches for what is missing, and what they cost.

    Args:
        products: The map.
        tolerance: On residuals.
        seed: Of random vectors.
    """

    def __init__(self, products: Products, tolerance: float, seed: int) -> None:
        self._products, self._tolerance, self._seed = products, tolerance, seed
        self._count = self._cost = 0

    def pay(self, band: Band) -> bool:
        """Say whether another search is cheaper than to complete the basis."""
        left = self._products.size - band.count
        return band.size < self._products.size or left > self._cost

    def search(
        self, known: Tensor, edges: list[Edge], progress: Callable[[], Progress]
    ) -> Query[Tensor | None]:
        """Search once; arguments, progress and result as of `missing`."""
        before = self._products.done
        found = yield from missing(
            self._products,
            known,
            edges,
            tolerance=self._tolerance,
            size=search_basis(self._products.vector_bytes),
            seed=self._seed,
            turn=self._count,
            progress=progress,
        )
        self._count += 1
        self._cost = self._products.done - before
        return found


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
    ranked: NDArray[np.intp]
    """[k] Which of all Ritz values they are."""
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
            ranked=ranked,
            all=(ritz, turns),
        )

    def converged(self, k: int) -> Converged | None:
        """Return the wanted pairs, once all have converged."""
        if len(self.values) < k or self.open.any():
            return None
        return Converged(self.values, self.residuals, self.wanted)

    def known(self, band: Band, edges: list[Edge]) -> Tensor:
        """Choose what a search need not see again: [m, P].

        That is what is nearly invariant: missing eigenvectors are orthogonal to it. To
        other rows they may not be, because rounding brings them in.
        """
        ritz, turns = self.all
        residuals, sure = band.residuals(turns, ritz), np.ones(len(ritz), dtype=bool)
        for edge in edges:
            far = np.abs(ritz - edge.value)
            sure &= residuals**2 <= _INVARIANT * edge.margin * far
        sure[self.ranked] = True
        return band.combine(turns[:, sure])

    def kept(self, k: int, which: Which) -> Floats:
        """Choose the Ritz vectors that survive a restart: [c, l]."""
        ritz, turns = self.all
        goals = self.values[self.open] if self.open.any() else self.values
        return turns[:, keep_of(ritz, k, which, goals)]
