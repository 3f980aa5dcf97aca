"""Linear systems at several dampings from one Krylov space: products of the smallest.

A damping moves no Krylov space. Block CG at the smallest damping factorises the block
tridiagonal matrix of the map, ``T = L D L'``; at others it is ``T + shift``, factorised
beside it, and the residuals stay combinations of the same vectors: ``y' Q`` (Frommer,
Computing 70, 2003, for one column; Futamura, Sakurai, Furuya & Iwata, Lecture Notes in
Computer Science 7851, 2013, for blocks).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from curvd.contract import Stop
from curvd_server.linalg.base import Products, Progress, Query
from curvd_server.linalg.block_krylov import factors, lost
from curvd_server.linalg.linear_systems import (
    SolveResult,
    check_regular,
    solve_scaled,
)
from curvd_server.linalg.right_hand_sides import RightHandSides
from curvd_server.linalg.space import Space

T = TypeVar("T")

_LONG = 4
"""See `block_krylov`: more directions than so many times P have been won by rounding."""
_GROWN = 10
"""Residuals of CG may grow on the way, but what has grown by so much is looked at."""


def solve_dampings(
    products: Products,
    B: Tensor,
    dampings: Sequence[float],
    *,
    tolerance: float = 1e-6,
    block: int | None = None,
) -> Query[list[SolveResult]]:
    """Solve ``(A + damping * I) x = b`` for every damping and column.

    Residuals are computed from a product for each solution; what is not good enough goes
    on by itself, as where the map is not positive definite.

    Args:
        products: The map A.
        B: [K, P] Right-hand sides.
        dampings: D of them.
        tolerance: On the residuals relative to ``|b|``.
        block: Columns that are minimised together, at most; None: all.

    Yields:
        Relative residuals at the smallest damping.

    Returns:
        The solutions for each damping, in their order; products of all together.

    Raises:
        InvalidSpec: See `check_regular`.
        ScaleOutOfRange: If a solution is no number of its type.
    """
    for damping in dampings:
        check_regular(products, damping)
    sides = RightHandSides(products.space, B)
    X = torch.zeros(len(dampings), *B.shape, dtype=B.dtype, device=B.device)
    steps = 0
    for part in torch.split(torch.arange(len(B), device=B.device), block or len(B)):
        scaled = sides.scaled(part)
        X[:, part], more = yield from _together(products, scaled, dampings, tolerance)
        steps += more
    found = []
    for x, damping in zip(X, dampings, strict=True):
        result = yield from solve_scaled(
            products, sides, damping=damping, tolerance=tolerance, start=x, block=block
        )
        found.append(replace(result, iterations=result.iterations + steps))
    return found


def joined(query: Query[list[SolveResult]]) -> Query[SolveResult]:
    """Make one result of those of several dampings, damping by damping.

    Args:
        query: What finds them, not begun.

    Yields:
        Its progress.

    Returns:
        The solutions [D, K, P]; of what each column has, D times K.
    """
    found = yield from query
    severity = list(Stop)
    return SolveResult(
        solution=torch.stack([one.solution for one in found]),
        residuals=_all(one.residuals for one in found),
        relative_residuals=_all(one.relative_residuals for one in found),
        curvatures=_all(one.curvatures for one in found),
        indefinite=_all(one.indefinite for one in found),
        column_stops=_all(one.column_stops for one in found),
        iterations=max(one.iterations for one in found),
        products=max(one.products for one in found),
        stopped=max((one.stopped for one in found), key=severity.index),
    )


def _all(parts: Iterable[tuple[T, ...]]) -> tuple[T, ...]:
    return tuple(itertools.chain.from_iterable(parts))


def _together(
    products: Products, B: Tensor, dampings: Sequence[float], tolerance: float
) -> Query[tuple[Tensor, int]]:
    """Iterate until the recurrences claim that all dampings are solved.

    Returns:
        [D, K, P], and the steps.
    """
    space = products.space
    sizes = space.norms(B)
    sizes = torch.where(sizes > 0, sizes, 1.0)[:, None].to(B.dtype)
    Q, _, C = factors(space, B / sizes, B / sizes)
    base = min(dampings)
    systems = [_Shifted(space, damping - base, Q, C) for damping in dampings]
    S, before, carry = Q, None, None
    left, steps = _LONG * (products.size + len(B)), 0
    # The closing residuals need one product per solution.
    closing = len(dampings) * len(B)
    while len(S) and left > 0 and any(s.length > tolerance / 2 for s in systems):
        if products.refusal(len(S) + closing) is not None:
            break
        left, steps = left - len(S), steps + 1
        AS = products.damped(S, base)
        form = space.cross(S, AS)
        form = (form + form.T) / 2
        triangle, failed = torch.linalg.cholesky_ex(form)
        if failed:  # not positive definite: each damping is judged by itself
            break
        diagonal, below = form, None
        if before is not None and carry is not None:
            diagonal, below = form + carry @ before @ carry.T, -carry @ before
        open_ = [s for s in systems if s.length > tolerance / 2]
        for system in open_:
            system.step(diagonal, below, Q)
        pull = torch.cholesky_inverse(triangle)
        W = space.add(Q, pull, AS, alpha=-1)
        Q, _, carry = factors(space, W, W)
        S, before = space.add(Q, carry, S), form
        for system in open_:
            system.look(carry @ before)
        grown = [system.rest for system in open_ if system.has_grown]
        apart = bool(grown) and lost(space, S, Q, torch.cat(grown, 1))
        yield Progress(
            iteration=steps,
            products=products.done,
            residuals=tuple(s.length for s in systems),
        )
        if apart:  # as above; each begins anew with its residuals
            break
    return torch.stack([s.X * sizes for s in systems]), steps


class _Shifted:
    """The factorisation of ``T + shift``, and the solution that follows from it.

    Args:
        space: Where vectors live.
        shift: Above the smallest damping.
        Q: [r, P] The first block.
        C: [r, K] Coefficients of the right-hand sides in it.
    """

    def __init__(self, space: Space, shift: float, Q: Tensor, C: Tensor) -> None:
        self._space, self._shift, self._y = space, shift, C
        self._S, self._pull = Q, C.new_zeros(len(C), len(C))
        self.rest = C
        """[r, K] Minus its residuals, in the latest block."""
        self.X = C.T.to(Q.dtype) @ torch.zeros_like(Q)
        self.length = float(C.norm(dim=0).amax()) if C.numel() else 0.0
        """Largest residual norm of the columns, by the recurrence."""
        self._least = self.length

    @property
    def has_grown(self) -> bool:
        """Whether its residuals have been much smaller."""
        return self.length > _GROWN * self._least

    def step(self, diagonal: Tensor, below: Tensor | None, Q: Tensor) -> None:
        """Factorise one block more, and move along its directions.

        Args:
            diagonal: [r, r] Of T.
            below: [r, s] Of T, left of it; None: it is the first block.
            Q: [r, P].
        """
        pivot = diagonal + self._shift * torch.eye(len(diagonal)).to(diagonal)
        if below is None:
            self._S = Q
        else:
            lower = below @ self._pull
            pivot = pivot - lower @ below.T
            self._S = self._space.add(Q, lower, self._S, alpha=-1)
            self._y = -lower @ self._y
        # At least as positive definite as that of the smallest damping.
        self._pull = torch.linalg.inv((pivot + pivot.T) / 2)
        self.X += self._space.combine((self._pull @ self._y).T, self._S)

    def look(self, beside: Tensor) -> None:
        """Compute what is left of the residuals: ``beside`` is minus T's next block."""
        rest = self.rest = beside @ self._pull @ self._y
        self.length = float(rest.norm(dim=0).amax()) if rest.numel() else 0.0
        self._least = min(self._least, self.length)
