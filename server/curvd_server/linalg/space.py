"""Where vectors of length P live, and every sum over P.

An algorithm runs as it is where a vector is whole, or in several processes at once, each
with some consecutive elements of every vector. What it does element by element it does to
those; whatever is summed over P it asks of the space, which adds what each process has, in
the order of elements. So all of them go the same way: what decides is a sum, or is made of
sums. That they do is watched: coefficients that a process has computed from sums, such as
eigenvectors of a small matrix, are told to the group before vectors are combined by them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from curvd.contract import Distribution
from curvd_server.linalg import vectors
from curvd_server.linalg.random_probes import probes

_LARGEST = torch.finfo(torch.float64).max * 2.0**-24
"""Larger elements are measured as if they were so large."""


class Group(Protocol):
    """Those who hold the elements of vectors together."""

    def total(self, partial: Tensor) -> Tensor:
        """Add what each of them has, in the order of their elements.

        Args:
            partial: Of the elements here, float64, any shape.

        Returns:
            The sum, the same bits for all.
        """

    def joined(self, V: Tensor) -> Tensor:
        """Put together what each of them has: [..., own] -> [..., P]."""

    def witness(self, values: Tensor) -> None:
        """Take note of numbers that all of them must have alike; not waited for."""


class Space:
    """Vectors of length P, of which some elements are here.

    Args:
        size: P.
        dtype: Element type of vectors.
        device: Where they live.
        own: The elements that are here; None: all.
        group: Who has the others; None: nobody.
    """

    def __init__(
        self,
        size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        own: range | None = None,
        group: Group | None = None,
    ) -> None:
        self.size, self.dtype, self.device = size, dtype, torch.device(device)
        self._own = range(size) if own is None else own
        self._group = group

    @classmethod
    def of(cls, V: Tensor) -> Space:
        """Make the space of vectors that are whole: [..., P]."""
        return cls(V.shape[-1], V.dtype, V.device)

    @property
    def own(self) -> slice:
        """The elements that are here."""
        return slice(self._own.start, self._own.stop)

    def empty(self, *rows: int) -> Tensor:
        """Allocate vectors.

        Args:
            *rows: Leading axes.

        Returns:
            [*rows, own], uninitialised.
        """
        shape = (*rows, len(self._own))
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def probes(
        self, distribution: Distribution, seed: int, indices: Sequence[int]
    ) -> Tensor:
        """Make probes, whose elements do not depend on who makes them.

        Args:
            distribution: Of the elements.
            seed: In [0, 2^63).
            indices: Which probes of the seed's sequence; K of them.

        Returns:
            [K, own].
        """
        return probes(
            distribution,
            seed,
            indices,
            self.size,
            dtype=self.dtype,
            device=self.device,
            part=self._own,
        )

    def directions(self, seed: int, indices: Sequence[int]) -> Tensor:
        """Make random vectors of length ``sqrt(P)``, all directions alike.

        Signs coincide on few coordinates, as long as there are few of them; these never do.

        Args:
            seed: In [0, 2^63).
            indices: Which normal probes of the seed's sequence to scale; K of them.

        Returns:
            [K, own].
        """
        V = self.probes(Distribution.NORMAL, seed, indices)
        return V.mul_((math.sqrt(self.size) / self.norms(V))[:, None].to(V))

    def units(self, rows: range) -> Tensor:
        """Make unit vectors.

        Args:
            rows: Where each is one.

        Returns:
            [K, own].
        """
        found = self.empty(len(rows)).zero_()
        for i, row in enumerate(rows):
            if row in self._own:
                found[i, row - self._own.start] = 1.0
        return found

    def dots(self, U: Tensor, V: Tensor) -> Tensor:
        """Compute inner products row by row.

        Args:
            U: [K, own].
            V: [K, own].

        Returns:
            [K], float64.
        """
        return self._total(vectors.dots(U, V))

    def norms(self, V: Tensor) -> Tensor:
        """Compute Euclidean norms.

        Args:
            V: [K, own] or [own].

        Returns:
            [K] or a scalar, float64.
        """
        rows = V if V.ndim > 1 else V[None]
        found = self.dots(rows, rows).sqrt()
        return found if V.ndim > 1 else found[0]

    def peaks(self, V: Tensor) -> Tensor:
        """Measure vectors of any size, whose squares need not be numbers of their type.

        Args:
            V: [K, own].

        Returns:
            [K] The largest element of each, or up to as many times that as there are
            segments; float64.
        """
        most = V.abs().amax(1) if V.numel() else V.new_zeros(len(V))
        # A sum over segments must not overflow where none of them does.
        return self._total(most.double().clamp_max(_LARGEST)).clamp_max(_LARGEST)

    def peak(self, V: Tensor) -> float:
        """Measure vectors together: the largest of their `peaks`, 0 of none.

        Args:
            V: [K, own].
        """
        return float(self.peaks(V).amax()) if len(V) else 0.0

    def coefficients(self, basis: Tensor, vector: Tensor) -> Tensor:
        """Compute inner products with the rows of a basis.

        Args:
            basis: [m, own].
            vector: [own].

        Returns:
            [m], float64.
        """
        return self._total(vectors.coefficients(basis, vector))

    def cross(self, basis: Tensor, others: Tensor) -> Tensor:
        """Compute inner products of all rows with all rows, reading each once.

        Args:
            basis: [m, own].
            others: [K, own].

        Returns:
            [K, m], float64.
        """
        return self._total(vectors.cross(basis, others))

    def subtract(self, basis: Tensor, weights: Tensor, vector: Tensor) -> Tensor:
        """Subtract a combination of rows from a vector, in place.

        Args:
            basis: [m, own].
            weights: [m].
            vector: [own].

        Returns:
            The norm of what is left, a scalar, float64.
        """
        self.witness(weights)
        return self._total(vectors.subtract(basis, weights, vector)).sqrt()

    def orthogonalise(
        self,
        basis: Tensor,
        vector: Tensor,
        *,
        length: Tensor | None = None,
        passes: int = 3,
    ) -> tuple[Tensor, Tensor]:
        """Subtract from a vector, in place, what lies in the span of a basis.

        Again as long as a pass removes more than half of what was there: then rounding may
        have left something (Giraud, Langou & Rozloznik, Comput. Math. Appl. 50, 2005).

        Args:
            basis: [m, own], orthonormal rows.
            vector: [own].
            length: The vector's length, if known.
            passes: How many at most.

        Returns:
            The coefficients of what was subtracted: [m], float64, and the length that is
            left.
        """
        total = basis.new_zeros(len(basis), dtype=torch.float64)
        before = self.norms(vector) if length is None else length
        for _ in range(passes if len(basis) else 0):
            found = self.coefficients(basis, vector)
            after = self.subtract(basis, found, vector)
            total += found
            enough = not after < 0.7 * before
            before = after
            if enough:
                break
        return total, before

    def orthogonalise_each(self, bases: Tensor, V: Tensor, *, passes: int = 3) -> None:
        """Do to each vector, in place, what `orthogonalise` does, with a basis of its own.

        All take as many passes as the one that needs most: one more does no harm, and one
        call for all of them is what short vectors take least time by.

        Args:
            bases: [K, m, own], each with orthonormal rows.
            V: [K, own].
            passes: How many at most.
        """
        if len(V) == 1:
            self.orthogonalise(bases[0], V[0], passes=passes)
            return
        before = self.norms(V)
        for _ in range(passes):
            weights = self._total(vectors.coefficients_each(bases, V))
            self.witness(weights)
            after = self._total(vectors.subtract_each(bases, weights, V)).sqrt()
            if not (after < 0.7 * before).any():
                break
            before = after

    def rotate(self, basis: Tensor, turn: Tensor, first: int = 0) -> None:
        """Replace some rows of a basis by combinations of its rows, in place.

        Args:
            basis: [m, own].
            turn: [l, m], l not above m - first.
            first: The first row that is replaced.
        """
        self.witness(turn)
        vectors.rotate(basis, turn, first)

    def combine(self, weights: Tensor, basis: Tensor) -> Tensor:
        """Combine the rows of a basis.

        Args:
            weights: [K, m].
            basis: [m, own].

        Returns:
            [K, own].
        """
        self.witness(weights)
        return weights.to(basis) @ basis

    def add(
        self, V: Tensor, weights: Tensor, basis: Tensor, *, alpha: float = 1.0
    ) -> Tensor:
        """Add combinations of the rows of a basis.

        Args:
            V: [K, own].
            weights: [K, m].
            basis: [m, own].
            alpha: Multiplies all weights.

        Returns:
            ``V + alpha * weights @ basis``: [K, own].
        """
        self.witness(weights)
        return torch.addmm(V, weights.to(V), basis, alpha=alpha)

    def joined(self, V: Tensor) -> Tensor:
        """Make vectors whole, for everybody: [..., own] -> [..., P]."""
        return V if self._group is None else self._group.joined(V)

    def witness(self, values: Tensor) -> None:
        """Tell what everybody must have alike, because vectors are combined by it.

        Args:
            values: Any shape.
        """
        if self._group is not None:
            self._group.witness(values)

    def _total(self, partial: Tensor) -> Tensor:
        return partial if self._group is None else self._group.total(partial)
