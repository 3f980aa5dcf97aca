"""Block conjugate gradients: every column is minimised over the Krylov space of all.

Dubrulle's BCGrQ (ETNA 12, 2001) of O'Leary's method (Linear Algebra Appl. 29, 1980): the
residuals are ``R = C' Q`` with orthonormal rows Q, so that residuals which become
dependent make C singular and nothing else. Directions that rounding cannot tell from zero
are dropped (Ji & Li, BIT 57, 2017: breakdown-free). A column that has converged leaves the
block; what the others' directions owe to it is kept, so that they stay conjugate (Nikishin
& Yeremin, SIAM J. Matrix Anal. Appl. 16, 1995).

A step takes for granted that directions S of residuals ``C' Q`` have ``S Q' = I``. An
eigenvalue far above all others undoes that: what rounding has left of it in the products of
one step grows as the residuals shrink, and steps that do not see it lengthen it without end.
So `lost` measures the identity after every step, and a block that has lost it begins anew with
its residuals, whose first step removes what had grown.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvd.contract import Stop
from curvd_server.linalg.base import Query
from curvd_server.linalg.krylov import Steps, System
from curvd_server.linalg.space import Space

_GRAM = 16
"""Roundings of an element that an inner product of unit vectors may be off by."""
_WELL = 1e-3
"""Gram matrices conditioned better than this make orthonormal rows in one pass."""
_PASSES = 4
_LOST = 0.3
"""Share of a residual by which a step may misjudge it; healthy blocks stay far below."""
_LONG = 4
"""Without rounding P directions are enough; after so many times P it has won."""


def factors(space: Space, W: Tensor, Z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factorise ``W = T' Q`` with ``Q P^-1 Q' = I``, revealing the rank.

    Eigenvectors of the Gram matrix in place of Cholesky QR's triangle, again until it was
    well conditioned: a pass makes vectors that are shorter than the roundings of it can
    tell longer, so that the next one can.

    Args:
        space: Where they live.
        W: [k, P].
        Z: [k, P] ``P^-1 W``; W itself without preconditioner.

    Returns:
        Q: [r, P]; ``P^-1 Q``: [r, P]; T: [r, k], float64. r is less than k if rows of W
        depend on each other to rounding, 0 if all are zero.
    """
    plain = Z is W
    turn = torch.eye(len(W), dtype=torch.float64, device=W.device)
    unseen = _GRAM * torch.finfo(W.dtype).eps
    for again in range(_PASSES):
        gram = space.cross(Z, W)
        values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        top = values[-1] if len(values) else values.new_zeros(())
        # Only the second pass knows vectors that short.
        used = values > (unseen * top if again else -torch.inf)
        if not top > 0:
            used = torch.zeros_like(values, dtype=torch.bool)
        scale = values.clamp_min(unseen * top).sqrt()[used]
        vectors = vectors[:, used]
        change = (vectors / scale).T
        W = space.combine(change, W)
        Z = W if plain else space.combine(change, Z)
        turn = (vectors * scale).T @ turn
        if not len(scale) or values[used][0] > _WELL * top:
            break
    return W, Z, turn


def lost(space: Space, S: Tensor, Q: Tensor, C: Tensor) -> bool:
    """Tell whether rounding has taken directions apart from the residuals they are made of.

    Only the combinations that residuals consist of count: a block that has exhausted its
    space holds others, which are nothing but rounding.

    Args:
        space: Where they live.
        S: [r, P] Directions, ``S Q' = I`` without rounding.
        Q: [r, P].
        C: [r, k] The residuals are ``C' Q``.

    Returns:
        Whether the next step would be that of other residuals.
    """
    error = space.cross(Q, S) @ C - C
    return bool((error.norm(dim=0) > _LOST * C.norm(dim=0)).any())


def block_cg(system: System, R: Tensor, limits: Tensor) -> Query[Steps]:
    """Run preconditioned conjugate gradients on all columns together.

    Where the map is not positive along a combination of the directions, the columns that
    have a part in it stop before the step, at the best of a space on which the map is
    positive: Steihaug's truncation (SIAM J. Numer. Anal. 20, 1983), of all at once.

    Args:
        system: The damped map and its preconditioner.
        R: [k, P] Right-hand sides.
        limits: [k] Residual norms to reach, float64.

    Yields:
        Residual norms.

    Returns:
        The solutions.
    """
    block = _Block(system, R, limits)
    iterations, stopped = 0, None
    left = _LONG * (system.space.size + len(R))
    while len(block.active) and left > 0:
        stopped = system.refusal(len(block.S))
        if stopped is not None:
            break
        iterations, left = iterations + 1, left - len(block.S)
        block.step()
        yield system.progress(block.length * block.sizes)
    return block.found(iterations, stopped)


class _Block:
    """Block CG under way. Columns are scaled to norm one.

    Args:
        system: The damped map and its preconditioner.
        R: [k, P] Right-hand sides.
        limits: [k] Residual norms to reach, float64.
    """

    def __init__(self, system: System, R: Tensor, limits: Tensor) -> None:
        self._system, self._space = system, system.space
        sizes = self._space.norms(R)
        self.sizes = torch.where(sizes > 0, sizes, 1.0)
        self._limits = limits / self.sizes
        self._R = R / self.sizes[:, None].to(R.dtype)
        self._X = torch.zeros_like(R)
        self.length = self._space.norms(self._R)
        self.active = torch.nonzero(self.length > self._limits).flatten()
        """Columns that have neither converged nor met negative curvature."""
        self._curvature = torch.full_like(self.length, torch.inf)
        self._indefinite = torch.zeros_like(self.length, dtype=torch.bool)
        self._flat = self._indefinite.clone()
        self._rounding = _Rounding(self.length)
        self._Q = self.S = self._R[:0]
        """[r, P]; [r, P] search directions."""
        self._C = self.length.new_zeros(0, 0)
        """[r, active] The residuals of the active columns are ``C' Q``."""
        self._left = _Left(self._space, self.S, self.S)
        self._restarted: Tensor | None = None
        """[k] Lengths where the block has last begun anew."""
        self._begin()

    def step(self) -> None:
        """Multiply the directions, move along them, and make new ones."""
        S = self.S
        T = self._system.apply(S)
        lengths = self._space.norms(S), self._space.norms(T)
        self._rounding.look(*lengths)
        turn, values = _conjugate(self._space.cross(S, S), self._space.cross(S, T))
        if self._blocked(turn, values):
            return
        pull = (turn / values) @ turn.T  # the inverse of S A S'
        self._move(pull @ self._C, T, lengths)
        W = self._space.add(self._Q, pull, T, alpha=-1)
        self._Q, Z, carry = factors(self._space, W, self._inverse(W))
        self._C = carry @ self._C
        self.S = self._space.add(Z, carry, S)
        self._retire(carry, S, T)
        self.S = self._left.conjugate(self.S)
        if len(self.active) and lost(self._space, self.S, self._Q, self._C):
            self._begin_anew()

    def found(self, iterations: int, stopped: Stop | None) -> Steps:
        """Sum up, in the scale of the right-hand sides."""
        return Steps(
            self._X * self.sizes[:, None].to(self._X.dtype),
            self._curvature,
            self._indefinite,
            self._flat,
            self.length * self.sizes,
            self._rounding.drift(self._X.dtype) * self.sizes,
            iterations,
            stopped,
        )

    def _begin(self) -> None:
        """Make a block of the residuals of the active columns."""
        W = self._R[self.active]
        self._Q, self.S, self._C = factors(self._space, W, self._inverse(W))
        self._left = _Left(self._space, self.S[:0], self.S[:0])

    def _begin_anew(self) -> None:
        """Begin with the residuals as they are, or end if the last time has not helped."""
        before, self._restarted = self._restarted, self.length.clone()
        if before is None or (self.length < before / 2)[self.active].any():
            self._begin()
        else:
            self.active = self.active[:0]

    def _inverse(self, W: Tensor) -> Tensor:
        return W if self._system.inverse is None else self._system.inverse(W)

    def _blocked(self, turn: Tensor, values: Tensor) -> bool:
        """Take note of curvature, and stop the columns that met none or negative one.

        Args:
            turn: [r, d] Conjugate orthonormal directions ``turn' S``.
            values: [d] Their curvatures.

        Returns:
            Whether there are any; the others begin anew.
        """
        # The parts of each column's step in these directions, but for their lengths.
        parts = turn.T @ self._C
        met = parts.abs() > _part_of(self.S.dtype) * parts.norm(dim=0)
        curvature = torch.where(met, values[:, None], torch.inf).amin(0)
        active = self.active
        self._curvature[active] = torch.minimum(self._curvature[active], curvature)
        least = torch.finfo(self.S.dtype).eps * self._rounding.largest
        bad = ~(curvature > least)
        if bad.any():
            self._indefinite[active[bad]] = True
            self._flat[active[curvature.abs() <= least]] = True
            self.active = active[~bad]
            self._begin()
        return bool(bad.any())

    def _move(self, weights: Tensor, T: Tensor, lengths: tuple[Tensor, Tensor]) -> None:
        """Move along the directions.

        Args:
            weights: [r, active] Of the directions.
            T: [r, P] Their products.
            lengths: [r] Of directions and of products.
        """
        active, S = self.active, self.S
        norms = self._space.norms
        moves = self._space.combine(weights.T, S)
        self._X[active] += moves
        self._R[active] -= self._space.combine(weights.T, T)
        self.length[active] = norms(self._R[active])
        self._rounding.add(active, weights, *lengths, norms(moves))

    def _retire(self, carry: Tensor, S: Tensor, T: Tensor) -> None:
        """Reduce the block to the columns that have not converged.

        Args:
            carry: [r, s] What the new directions took over from the old ones.
            S: [s, P] The old ones.
            T: [s, P] Their products.
        """
        # Rounding may have parted the sum of products from the recurrence: once that has
        # arrived, there is nothing left to do here.
        gram = self._space.cross(self._Q, self._Q)
        claimed = (self._C * (gram @ self._C)).sum(0).clamp_min(0).sqrt()
        limits = self._limits[self.active]
        open_ = (self.length[self.active] > limits) & (claimed > limits / 2)
        if open_.all():
            return
        self.active, self._C = self.active[open_], self._C[:, open_]
        if not len(self.active):
            return
        scaled = self._C / self._C.norm(dim=0)
        turn, sizes, _ = torch.linalg.svd(scaled, full_matrices=True)
        rank = int((sizes > torch.finfo(S.dtype).eps).sum())
        inside, outside = turn[:, :rank].T, turn[:, rank:].T
        self._left.add(outside @ carry, S, T)
        self._C = inside @ self._C
        self._Q = self._space.combine(inside, self._Q)
        self.S = self._space.combine(inside, self.S)


class _Left:
    """Directions that have left a block, to which later ones must stay conjugate.

    Args:
        space: Where they live.
        F: [d, P], ``F A F' = I``.
        H: [d, P] Their products.
    """

    def __init__(self, space: Space, F: Tensor, H: Tensor) -> None:
        self._space, self._F, self._H = space, F, H

    def add(self, weights: Tensor, S: Tensor, T: Tensor) -> None:
        """Take over combinations of directions.

        Args:
            weights: [d, s].
            S: [s, P] Directions.
            T: [s, P] Their products.
        """
        if not len(weights):
            return
        space = self._space
        F, H = space.combine(weights, S), space.combine(weights, T)
        turn, values = _conjugate(space.cross(F, F), space.cross(F, H))
        change = (turn / values.sqrt())[:, values > 0].T
        self._F = torch.cat((self._F, space.combine(change, F)))
        self._H = torch.cat((self._H, space.combine(change, H)))

    def conjugate(self, S: Tensor) -> Tensor:
        """Subtract from directions what is not conjugate: [r, P]."""
        if not len(self._F):
            return S
        return self._space.add(S, self._space.cross(self._H, S), self._F, alpha=-1)


class _Rounding:
    """How far rounding may have taken residuals that are sums of products.

    Args:
        length: [k] Of the columns.
    """

    def __init__(self, length: Tensor) -> None:
        self.largest = 0.0
        """By how much the map has lengthened a direction at most."""
        self._reach, self._square = torch.zeros_like(length), torch.zeros_like(length)

    def look(self, S: Tensor, T: Tensor) -> None:
        """Take note of products, before a step.

        Args:
            S: [r] Lengths of the directions.
            T: [r] Lengths of their products.
        """
        if len(S):
            self.largest = max(self.largest, float((T / S).max()))

    def add(
        self, columns: Tensor, weights: Tensor, S: Tensor, T: Tensor, moves: Tensor
    ) -> None:
        """Take note of a step.

        Args:
            columns: Which moved.
            weights: [r, n] Of the directions.
            S: [r] Lengths of the directions.
            T: [r] Lengths of their products.
            moves: [n] Lengths of the moves.
        """
        self._reach[columns] += moves
        summed = weights.abs().T @ (T + self.largest * S)
        sums = self.largest * self._reach[columns]
        self._square[columns] += (sums + summed) ** 2

    def drift(self, dtype: torch.dtype) -> Tensor:
        """Bound the drift: [k]."""
        return 4 * torch.finfo(dtype).eps * self._square.sqrt()


def _conjugate(gram: Tensor, form: Tensor) -> tuple[Tensor, Tensor]:
    """Find combinations of directions that are orthonormal and conjugate.

    Args:
        gram: [r, r] ``S S'``.
        form: [r, r] ``S A S'``.

    Returns:
        Turn: [r, d], one combination per column, and their curvatures: [d].
    """
    lengths, axes = torch.linalg.eigh((gram + gram.T) / 2)
    seen = lengths > torch.finfo(gram.dtype).eps * lengths.amax(0, keepdim=True)
    root = axes[:, seen] / lengths[seen].sqrt()
    inner = root.T @ ((form + form.T) / 2) @ root
    values, turn = torch.linalg.eigh(inner)
    return root @ turn, values


def _part_of(dtype: torch.dtype) -> float:
    """Say below which share a column has no part in a direction."""
    return float(torch.finfo(dtype).eps ** 0.5)
