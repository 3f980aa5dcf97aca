"""Extremal eigenpairs: thick-restart Lanczos that can start from a subspace.

From one start vector this is the thick-restart Lanczos method (Wu & Simon, SIAM J.
Matrix Anal. Appl. 22, 2000). From the eigenvectors of a similar operator it is the
generalised Davidson method (Morgan & Scott, SIAM J. Sci. Stat. Comput. 7, 1986)
without preconditioner, which keeps what the start vectors know: each step adds the
residual of a pair that has not converged. When the wanted pairs have converged, what
their start vectors could not see is searched for: see `copies`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from curvd.contract import Stop, Which
from curvd_server.linalg.band import Band, Floats
from curvd_server.linalg.base import Products, Progress, Query
from curvd_server.linalg.complement import Part, parts
from curvd_server.linalg.copies import Found, missing
from curvd_server.linalg.evidence import Evidence, Side, sides
from curvd_server.linalg.ritz import keep_of, select
from curvd_server.linalg.space import Space

_SMALL_BYTES = 64 << 20
_SMALL_BASIS = 256
_SEARCH = 32
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
        seed: The seed of random vectors.
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
    proof = _Proof(
        products, k, which=which, tolerance=tolerance, seed=seed, generic=start is None
    )
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
        elif looked and not found and pairs.converged(k):
            verdict: Stop | list[Tensor] = Stop.CONVERGED
            if copies:
                verdict = yield from proof.examine(band, pairs, progress)
                pairs = _Pairs.of(
                    band, k, which, tolerance
                )  # the basis may have turned
            if isinstance(verdict, Stop):
                stopped = verdict
            else:
                found = verdict
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


class _Proof:
    """What is done to be certain that the wanted pairs are all there are.

    Args:
        products: The map.
        k: Wanted pairs.
        which: Which end of the spectrum.
        tolerance: On residuals.
        seed: The seed of random vectors.
        generic: Whether the start is the random vector of this seed.
    """

    def __init__(
        self,
        products: Products,
        k: int,
        *,
        which: Which,
        tolerance: float,
        seed: int,
        generic: bool,
    ) -> None:
        self._products, self._k, self._which = products, k, which
        self._tolerance, self._seed, self._generic = tolerance, seed, generic
        self._evidence: Evidence | None = None
        self._single = generic
        self._shown: dict[int, tuple[float, float]] = {}
        self._count = self._cost = 0

    def examine(
        self, band: Band, pairs: _Pairs, progress: Callable[[], Progress]
    ) -> Query[Stop | list[Tensor]]:
        """Look for what is missing, once the wanted pairs have converged.

        Args:
            band: Settled.
            pairs: The pairs of the band, converged.
            progress: Makes progress of the query.

        Yields:
            Progress.

        Returns:
            Why the query ends, or what joins the basis; that may be nothing, when the
            pairs have to be better than they are.
        """
        known = sides(pairs.values, pairs.wanted, self._which)
        if self._single:
            self._evidence = pairs.evidence(
                band, self._products.normal(self._seed, 0), self._products.space
            )
        open_ = [side for side in known if self._is_open(side)]
        if open_ and not self._pays(band):
            return []
        targets = [t for side in open_ for t in side.targets(self._evidence)]
        for part in parts(band, targets, pairs.turn) if targets else ():
            found = yield from self._search(part, progress)
            if found is None:
                return self._products.refusal() or Stop.TIME
            if len(found.vectors):
                self._single = False
                return list(found.vectors)
            self._note(part, found, known)
        return Stop.CONVERGED if all(map(self._is_sure, known)) else []

    def _is_open(self, side: Side) -> bool:
        """Say whether a side has to be searched."""
        limit, _ = self._shown.get(side.sign, (math.inf, 0.0))
        shown = abs(side.last - limit) <= side.wanted
        return not shown and (side.next is not None or not self._generic)

    def _is_sure(self, side: Side) -> bool:
        """Say whether a value near the last one would have been seen."""
        if not self._single or self._evidence is None:
            return True
        _, missed = self._shown.get(side.sign, (0.0, 1.0))
        return side.missed(self._evidence) * missed <= side.allowed

    def _pays(self, band: Band) -> bool:
        """Say whether another search is cheaper than to complete the basis."""
        left = self._products.size - band.count
        return band.size < self._products.size or left > self._cost

    def _search(
        self, part: Part, progress: Callable[[], Progress]
    ) -> Query[Found | None]:
        before = self._products.done
        found = yield from missing(
            self._products,
            part,
            tolerance=self._tolerance,
            size=search_basis(self._products.vector_bytes),
            seed=self._seed,
            turn=self._count,
            progress=progress,
        )
        self._count += 1
        self._cost = self._products.done - before
        return found

    def _note(self, part: Part, found: Found, known: list[Side]) -> None:
        """Remember what a search has shown."""
        for side in known:
            nearest = [
                missed
                for target, missed in zip(part.targets, found.missed, strict=True)
                if target.sign == side.sign and target.distance <= side.near
            ]
            if any(target.sign == side.sign for target in part.targets):
                self._shown[side.sign] = side.last, min(nearest, default=1.0)


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

    def converged(self, k: int) -> bool:
        """Say whether all wanted pairs have converged."""
        return len(self.values) == k and not self.open.any()

    def evidence(self, band: Band, start: Tensor, space: Space) -> Evidence:
        """Say what all pairs show, if the run began with this vector: [own]."""
        ritz, turns = self.all
        along = space.coefficients(band.basis, start).cpu().numpy()
        along /= float(space.norms(start))
        residuals = np.linalg.norm(band.c @ turns, axis=0)
        return Evidence(ritz, residuals * np.abs(along @ turns), space.size)

    def kept(self, k: int, which: Which) -> Floats:
        """Choose the Ritz vectors that survive a restart: [c, l]."""
        ritz, turns = self.all
        goals = self.values[self.open] if self.open.any() else self.values
        return turns[:, keep_of(ritz, k, which, goals)]
