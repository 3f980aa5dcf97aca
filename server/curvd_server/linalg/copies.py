"""Search for eigenvalues that a Krylov space cannot contain.

A Krylov space holds one direction of each eigenspace: what is left of an eigenspace of
higher dimension is orthogonal to it, and to every step that it will ever take. So once
the wanted pairs have converged, Lanczos' method runs a second time, from a random vector
w in the complement of what is known, and stops as soon as it has shown that nothing is
left there beyond an edge s.

It shows that as follows. An eigenvector beyond s with a component c along w has
components ``c p_i(s)`` or larger along the Lanczos vectors, p_i being their polynomials.
The squares of components sum to no more than one, so ``c^2 <= 1 / sum p_i(s)^2``: the
Christoffel function of w's spectral measure (Akhiezer, The Classical Moment Problem,
1965). A random w of length one has a component below c with a probability of less than
``c sqrt(2 P / pi)``, so that the sum bounds the probability to have missed something (van
Dorsselaer, Hochstenbach & van der Vorst, SIAM J. Matrix Anal. Appl. 22, 2000; in advance,
for any spectrum: Kuczynski & Wozniakowski, SIAM J. Matrix Anal. Appl. 13, 1992).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from curvd.contract import Distribution, Which
from curvd_server.linalg.band import Band, Floats
from curvd_server.linalg.base import Products, Progress, Query
from curvd_server.linalg.probes import probes
from curvd_server.linalg.ritz import keep_of

MISSED = 1e-4
"""Probability that a copy, if there is one, is overlooked."""
_OVERLOOKED = 0.05
"""The same of an eigenvalue that the start vector, by bad luck, has missed before."""
_COPY, _OTHER = 0.9, 0.25
"""So far from the last wanted value to the next are edges: nearly at the next one, but
for rounding, for copies of it; nearer, for others."""
_HUGE = 1e100
_FIRST = 1 << 32
"""Index of the first probe of a search; start vectors have small ones."""


@dataclass(frozen=True, slots=True)
class Converged:
    """Wanted pairs, all of which have converged."""

    values: Floats
    """[k], largest first."""
    residuals: Floats
    wanted: Floats
    """[k] What their residuals were asked to reach: values so near count as equal."""

    def edges(self, which: Which, *, generic: bool) -> list[Edge]:
        """Find beyond which values an eigenvalue that was not found would be wanted.

        A generic start vector has a component in every eigenspace. What it leads to
        lacks nothing but copies of what it found, and only of those beyond the last; or
        what had a very small component.

        Args:
            which: Which end of the spectrum is wanted.
            generic: Whether the start was random. Otherwise anything may be missing.

        Returns:
            The edges; none if nothing is likely to be missing.
        """
        k, top = len(self.values), np.ones(len(self.values), dtype=bool)
        bottom = top.copy()
        if which is Which.LARGEST:
            bottom[:] = False
        elif which is Which.SMALLEST:
            top[:] = False
        elif which is Which.BOTH:
            top[k - k // 2 :] = False
            bottom = ~top
        magnitude = which is Which.LARGEST_MAGNITUDE
        found = []
        for sign, part in ((1, top), (-1, bottom)):
            values = sign * self.values
            sizes = np.where(part, np.abs(values) if magnitude else values, np.inf)
            last = int(sizes.argmin())
            if not part.any():
                continue
            limit = sizes[last] + self.wanted[last]
            copied = part & (values > limit)
            if copied.any():
                lowest = float((values - self.residuals)[copied].min())
                room = max(0.0, lowest - float(limit))
                margin, copy = (1 - _COPY) * room, float(limit) + _COPY * room
                found.append(Edge(sign, copy, margin))
                if generic:
                    other = float(limit) + _OTHER * room
                    found.append(Edge(sign, other, margin, missed=_OVERLOOKED))
            if not generic:
                margin = float(self.wanted[last])
                found.append(Edge(sign, float(limit), margin, copies_only=False))
        return found


@dataclass(frozen=True, slots=True)
class Edge:
    """A value beyond which nothing may be missing."""

    sign: int
    """1: above it, -1: below it."""
    distance: float
    """The value times the sign."""
    margin: float
    """How much nearer than a missing eigenvalue it is, at least."""
    missed: float = MISSED
    """Probability with which what is there may be overlooked."""
    copies_only: bool = True
    """Whether copies of what is known are all that could be."""

    @property
    def value(self) -> float:
        """The value."""
        return self.sign * self.distance


def missing(
    products: Products,
    known: Tensor,
    edges: list[Edge],
    *,
    tolerance: float,
    size: int,
    seed: int,
    turn: int,
    progress: Callable[[], Progress],
) -> Query[Tensor | None]:
    """Search the complement of a subspace for eigenvectors beyond some edges.

    Args:
        products: The map.
        known: [m, P] Orthonormal.
        edges: Not empty.
        tolerance: On residuals, relative to each eigenvalue.
        size: Vectors in memory.
        seed: Of the random vector.
        turn: How many searches there were before.
        progress: Makes progress of the query.

    Yields:
        Progress.

    Returns:
        What was found, [n, P], and nothing if nothing is missing; None if products or
        time ran out before that was certain.
    """
    start = probes(
        Distribution.NORMAL,
        seed,
        [_FIRST + turn],
        products.size,
        dtype=products.dtype,
        device=products.device,
    )
    nothing = start[:0]
    if len(known) >= products.size:
        return nothing
    free = products.size - len(known)
    band = Band(products, min(size, free), start, seed, window=1, beside=known)
    run = _Run(band, edges, free, tolerance)
    while run.open:
        if products.refusal():
            return None
        run.step()
        yield progress()
        if (found := run.found()) is not None:
            return found
    return nothing


class _Run:
    """A Lanczos run in a complement, and what it has shown.

    Args:
        band: With one pending direction.
        edges: Where to look.
        free: Dimension of the complement.
        tolerance: On residuals.
    """

    def __init__(
        self, band: Band, edges: list[Edge], free: int, tolerance: float
    ) -> None:
        self._band, self._edges, self._tolerance = band, edges, tolerance
        self._free = free
        self._parts = np.ones((len(edges), 1))
        """[e, c + 1] p_i(s) for all rows and the pending one."""
        self._values, self._turns = band.ritz()

    @property
    def open(self) -> bool:
        """Whether something may still be beyond an edge."""
        return bool(self._band.pending and self._edges)

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
        edges = np.array([edge.value for edge in self._edges])
        next_ = edges * self._parts[:, n] - self._parts @ band.h[:, n]
        self._parts = np.c_[self._parts, next_ / band.c[0, n]]
        if not (self._beyond() > 0).any():
            missed = np.array([edge.missed for edge in self._edges])
            enough = 2 * self._free / math.pi / missed**2
            shown = (self._parts**2).sum(axis=1) >= enough
            self._close(shown | self._closed())
        # Past a Ritz value beyond an edge they mean nothing, and grow without bound.
        np.clip(self._parts, -_HUGE, _HUGE, out=self._parts)

    def found(self) -> Tensor | None:
        """Return the Ritz vectors beyond an edge, [n, P], once all have converged."""
        beyond = self._beyond() > 0
        if not beyond.any() or not self._converged()[beyond].all():
            return None
        return self._band.combine(self._turns[:, beyond])

    def _beyond(self) -> Floats:
        """Compute how far each Ritz value is beyond the nearest edge: [c]."""
        far = [edge.sign * self._values - edge.distance for edge in self._edges]
        return np.max(far, axis=0) if far else np.full(len(self._values), -1.0)

    def _converged(self) -> NDArray[np.bool_]:
        """Say which Ritz pairs have converged: [c]."""
        band = self._band
        noise = 8 * band.eps * band.scale + np.abs(band.h - band.h.T).max()
        residuals = band.residuals(self._turns, self._values)
        wanted = np.maximum(self._tolerance * np.abs(self._values), noise)
        done: NDArray[np.bool_] = residuals <= wanted
        return done

    def _closed(self) -> NDArray[np.bool_]:
        """Say for each edge whether the outermost eigenvalue is known: [e].

        That is no proof, but it is all that a first start vector gives.
        """
        ends = self._converged()[[0, -1]]
        return np.array([
            not edge.copies_only and ends[1 if edge.sign > 0 else 0]
            for edge in self._edges
        ])

    def _close(self, shown: NDArray[np.bool_]) -> None:
        self._edges = [e for e, s in zip(self._edges, shown, strict=True) if not s]
        self._parts = self._parts[~shown]

    def _kept(self) -> Floats:
        """Choose the Ritz vectors that survive a restart: [c, l]."""
        signs = {edge.sign for edge in self._edges}
        which = Which.BOTH if len(signs) > 1 else _END[signs.pop()]
        goals = np.array([edge.value for edge in self._edges])
        least = min(1 + int((self._beyond() > 0).sum()), self._band.size - 2)
        return self._turns[:, keep_of(self._values, least, which, goals)]


_END = {1: Which.LARGEST, -1: Which.SMALLEST}
