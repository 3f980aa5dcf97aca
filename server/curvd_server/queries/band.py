"""An orthonormal basis that grows towards the residuals of its Ritz pairs.

The basis Q: [c, P] and a few pending directions N: [b, P] satisfy

    A Q' = Q' H + N' C

to rounding, with all rows of Q and N orthonormal. A step moves one pending direction
into the basis, multiplies it, and what is left of the product becomes a new pending
direction. With one pending direction this is Lanczos' method with full orthogonality,
with several band Lanczos (Ruhe, Math. Comp. 33, 1979). The residual of a Ritz pair
``(θ, Q's)`` is ``Q'(H - θ)s + N'Cs``: its norm costs nothing, and it is that of real
products, because the antisymmetric part of H, which is the operator's rounding, is kept.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvd.types import Distribution
from curvd_server.queries.base import Products
from curvd_server.queries.probes import probes
from curvd_server.queries.vectors import norms, orthogonalise, rotate

Floats = NDArray[np.float64]


class Band:
    """The basis, its pending directions, H and C.

    Args:
        products: The map A.
        size: Largest basis.
        start: [s, P] First directions, any scale; None: one random direction.
        seed: Of random directions.
    """

    def __init__(
        self, products: Products, size: int, start: Tensor | None, seed: int
    ) -> None:
        self._products, self._seed, self._drawn = products, seed, 0
        width = 1 if start is None else len(start)
        self._rows = products.empty(size + width)
        """Q above N."""
        self._h, self._c = np.zeros((size, size)), np.zeros((width, size))
        self.size, self.count, self.pending = size, 0, 0
        self.scale = 0.0
        """Norm of the map, nearly: the largest that was met."""
        for vector in start if start is not None else ():
            self._put(vector)

    @property
    def h(self) -> Floats:
        """H: [c, c], symmetric but for the operator's rounding."""
        return self._h[: self.count, : self.count]

    @property
    def c(self) -> Floats:
        """C: [b, c]."""
        return self._c[: self.pending, : self.count]

    @property
    def eps(self) -> float:
        """Relative rounding of the vectors."""
        return torch.finfo(self._rows.dtype).eps

    def ritz(self) -> tuple[Floats, Floats]:
        """Compute the Ritz values [c], ascending, and their coefficients [c, c]."""
        values, turn = np.linalg.eigh((self.h + self.h.T) / 2)
        self.scale = max(self.scale, float(np.abs(values).max(initial=0.0)))
        return values, turn

    def grow(self) -> None:
        """Move the first pending direction, or a random one, into the basis."""
        if not self.pending:
            self._put(self._random())
        n, b = self.count, self.pending
        known, product = self._rows[: n + b], self._rows[n + b]
        product.copy_(self._products(self._rows[n : n + 1])[0])
        length = norms(product)
        # The latest rows hold nearly all of a Lanczos product: without them one pass
        # over the whole basis is enough.
        near = max(0, n - 1)
        weights = product.new_zeros(n + b, dtype=torch.float64)
        self.scale = max(self.scale, float(length))
        weights[near:], length = orthogonalise(
            known[near:], product, length=length, passes=1
        )
        more, length = orthogonalise(known, product, length=length)
        column, left = (weights + more).cpu().numpy(), float(length)
        self._h[n, :n] = self._c[0, :n]
        self._h[: n + 1, n] = column[: n + 1]
        self._c[: b - 1, :n] = self._c[1:b, :n]
        self._c[: b - 1, n] = column[n + 1 :]
        self._c[b - 1, :n], self._c[b - 1, n] = 0.0, left
        self.count += 1
        if left > 4 * self.eps * self.scale:
            product /= left
        else:
            self.pending -= 1  # the space is invariant in this direction

    def aim(self, direction: Floats) -> None:
        """Turn the pending directions so that the first is a Ritz pair's residual.

        Args:
            direction: [b] Its coefficients, ``Cs``.
        """
        length = np.linalg.norm(direction)
        if self.pending < 2 or not length > 0:
            return
        # The Householder reflection that maps the direction to the first axis.
        mirror = direction / length
        mirror[0] += np.copysign(1.0, mirror[0])
        mirror *= np.sqrt(2) / np.linalg.norm(mirror)
        turn = np.eye(self.pending) - np.outer(mirror, mirror)
        pending = self._rows[self.count : self.count + self.pending]
        rotate(pending, torch.from_numpy(turn))
        self._c[: self.pending] = turn @ self._c[: self.pending]

    def shrink(self, turn: Floats) -> None:
        """Replace the basis by some of its Ritz vectors.

        Args:
            turn: [c, l] Their coefficients.
        """
        n, b, kept = self.count, self.pending, turn.shape[1]
        h, c = turn.T @ self.h @ turn, self.c @ turn
        rotate(self._rows[:n], torch.from_numpy(turn.T))
        for i in range(b):
            self._rows[kept + i].copy_(self._rows[n + i])
        self.count = kept
        self._h[:] = self._c[:] = 0.0
        self._h[:kept, :kept], self._c[:b, :kept] = h, c

    def combine(self, turn: Floats) -> Tensor:
        """Compute combinations of the basis.

        Args:
            turn: [c, k].

        Returns:
            [k, P].
        """
        weights = torch.from_numpy(turn.T.copy()).to(self._rows)
        result: Tensor = weights @ self._rows[: self.count]
        return result

    def residuals(self, turn: Floats, values: Floats) -> Floats:
        """Compute the residual norms of Ritz pairs.

        Args:
            turn: [c, k] Coefficients of the vectors.
            values: [k].

        Returns:
            [k].
        """
        inside = self.h @ turn - turn * values
        found: Floats = np.hypot(
            np.linalg.norm(inside, axis=0), np.linalg.norm(self.c @ turn, axis=0)
        )
        return found

    def _put(self, vector: Tensor) -> None:
        """Make a direction pending, unless it is known."""
        n = self.count + self.pending
        place = self._rows[n]
        place.copy_(vector)
        length = norms(place)
        if not length > 0:
            return
        place /= length.to(place.dtype)
        _, left = orthogonalise(self._rows[:n], place)
        if left > 100 * self.eps:
            place /= left.to(place.dtype)
            self._c[self.pending] = 0.0
            self.pending += 1

    def _random(self) -> Tensor:
        self._drawn += 1
        return probes(
            Distribution.NORMAL,
            self._seed,
            [self._drawn - 1],
            self._products.size,
            dtype=self._products.dtype,
            device=self._products.device,
        )[0]
