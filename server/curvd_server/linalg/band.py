"""An orthonormal basis that grows towards the residuals of its Ritz pairs.

The basis Q: [c, P] and a few pending directions N: [b, P] satisfy

    A Q' = Q' H + N' C

to rounding, with all rows of Q and N orthonormal. A step moves one pending direction
into the basis, multiplies it, and what is left of the product becomes a new pending
direction. With one pending direction this is Lanczos' method with full orthogonality,
with several band Lanczos (Ruhe, Math. Comp. 33, 1979). The residual of a Ritz pair
``(θ, Q's)`` is ``Q'(H - θ)s + N'Cs``: its norm costs nothing, and it is that of real
products, because the antisymmetric part of H, which is the operator's rounding, is kept.

Orthogonality to the whole basis costs two readings of it, which for long vectors takes
as long as a product. So some steps of Lanczos only see their last two rows, which leaves
them a *drift* towards the older ones, and then all of them are orthogonalised together:
two readings for many steps. Unlike partial reorthogonalisation (Simon, Linear Algebra
Appl. 61, 1984) this is exact. Let X be the rows of Q and Y those of Q and N, and
``A X' = Y' F``, H being the upper part of F and C the lower. If ``Y' = V' R`` with
orthonormal V and upper triangular R, then ``A V_x' = V' (R F / R_x)``, whatever the drift
was: `_x` are the leading rows, or the leading block, that belong to Q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvd_server.linalg.base import Products
from curvd_server.linalg.drift import Drift
from curvd_server.linalg.scales import units_of

Floats = NDArray[np.float64]

_WINDOW = 16
"""Rows that are orthogonalised together, at most."""
_WIDER = 2
"""Room for pending directions grows by so many."""
_DRIFT = 1e-2
"""Up to here the drift is forecast safely; one half would still be put right."""


@dataclass(frozen=True, slots=True)
class Complement:
    """Where the rows of a band are kept, and what the map is there."""

    beside: Tensor
    """[m, P] Orthonormal: all rows are orthogonal to them, and so are products."""
    along: Tensor | None = None
    """[n, P] Orthonormal, in the complement."""
    pull: Floats | None = None
    """[n, n] What is added to the map along these."""


class Band:
    """The basis, its pending directions, H and C.

    Args:
        products: The map A.
        size: Largest basis.
        start: [s, P] First directions, any scale; None: one random direction.
        seed: The seed of random directions.
        window: Rows that are orthogonalised together, at most; 1: each by itself.
        complement: Where the rows are kept; None: anywhere.
    """

    def __init__(
        self,
        products: Products,
        size: int,
        start: Tensor | None,
        seed: int,
        window: int = _WINDOW,
        complement: Complement | None = None,
    ) -> None:
        self._products, self._seed, self._drawn = products, seed, 0
        self._space = products.space
        width = 1 if start is None else len(start)
        self._complement = complement or Complement(self._space.empty(0))
        self._rows = self._space.empty(size + width)
        """Q above N."""
        self._h, self._c = np.zeros((size, size)), np.zeros((width, size))
        self.size, self.count, self.pending = size, 0, 0
        self.scale = 0.0
        """Norm of the map, nearly: the largest that was met."""
        self._ends = (0.0, 0.0)
        """The outermost Ritz values."""
        self._window, self._settled = window, 0
        """Rows from the top that are orthonormal to rounding."""
        self._drift = Drift(self.eps)
        if start is not None:
            units = units_of(self._space.peaks(start), start.dtype)
            for vector, unit in zip(start, units.tolist(), strict=True):
                self._put(vector / unit)

    @property
    def h(self) -> Floats:
        """H: [c, c], symmetric but for the operator's rounding."""
        return self._h[: self.count, : self.count]

    @property
    def c(self) -> Floats:
        """C: [b, c]."""
        return self._c[: self.pending, : self.count]

    @property
    def basis(self) -> Tensor:
        """Q: [c, P], a view."""
        return self._rows[: self.count]

    @property
    def waiting(self) -> Tensor:
        """N: [b, P], a view."""
        return self._rows[self.count : self.count + self.pending]

    @property
    def settled(self) -> bool:
        """Whether all rows are orthonormal to rounding."""
        return self._settled == self.count + self.pending

    @property
    def eps(self) -> float:
        """Relative rounding of the vectors."""
        return torch.finfo(self._rows.dtype).eps

    def ritz(self) -> tuple[Floats, Floats]:
        """Compute the Ritz values [c], ascending, and their coefficients [c, c]."""
        values, turn = np.linalg.eigh((self.h + self.h.T) / 2)
        self.scale = max(self.scale, float(np.abs(values).max(initial=0.0)))
        if len(values):
            self._ends = float(values[0]), float(values[-1])
        return values, turn

    def adopt(self, vector: Tensor) -> None:
        """Make what a vector adds to the basis the first pending direction.

        Args:
            vector: [P].
        """
        self.settle()
        self._put(vector)
        self.aim(self._space.coefficients(self.waiting, vector).cpu().numpy())

    def grow(self) -> None:
        """Move the first pending direction, or a random one, into the basis."""
        if not self.pending:
            self._put(self._random())
        n, b = self.count, self.pending
        product = self._multiply(self._rows[n], self._rows[n + b])
        # The latest rows hold nearly all of a Lanczos product: without them one pass
        # over the whole basis is enough, and often none.
        near = self._rows[max(0, n - 1) : n + b + 1]
        weights = self._space.coefficients(near, product)
        left = self._space.subtract(near[:-1], weights[:-1], product)
        self.scale = max(self.scale, math.sqrt(weights[-1]))
        self._append(weights[:-1].cpu().numpy())
        drift = self._forecast(float(left))
        if b > 1 or drift > _DRIFT or self._window < 2:
            if self.settle(pending=False):
                self._clear(left)
            return
        product /= left.to(product.dtype)
        self._c[0, n] = float(left)
        self._drift.advance(drift)
        full = n + 2 - self._settled >= self._window
        if full or self._forecast(float(left)) > _DRIFT:
            self.settle()

    def _multiply(self, row: Tensor, place: Tensor) -> Tensor:
        """Multiply a row by the map of the complement.

        Args:
            row: [P].
            place: [P] Where the product comes.

        Returns:
            It.
        """
        there = self._complement
        place.copy_(self._products(row[None])[0])
        if there.along is not None:
            weights = self._space.coefficients(there.along, row)
            self._space.subtract(
                there.along, -torch.from_numpy(there.pull).to(weights) @ weights, place
            )
        self._keep_beside(place)
        return place

    def _keep_beside(self, row: Tensor) -> None:
        """Subtract from a row what is not in the complement: [own]."""
        beside = self._complement.beside
        if len(beside):  # else its length would be computed in vain
            self._space.orthogonalise(beside, row)

    def settle(self, *, pending: bool = True) -> bool:
        """Orthogonalise what is not orthogonal to the older rows yet.

        Args:
            pending: Whether the pending direction, too.

        Returns:
            Whether that was possible. If not, because the operator's rounding is worse
            than it was, the steps since the last time are undone.
        """
        old, count, full = self._settled, self.count, self.count + self.pending
        end = full if pending else count
        if old >= end:
            return True
        rows = self._rows[:end]
        drift, gram = np.split(
            self._space.cross(rows, rows[old:]).cpu().numpy(), [old], axis=1
        )
        np.fill_diagonal(gram, 1.0)  # so they were made, more precisely than this sum
        gram -= drift @ drift.T
        self._drift.correct(float(np.abs(drift).max()))
        if np.linalg.eigvalsh(gram)[0] < 0.5:
            self.count, self.pending = old - 1, 1
            self._c[0, : old - 1] = self._h[old - 1, : old - 1]
            self._window = 1
            self._drift.reset()
            return False
        lower = np.linalg.cholesky(gram)
        turn = np.linalg.solve(lower, np.c_[-drift, np.eye(end - old)])
        self._space.rotate(rows, torch.from_numpy(turn), old)
        # Y = V R, and F is H above C; see the head of this file.
        change = np.eye(full)
        change[:old, old:end], change[old:end, old:end] = drift.T, lower.T
        both = change @ np.r_[self.h, self.c]
        both = np.linalg.solve(change[:count, :count].T, both.T).T
        self._h[:count, :count], self._c[: self.pending, :count] = np.split(
            both, [count]
        )
        self._settled = end
        self._drift.reset()
        return True

    def _append(self, weights: Floats) -> None:
        """Note a step; its product is what is pending now, as it is.

        Args:
            weights: What was subtracted from it: coefficients of the latest row before
                the step, if there was one, and of all rows that were pending.
        """
        n, b = self.count, self.pending
        near = max(0, n - 1)
        self._h[n, :n] = self._c[0, :n]
        self._h[:near, n] = 0.0
        self._h[near : n + 1, n] = weights[: n + 1 - near]
        self._c[: b - 1, :n] = self._c[1:b, :n]
        self._c[: b - 1, n] = weights[n + 1 - near :]
        self._c[b - 1, :n], self._c[b - 1, n] = 0.0, 1.0
        self.count += 1

    def _forecast(self, left: float) -> float:
        """Forecast the drift of what the latest step left, of this length."""
        row = self._h[self.count - 1]
        diagonal, older = row[self.count - 1], max(0, self.count - 2)
        return self._drift.of_next(
            left,
            reach=max(abs(end - diagonal) for end in self._ends),
            back=row[older],
            # After a restart the product has parts along all rows.
            known=float(np.abs(row[:older]).max(initial=0.0)),
            scale=self.scale,
        )

    def _clear(self, left: Tensor) -> None:
        """Orthogonalise the latest pending direction by itself, and normalise it.

        Args:
            left: Its length.
        """
        last, n = self.count + self.pending - 1, self.count - 1
        row, known = self._rows[last], self._rows[:last]
        found, after = self._space.orthogonalise(known, row, length=left)
        weights, rest = found.cpu().numpy(), float(after)
        if n > 1 and self.pending == 1 and self.scale > 0:
            # By symmetry the row before the step tells what they should be.
            odd = np.abs(weights - self._h[n, : n + 1])[: n - 1].max()
            self._drift.learn(float(odd) / self.scale)
        unit = self._c[self.pending - 1, n]
        self._h[: n + 1, n] += weights[: n + 1] * unit
        self._c[: self.pending - 1, n] += weights[n + 1 :] * unit
        self._c[self.pending - 1, n] = rest * unit
        if rest > 4 * self.eps * self.scale:
            row /= after.to(row.dtype)
            # What rounding left in the row would grow with every step.
            self._keep_beside(row)
        else:
            self.pending -= 1  # the space is invariant in this direction
        self._settled = self.count + self.pending
        self._drift.reset()

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
        self._space.rotate(self.waiting, torch.from_numpy(turn))
        self._c[: self.pending] = turn @ self._c[: self.pending]

    def shrink(self, turn: Floats) -> None:
        """Replace the basis by some of its Ritz vectors.

        Args:
            turn: [c, l] Their coefficients.
        """
        n, b, kept = self.count, self.pending, turn.shape[1]
        assert self.settled
        h, c = turn.T @ self.h @ turn, self.c @ turn
        self._space.rotate(self._rows[:n], torch.from_numpy(turn.T))
        for i in range(b):
            self._rows[kept + i].copy_(self._rows[n + i])
        self.count, self._settled = kept, kept + b
        self._h[:] = self._c[:] = 0.0
        self._h[:kept, :kept], self._c[:b, :kept] = h, c

    def combine(self, turn: Floats) -> Tensor:
        """Compute combinations of the basis.

        Args:
            turn: [c, k].

        Returns:
            [k, P].
        """
        weights = torch.from_numpy(turn.T.copy())
        return self._space.combine(weights, self._rows[: self.count])

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
        if self.pending == len(self._c):
            self._widen()
        place = self._rows[n]
        place.copy_(vector)
        length = self._space.norms(place)
        if not length > 0:
            return
        place /= length.to(place.dtype)
        self._keep_beside(place)
        _, left = self._space.orthogonalise(self._rows[:n], place)
        if left > 100 * self.eps:
            place /= left.to(place.dtype)
            self._c[self.pending] = 0.0
            self.pending += 1
            self._settled = self.count + self.pending

    def _widen(self) -> None:
        """Make room for more pending directions."""
        self._rows = torch.cat((self._rows, self._space.empty(_WIDER)))
        self._c = np.r_[self._c, np.zeros((_WIDER, self.size))]

    def _random(self) -> Tensor:
        self._drawn += 1
        return self._products.normal(self._seed, self._drawn - 1)
