"""Linear systems with many right-hand sides, and residuals that are true."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvd.contract import Solver, Stop
from curvd_server.linalg.base import Products, Progress, Query
from curvd_server.linalg.krylov import Steps, System, cg, minres
from curvd_server.linalg.vectors import norms

_SLACK = 16
"""The recurrence goes further than asked by so many roundings of its start, so that they
do not cost a second round."""
_TRUE = 0.01
"""A residual that rounding changes by less than this share needs no product."""
_DIGITS = 32
"""A round reduces a residual to no less than so many roundings of its start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveResult:
    """Solutions of ``(A + damping * I) x = b``, column by column."""

    solution: Tensor
    """X: [K, P]."""
    residuals: tuple[float, ...]
    """``|b - (A + damping * I) x|``: from a product with the x that is returned, unless
    rounding cannot have moved the sum of CG's own products from it by a percent."""
    relative_residuals: tuple[float, ...]
    """The same, relative to ``|b|``."""
    curvatures: tuple[float, ...]
    """Smallest Rayleigh quotient of a search direction, damping included."""
    indefinite: tuple[bool, ...]
    """Whether the damped map was found not to be positive definite."""
    column_stops: tuple[Stop, ...]
    iterations: int
    products: int
    stopped: Stop
    """The worst of `column_stops`."""


def solve(
    products: Products,
    B: Tensor,
    *,
    solver: Solver = Solver.CG,
    damping: float = 0.0,
    tolerance: float = 1e-6,
    start: Tensor | None = None,
    preconditioner: Tensor | None = None,
) -> Query[SolveResult]:
    """Solve ``(A + damping * I) x = b`` for every column.

    When the recurrence claims convergence and rounding may have betrayed it, the
    residual is computed from a product; if it is larger than claimed, the iteration
    starts again from there, until a round no longer halves it.

    Args:
        products: The map A.
        B: [K, P] Right-hand sides.
        solver: CG or MINRES.
        damping: Added to every eigenvalue.
        tolerance: On the residual relative to ``|b|``.
        start: [K, P] First guess; None: zero, which saves K products.
        preconditioner: [P] Positive; approximates the diagonal of the damped map. CG
            only.

    Yields:
        Relative residuals.

    Returns:
        The solutions; the best so far if products or time ran out.
    """

    def damped(V: Tensor) -> Tensor:
        result = products(V)
        return result + damping * V if damping else result

    X = torch.zeros_like(B) if start is None else start.to(B).clone()
    sizes = norms(B)
    R = B.clone() if start is None else B - damped(X)
    limits = tolerance * sizes
    length = norms(R)
    state = _State(B, products)
    inner = cg if solver is Solver.CG else minres
    stopped: Stop | None = None
    rounds = 0
    while stopped is None:
        open_ = state.open(length, limits)
        if not len(open_):
            break
        system = System(
            apply=damped,
            # The closing residuals need one product per column.
            refusal=lambda n: products.refusal(n + len(B)),
            progress=state.progress(length, sizes, open_),
            inverse=None if preconditioner is None else 1 / preconditioner,
        )
        # Rounding hides what a recurrence says about more digits than it has.
        rounding = torch.finfo(B.dtype).eps * length
        reach = torch.maximum(limits - _SLACK * rounding, _DIGITS * rounding)
        steps = yield from inner(system, R[open_], reach[open_])
        stopped = steps.stopped
        before = length.clone()
        if steps.iterations:
            X[open_] += steps.solution
            length[open_] = steps.length
            doubtful = steps.drift > _TRUE * steps.length
            # Rounding of earlier rounds is not in the drift, and R must be renewed.
            doubtful |= (steps.length > limits[open_]) | (
                start is not None or rounds > 0
            )
            if len(again := open_[doubtful]):
                R[again] = B[again] - damped(X[again])
                length[again] = norms(R[again])
        state.record(open_, steps, solver)
        state.stagnated |= (length > limits) & (length > 0.5 * before) & (rounds > 0)
        rounds += 1
    return state.result(X, length, sizes, limits, stopped)


class _State:
    """What is known of every column beside its solution."""

    def __init__(self, B: Tensor, products: Products) -> None:
        count, device = len(B), B.device
        self._products = products
        self.curvature = torch.full(
            (count,), torch.inf, dtype=torch.float64, device=device
        )
        self.indefinite = torch.zeros(count, dtype=torch.bool, device=device)
        self.blocked = self.indefinite.clone()
        """Columns that met curvature which their solver cannot handle."""
        self.stagnated = self.indefinite.clone()
        self.iterations = 0

    def open(self, length: Tensor, limits: Tensor) -> Tensor:
        """Find the columns that are not done: their indices."""
        return torch.nonzero(
            (length > limits) & ~self.blocked & ~self.stagnated
        ).flatten()

    def record(self, columns: Tensor, steps: Steps, solver: Solver) -> None:
        """Take note of what an inner iteration found."""
        self.iterations += steps.iterations
        self.curvature[columns] = torch.minimum(
            self.curvature[columns], steps.curvature
        )
        self.indefinite[columns] |= steps.indefinite
        if solver is Solver.CG:
            self.blocked[columns] |= steps.indefinite

    def progress(self, length: Tensor, sizes: Tensor, columns: Tensor) -> _ProgressOf:
        """Make the function that turns residual norms into progress."""
        return _ProgressOf(self, length.clone(), sizes, columns)

    @property
    def done(self) -> int:
        """Columns multiplied so far."""
        return self._products.done

    def result(
        self,
        X: Tensor,
        length: Tensor,
        sizes: Tensor,
        limits: Tensor,
        stopped: Stop | None,
    ) -> SolveResult:
        """Sum up."""
        stops = []
        for column in range(len(X)):
            if length[column] <= limits[column]:
                stops.append(Stop.CONVERGED)
            elif self.blocked[column]:
                stops.append(Stop.NEGATIVE_CURVATURE)
            elif self.stagnated[column]:
                stops.append(Stop.STAGNATED)
            else:
                stops.append(stopped or Stop.STAGNATED)
        severity = list(Stop)
        return SolveResult(
            solution=X,
            residuals=tuple(length.tolist()),
            relative_residuals=tuple(_relative(length, sizes).tolist()),
            curvatures=tuple(self.curvature.tolist()),
            indefinite=tuple(self.indefinite.tolist()),
            column_stops=tuple(stops),
            iterations=self.iterations,
            products=self._products.done,
            stopped=max(stops, key=severity.index, default=Stop.CONVERGED),
        )


class _ProgressOf:
    """Progress of an inner iteration that works on some of the columns."""

    def __init__(
        self, state: _State, length: Tensor, sizes: Tensor, columns: Tensor
    ) -> None:
        self._state, self._length, self._sizes = state, length, sizes
        self._columns, self._steps = columns, state.iterations

    def __call__(self, length: Tensor) -> Progress:
        self._length[self._columns] = length
        self._steps += 1
        return Progress(
            iteration=self._steps,
            products=self._state.done,
            residuals=tuple(_relative(self._length, self._sizes).tolist()),
        )


def _relative(length: Tensor, sizes: Tensor) -> Tensor:
    return torch.where(sizes > 0, length / sizes, length)
