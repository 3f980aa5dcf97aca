"""Search for eigenvalues that a Krylov space does not contain.

A Krylov space holds one direction of each eigenspace: what is left of an eigenspace of
higher dimension is orthogonal to it, and to every step that it will ever take. So once
the wanted pairs have converged, Lanczos' method runs a second time, from a random vector
w in the complement of the first basis, and stops as soon as it has shown that nothing is
left there beyond a target s.

It shows that as follows. An eigenvector beyond s with a component c along w has
components ``c p_i(s)`` or larger along the Lanczos vectors, p_i being their polynomials.
The squares of components sum to no more than one, so ``c^2 <= 1 / sum p_i(s)^2``: the
Christoffel function of w's spectral measure (Akhiezer, The Classical Moment Problem,
1965). A random w of length one has a component below c with a probability of less than
``c sqrt(2 P / pi)``, so that the sum bounds the probability to have missed something (van
Dorsselaer, Hochstenbach & van der Vorst, SIAM J. Matrix Anal. Appl. 22, 2000; in advance,
for any spectrum: Kuczynski & Wozniakowski, SIAM J. Matrix Anal. Appl. 13, 1992). No method
that multiplies random vectors needs fewer steps: Lanczos' polynomials are the best ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from curvd.contract import Which
from curvd_server.linalg.band import Band, Floats
from curvd_server.linalg.base import Products, Progress, Query
from curvd_server.linalg.complement import Part
from curvd_server.linalg.evidence import Target
from curvd_server.linalg.ritz import keep_of

_HUGE = 1e100
_FIRST = 1 << 32
"""Index of the first probe of a search; start vectors have small ones."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search has found."""

    vectors: Tensor
    """[n, P] What was missing beyond a target, n = 0: nothing."""
    missed: tuple[float, ...]
    """For each target: probability to have missed something beyond it; at most 1."""


def missing(
    products: Products,
    part: Part,
    *,
    tolerance: float,
    size: int,
    seed: int,
    turn: int,
    progress: Callable[[], Progress],
) -> Query[Found | None]:
    """Search the complement of a basis for eigenvectors beyond some targets.

    Args:
        products: The map.
        part: The complement and the targets.
        tolerance: On residuals, relative to each eigenvalue.
        size: Vectors in memory.
        seed: The seed of the random vector.
        turn: How many searches there were before.
        progress: Makes progress of the query.

    Yields:
        Progress.

    Returns:
        What was found; None if products or time ran out before that was certain.
    """
    start = products.normal(seed, _FIRST + turn)[None]
    free = products.size - len(part.complement.beside)
    if not free:
        return Found(start[:0], (0.0,) * len(part.targets))
    band = Band(
        products, min(size, free), start, seed, window=1, complement=part.complement
    )
    run = _Run(band, part.targets, free, tolerance)
    while run.open:
        if products.refusal():
            return None
        run.step()
        yield progress()
        if (found := run.found()) is not None:
            return Found(found, run.missed())
    return Found(start[:0], run.missed())


class _Run:
    """A Lanczos run in a complement, and what it has shown.

    Args:
        band: The band, with one pending direction.
        targets: Where to look.
        free: Dimension of the complement.
        tolerance: On residuals.
    """

    def __init__(
        self, band: Band, targets: tuple[Target, ...], free: int, tolerance: float
    ) -> None:
        self._band, self._targets, self._tolerance = band, targets, tolerance
        self._free = free
        self._at = np.array([target.value for target in targets])
        self._allowed = np.array([target.missed for target in targets])
        self._parts = np.ones((len(targets), 1))
        """[t, c + 1] p_i(s) for all rows and the pending one."""
        self._sums = np.ones(len(targets))
        """[t] The largest sums of their squares that mean something."""
        self._values, self._turns = band.ritz()

    @property
    def open(self) -> bool:
        """Whether something may still be beyond a target."""
        shown = np.array(self.missed()) <= self._allowed
        return bool(self._band.pending) and not shown.all()

    def missed(self) -> tuple[float, ...]:
        """Bound the probabilities to have missed something beyond each target."""
        if not self._band.pending:
            return (0.0,) * len(self._targets)
        bounds = np.sqrt(2 * self._free / math.pi / self._sums)
        return tuple(np.minimum(1.0, bounds).tolist())

    def step(self) -> None:
        """Multiply once."""
        band = self._band
        if band.count == band.size:
            turn = self._kept()
            self._parts = np.c_[self._parts[:, :-1] @ turn, self._parts[:, -1:]]
            band.shrink(turn)
        n = band.count
        band.grow()
        self._values, self._turns = band.ritz()
        if not band.pending:
            return
        next_ = self._at * self._parts[:, n] - self._parts @ band.h[:, n]
        self._parts = np.c_[self._parts, next_ / band.c[0, n]]
        if not (self._beyond() > 0).any():
            self._sums = np.maximum(self._sums, (self._parts**2).sum(axis=1))
        # Past a Ritz value beyond a target they mean nothing, and grow without bound.
        np.clip(self._parts, -_HUGE, _HUGE, out=self._parts)

    def found(self) -> Tensor | None:
        """Return the Ritz vectors beyond a target, [n, P], once all have converged."""
        beyond = self._beyond() > 0
        exhausted = not self._band.pending
        if not beyond.any() or not (exhausted or self._converged()[beyond].all()):
            return None
        return self._band.combine(self._turns[:, beyond])

    def _beyond(self) -> Floats:
        """Compute how far each Ritz value is beyond the nearest target: [c]."""
        far = [target.sign * self._values - target.distance for target in self._targets]
        found: Floats = np.max(far, axis=0)
        return found

    def _converged(self) -> NDArray[np.bool_]:
        """Say which Ritz pairs have converged: [c]."""
        band = self._band
        noise = 8 * band.eps * band.scale + np.abs(band.h - band.h.T).max()
        residuals = band.residuals(self._turns, self._values)
        wanted = np.maximum(self._tolerance * np.abs(self._values), noise)
        done: NDArray[np.bool_] = residuals <= wanted
        return done

    def _kept(self) -> Floats:
        """Choose the Ritz vectors that survive a restart: [c, l]."""
        signs = {target.sign for target in self._targets}
        which = Which.BOTH if len(signs) > 1 else _END[signs.pop()]
        least = min(1 + int((self._beyond() > 0).sum()), self._band.size - 2)
        return self._turns[:, keep_of(self._values, least, which, self._at)]


_END = {1: Which.LARGEST, -1: Which.SMALLEST}
