"""Extremal eigenpairs: thick-restart Lanczos that can start from a subspace.

The basis grows by the residual of a wanted Ritz pair, orthogonalised twice against the
whole basis. From one start vector all residuals are collinear, so this is the
thick-restart Lanczos method (Wu & Simon, SIAM J. Matrix Anal. Appl. 22, 2000); from
the eigenvectors of a similar operator it is the generalised Davidson method (Morgan &
Scott, SIAM J. Sci. Stat. Comput. 7, 1986) without preconditioner, which keeps what the
start vectors know. Products of the basis are kept beside it, so that residuals are
those of real products instead of a recurrence's opinion.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvd.types import Distribution, Stop, Which
from curvd_server.queries.base import Products, Progress, Query, norms
from curvd_server.queries.probes import probes

_ROW_CHUNK = 1 << 18  # elements of P rotated at once at a restart


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
        basis: Columns of the basis before a restart; None: 2k + 20, at most P.
        start: [s, P] Vectors that are near the wanted ones, any scale, s < basis.
        seed: Of the random start vector.

    Yields:
        Ritz values, and the residual of the pair that is being improved.

    Returns:
        The pairs; the best so far if products or time ran out.
    """
    size = min(products.size, max(basis or 2 * k + 20, k + 2))
    space = _Space(products, size, seed)
    yield from space.begin(start, k)
    iterations = restarts = 0
    while True:
        values, rotation = np.linalg.eigh(space.symmetric())
        chosen = select(values, k, which)
        space.scale = max(space.scale, float(np.abs(values).max()))
        asymmetry = space.asymmetry()
        wanted = tolerance * np.abs(values[chosen])
        floor = 8 * torch.finfo(products.dtype).eps * space.scale + 2 * asymmetry
        wanted = np.maximum(wanted, floor)
        target, residual, found = space.unconverged(rotation, values, chosen, wanted)
        yield Progress(
            iteration=iterations,
            products=products.done,
            estimates=tuple(float(v) for v in np.sort(values[chosen])[::-1]),
            residuals=(found,),
        )
        complete = space.count == products.size
        stopped = products.refusal()
        if target is None or complete:
            stopped = Stop.CONVERGED
        if stopped is not None:
            break
        assert residual is not None
        # In a Krylov space all residuals are parallel to what the last product adds,
        # which suffers no cancellation; rounding costs products otherwise.
        direction = space.last_product() if start is None else residual
        if space.count == size:
            direction = space.orthogonal(direction)
            space.restart(rotation, values, keep_of(values, k, which, size))
            restarts += 1
        space.extend(direction)
        iterations += 1
    order = chosen[np.argsort(-values[chosen])]
    vectors, residuals = space.pairs(rotation[:, order], values[order])
    tolerances = wanted[np.argsort(-values[chosen])]
    return EigshResult(
        values=tuple(float(v) for v in values[order]),
        vectors=vectors,
        residuals=tuple(residuals),
        tolerances=tuple(float(t) for t in tolerances),
        asymmetry=asymmetry,
        iterations=iterations,
        restarts=restarts,
        products=products.done,
        stopped=stopped,
    )


def select(values: NDArray[np.float64], k: int, which: Which) -> NDArray[np.intp]:
    """Choose k of ascending values, the one that converges last first.

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
    return ranked[:k][::-1]


def keep_of(
    values: NDArray[np.float64], k: int, which: Which, size: int
) -> NDArray[np.intp]:
    """Choose the Ritz vectors that survive a restart.

    Args:
        values: [m], ascending.
        k: Wanted pairs.
        which: Which end.
        size: Columns of a full basis.

    Returns:
        Indices of more than k, fewer than `size`: what is next to the wanted ones
        speeds up their convergence (Wu & Simon, section 4).
    """
    return select(values, min(k + max(1, (size - k) // 3), size - 1), which)


class _Space:
    """An orthonormal basis Q, its products AQ, and H = Q A Q^T."""

    def __init__(self, products: Products, size: int, seed: int) -> None:
        self._products, self._seed, self._fresh = products, seed, 0
        self._q, self._aq = products.empty(size), products.empty(size)
        self._h = np.zeros((size, size))
        self.count = 0
        self.scale = 0.0
        """Largest Ritz value in magnitude: the norm of the operator, nearly."""

    def begin(self, start: Tensor | None, k: int) -> Query[None]:
        """Take the start vectors in, or a random one.

        Args:
            start: [s, P] or None.
            k: Wanted pairs.

        Yields:
            Progress after each product.
        """
        for vector in start if start is not None else ():
            if self.count < min(len(self._q) - 1, self._products.size):
                if self.count and self._products.refusal():
                    break
                self.extend(vector, replace=False)
                yield Progress(iteration=0, products=self._products.done)
        while self.count < min(k, self._products.size):
            # H needs k Ritz values; a Krylov space grows by its own last product.
            if self.count and self._products.refusal():
                return
            self.extend(self.last_product() if self.count else self._random())
            yield Progress(iteration=0, products=self._products.done)

    def extend(self, direction: Tensor, *, replace: bool = True) -> None:
        """Add the part of a direction that is orthogonal to the basis.

        Args:
            direction: [P].
            replace: Whether a direction that lies in the basis is replaced by a
                random one; else it is left out.
        """
        vector = self.orthogonal(direction)
        if not vector.any():
            if not replace:
                return
            vector = self.orthogonal(self._random())
        n = self.count
        self._q[n] = vector
        self._aq[n] = self._products(vector[None])[0]
        column = self._q[: n + 1] @ self._aq[n]
        row = self._aq[: n + 1] @ self._q[n]
        self._h[: n + 1, n] = column.double().cpu().numpy()
        self._h[n, : n + 1] = row.double().cpu().numpy()
        self.count = n + 1

    def symmetric(self) -> NDArray[np.float64]:
        """Return the symmetric part of H: [m, m]."""
        h = self._h[: self.count, : self.count]
        return (h + h.T) / 2

    def asymmetry(self) -> float:
        """Return the norm of the antisymmetric part of H."""
        h = self._h[: self.count, : self.count]
        return float(np.linalg.norm(h - h.T, 2)) / 2

    def unconverged(
        self,
        rotation: NDArray[np.float64],
        values: NDArray[np.float64],
        chosen: NDArray[np.intp],
        wanted: NDArray[np.float64],
    ) -> tuple[int | None, Tensor | None, float]:
        """Find a chosen pair whose residual is too large.

        Args:
            rotation: [m, m] Eigenvectors of H.
            values: [m] Eigenvalues of H.
            chosen: Indices, those that converge last first.
            wanted: Residual that each chosen pair shall reach.

        Returns:
            Index, residual vector [P] and its norm; no index if all have converged.
        """
        found, residual = 0.0, None
        for index, limit in zip(chosen, wanted, strict=True):
            residual = self._residual(rotation[:, index], values[index])
            found = float(norms(residual))
            if found > limit:
                return int(index), residual, found
        return None, residual, found

    def restart(
        self,
        rotation: NDArray[np.float64],
        values: NDArray[np.float64],
        keep: NDArray[np.intp],
    ) -> None:
        """Shrink the basis to some of its Ritz vectors.

        Args:
            rotation: [m, m] Eigenvectors of H.
            values: [m] Eigenvalues of H.
            keep: Indices of those to keep.
        """
        turn = rotation[:, keep]
        small = self._tensor(turn.T)
        for matrix in (self._q, self._aq):
            for part in torch.split(matrix[: self.count], _ROW_CHUNK, dim=1):
                part[: len(keep)] = small @ part
        h = turn.T @ self._h[: self.count, : self.count] @ turn
        self.count = len(keep)
        self._h[: self.count, : self.count] = h

    def pairs(
        self, rotation: NDArray[np.float64], values: NDArray[np.float64]
    ) -> tuple[Tensor, list[float]]:
        """Compute Ritz vectors and the norms of their residuals.

        Args:
            rotation: [m, k] Eigenvectors of H.
            values: [k].

        Returns:
            [k, P], and k norms.
        """
        vectors = self._tensor(rotation.T) @ self._q[: self.count]
        found = [
            float(norms(self._residual(s, value)))
            for s, value in zip(rotation.T, values, strict=True)
        ]
        return vectors, found

    def _residual(self, coefficients: NDArray[np.float64], value: float) -> Tensor:
        s = self._tensor(coefficients)
        image: Tensor = s @ self._aq[: self.count]
        return image - (value * s) @ self._q[: self.count]

    def last_product(self) -> Tensor:
        """Return the product of the newest basis vector: [P]."""
        return self._aq[self.count - 1]

    def orthogonal(self, vector: Tensor) -> Tensor:
        """Orthogonalise against the basis, and normalise.

        Twice is enough (Giraud, Langou & Rozloznik, Comput. Math. Appl. 50, 2005).

        Args:
            vector: [P].

        Returns:
            [P] Of length one; zero if the vector lies in the basis.
        """
        length = norms(vector)
        if not length > 0:
            return torch.zeros_like(vector)
        vector = vector / length.to(vector.dtype)
        basis = self._q[: self.count]
        for _ in range(3):
            vector = vector - (basis @ vector) @ basis
            left = norms(vector)
            if left < 100 * torch.finfo(vector.dtype).eps:
                return torch.zeros_like(vector)
            vector = vector / left.to(vector.dtype)
            if left > 0.7:
                return vector
        return vector

    def _random(self) -> Tensor:
        self._fresh += 1
        return probes(
            Distribution.NORMAL,
            self._seed,
            [self._fresh - 1],
            self._products.size,
            dtype=self._products.dtype,
            device=self._products.device,
        )[0]

    def _tensor(self, values: NDArray[np.float64]) -> Tensor:
        return torch.as_tensor(values, dtype=self._q.dtype, device=self._q.device)
