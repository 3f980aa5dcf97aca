"""Linear systems with many right-hand sides, and residuals that are true."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvd.contract import Solver, Stop
from curvd.errors import InvalidSpec, ScaleOutOfRange
from curvd_server.linalg.base import Products, Progress, Query
from curvd_server.linalg.block_krylov import block_cg
from curvd_server.linalg.krylov import Steps, System, cg, minres
from curvd_server.linalg.low_rank import LowRank
from curvd_server.linalg.right_hand_sides import RightHandSides
from curvd_server.linalg.scales import units_of
from curvd_server.linalg.space import Space

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

    @property
    def unknown(self) -> Tensor:
        """[K] Whether a solution is still zero, and its right-hand side is not."""
        missing = torch.tensor(self.relative_residuals, device=self.solution.device)
        return (missing > 0) & ~self.solution.any(-1)


def solve(
    products: Products,
    B: Tensor,
    *,
    solver: Solver = Solver.CG,
    damping: float = 0.0,
    tolerance: float = 1e-6,
    start: Tensor | None = None,
    preconditioner: Tensor | LowRank | None = None,
    block: int | None = None,
) -> Query[SolveResult]:
    """Solve ``(A + damping * I) x = b`` for every column.

    Where an iteration cannot answer for its residual, that is computed from a product; if
    it is larger than claimed, the iteration starts again from there, until a round no
    longer halves it. Where the inverse is known in closed form, its solution is the first
    guess, whose residual is computed likewise.

    Args:
        products: The map A.
        B: [K, P] Right-hand sides.
        solver: CG or MINRES.
        damping: Added to every eigenvalue.
        tolerance: On the residual relative to ``|b|``.
        start: [K, P] First guess; None: zero, which saves K products.
        preconditioner: [P] Positive, approximates the diagonal of the damped map; or what
            is known of the largest eigenvalues of A, or of a map like it.
        block: Columns that CG minimises together, at most; None: all; 1: each alone.

    Yields:
        Relative residuals.

    Returns:
        The solutions; the best so far if products or time ran out.

    Raises:
        InvalidSpec: If all eigenvalues are known, one of the damped map is zero but for
            rounding, and the solver is CG.
        ScaleOutOfRange: If a solution is no number of its type, or a first guess so large
            that its residual shows nothing of the right-hand side. These have any size.
    """
    sides = RightHandSides(products.space, B)
    if start is not None:
        start = sides.guesses(start, products.range.most)
    return (
        yield from solve_scaled(
            products,
            sides,
            solver=solver,
            damping=damping,
            tolerance=tolerance,
            start=start,
            preconditioner=preconditioner,
            block=block,
        )
    )


def solve_scaled(
    products: Products,
    sides: RightHandSides,
    *,
    start: Tensor | None,
    damping: float,
    tolerance: float,
    block: int | None,
    solver: Solver = Solver.CG,
    preconditioner: Tensor | LowRank | None = None,
) -> Query[SolveResult]:
    """Solve for right-hand sides whose first guesses are in their units.

    Args:
        products: The map A.
        sides: K right-hand sides.
        start: [K, P] In their units, becomes the solution; None: zero.
        damping: See `solve`, as the others.
        tolerance: Of residuals.
        block: Columns together.
        solver: CG or MINRES.
        preconditioner: A diagonal, or eigenvalues.

    Yields:
        Relative residuals.

    Returns:
        As `solve`.

    Raises:
        InvalidSpec: See `check_regular`.
        ScaleOutOfRange: If the guesses or the solutions of some are too large or too small.
    """
    if solver is Solver.CG:
        check_regular(products, damping)
    if start is None:
        start = products.inverse(sides.scaled(), damping)
    if start is not None:
        # Against a limit of zero, what rounding has left of zero would be open for ever.
        start.masked_fill_(sides.are_zero[:, None], 0.0)
    systems = _Systems(products, sides, solver, damping, tolerance, start)
    inverse = _inverse(products.space, preconditioner, damping)
    # Columns that do not see each other can as well be multiplied together.
    alone = solver is Solver.MINRES or block == 1
    width = len(sides) if alone or block is None else block
    all_ = torch.arange(len(sides), device=products.device)
    for part in torch.split(all_, max(1, width)):
        rounds = 0
        while len(open_ := systems.open(part)):
            yield from systems.iterate(open_, inverse, alone=alone, again=rounds > 0)
            rounds += 1
    return systems.result()


def check_regular(products: Products, damping: float) -> None:
    """Refuse a map that has no inverse, if all its eigenvalues are known.

    Iterations find that out late, or take what rounding has left of a zero for a small
    eigenvalue, and answer for right-hand sides that have no solution.

    Args:
        products: The map.
        damping: Added to every eigenvalue.

    Raises:
        InvalidSpec: If an eigenvalue is zero but for rounding; it names the damping from
            which on there is an inverse.
    """
    values = products.eigenvalues()
    if values is None or not len(values):
        return
    damped = values + damping
    unseen = torch.finfo(products.dtype).eps * float(damped.abs().max())
    if float(damped.abs().min()) > unseen:
        return
    least, largest = float(values.min()), float(values.max())
    msg = (
        f"the operator has an eigenvalue of {least:.3g} beside one of {largest:.3g}: with a "
        f"damping of {damping:g} it has no inverse in {products.dtype}; take a damping "
        f"above {max(unseen, 1e-300):.3g}, or solve with minres, which needs no inverse"
    )
    raise InvalidSpec(msg, least=least, largest=largest, damping=damping)


class _Systems:
    """The columns, and what is known of each.

    Args:
        products: The map A.
        sides: Right-hand sides; everything here is in their units.
        solver: CG or MINRES.
        damping: Added to every eigenvalue.
        tolerance: On the residual relative to ``|b|``.
        start: [K, P] First guess, whose memory becomes that of the solution; None: zero.
    """

    def __init__(
        self,
        products: Products,
        sides: RightHandSides,
        solver: Solver,
        damping: float,
        tolerance: float,
        start: Tensor | None,
    ) -> None:
        self._products, self._sides, self._solver = products, sides, solver
        norms = self._norms = products.space.norms
        self._damping, self._cold = damping, start is None
        B = sides.scaled()
        self._sizes = norms(B)
        self._X = torch.zeros_like(B) if start is None else start
        self._R = B if start is None else B - self._damped(self._X)
        self._length = norms(self._R)
        self._limits = tolerance * self._sizes
        self._curvature = torch.full_like(self._sizes, torch.inf)
        self._indefinite = torch.zeros_like(self._sizes, dtype=torch.bool)
        self._blocked = self._indefinite.clone()
        """Columns that met curvature which their solver cannot handle."""
        self._stagnated = self._indefinite.clone()
        self._iterations = 0
        self._stopped: Stop | None = None

    def open(self, columns: Tensor) -> Tensor:
        """Find those of the columns that are not done: their indices."""
        far = self._length > self._limits
        done = ~far | self._blocked | self._stagnated
        return columns[~done[columns]] if self._stopped is None else columns[:0]

    def iterate(
        self,
        columns: Tensor,
        inverse: Callable[[Tensor], Tensor] | None,
        *,
        alone: bool,
        again: bool,
    ) -> Query[None]:
        """Iterate from where the columns are until they seem to be done.

        Args:
            columns: Their indices.
            inverse: Of the preconditioner.
            alone: Whether each has a Krylov space of its own.
            again: Whether this is not their first round.
        """
        system = System(
            apply=self._damped,
            # The closing residuals need one product per column.
            refusal=lambda n: self._products.refusal(n + len(columns)),
            progress=_ProgressOf(self, columns),
            inverse=inverse,
            space=self._products.space,
        )
        inner = cg if alone or len(columns) == 1 else block_cg
        if self._solver is Solver.MINRES:
            inner = minres
        # Rounding hides what a recurrence says about more digits than it has.
        before = self._length[columns]
        rounding = torch.finfo(self._R.dtype).eps * before
        least = self._limits[columns] - _SLACK * rounding
        reach = torch.maximum(least, _DIGITS * rounding)
        R = self._R[columns]
        X = None if self._cold and not again else self._X[columns]
        steps = yield from inner(system, R, reach)
        self._record(columns, steps)
        if steps.iterations:
            self._X[columns] += steps.solution
            self._length[columns] = steps.length
            self._renew(columns, steps, every=again or not self._cold)
            if steps.stopped is None or self._solver is Solver.MINRES:
                self._take_back(columns, steps, X, R, before)
        length = self._length[columns]
        slow = (length > self._limits[columns]) & (length > 0.5 * before)
        self._stagnated[columns] |= slow & again

    def result(self) -> SolveResult:
        """Sum up."""
        stops = [self._stop_of(column) for column in range(len(self._X))]
        severity = list(Stop)
        return SolveResult(
            solution=self._sides.solutions(self._X),
            residuals=tuple(self._sides.lengths(self._length).tolist()),
            relative_residuals=tuple(self.relative(self._length).tolist()),
            curvatures=tuple(self._curvature.tolist()),
            indefinite=tuple(self._indefinite.tolist()),
            column_stops=tuple(stops),
            iterations=self._iterations,
            products=self._products.done,
            stopped=max(stops, key=severity.index, default=Stop.CONVERGED),
        )

    def progress(self, iteration: int, length: Tensor) -> Progress:
        """Say where the query is, from residual norms."""
        return Progress(
            iteration=self._iterations + iteration,
            products=self._products.done,
            residuals=tuple(self.relative(length).tolist()),
        )

    def relative(self, length: Tensor) -> Tensor:
        """Divide residual norms by those of the right-hand sides."""
        return torch.where(self._sizes > 0, length / self._sizes, length)

    @property
    def length(self) -> Tensor:
        """[K] Residual norms, float64."""
        return self._length

    def _damped(self, V: Tensor) -> Tensor:
        return self._products.damped(V, self._damping)

    def _record(self, columns: Tensor, steps: Steps) -> None:
        """Take note of what an inner iteration found."""
        self._stopped = steps.stopped
        self._iterations += steps.iterations
        self._curvature[columns] = torch.minimum(
            self._curvature[columns], steps.curvature
        )
        self._indefinite[columns] |= steps.indefinite
        if self._solver is Solver.CG:
            self._blocked[columns] |= steps.indefinite

    def _renew(self, columns: Tensor, steps: Steps, *, every: bool) -> None:
        """Compute the residuals that the iteration cannot answer for."""
        doubtful = steps.drift > _TRUE * steps.length
        # In double precision the bound on the drift can be trusted, but it does not know
        # the rounding of earlier rounds; and what is not done must go on from the truth.
        doubtful |= steps.length > self._limits[columns]
        if every or self._R.dtype is not torch.float64:
            doubtful[:] = True
        if len(again := columns[doubtful]):
            self._R[again] = self._sides.scaled(again) - self._damped(self._X[again])
            self._length[again] = self._norms(self._R[again])

    def _take_back(
        self,
        columns: Tensor,
        steps: Steps,
        X: Tensor | None,
        R: Tensor,
        before: Tensor,
    ) -> None:
        """Go back to where columns were that a whole round has led astray.

        CG lowers the error and not the residual, which may grow on the way; at the end of a
        round that has grown it, the system has no solution that rounding could show. The
        truncated step of a map with negative curvature stays.

        Args:
            columns: Their indices.
            steps: What the round found.
            X: [k, P] Their solutions before the round; None: zero.
            R: [k, P] Their residuals before it.
            before: [k] Their lengths.
        """
        negative = self._blocked[columns] & ~steps.flat
        astray = (self._length[columns] > before) & ~negative
        back = columns[astray]
        self._X[back] = 0 if X is None else X[astray]
        self._R[back], self._length[back] = R[astray], before[astray]
        self._stagnated[back] = True

    def _stop_of(self, column: int) -> Stop:
        if self._length[column] <= self._limits[column]:
            return Stop.CONVERGED
        if self._blocked[column]:
            return Stop.NEGATIVE_CURVATURE
        if self._stagnated[column]:
            return Stop.STAGNATED
        return self._stopped or Stop.STAGNATED


class _ProgressOf:
    """Progress of an inner iteration that works on some of the columns."""

    def __init__(self, systems: _Systems, columns: Tensor) -> None:
        self._systems, self._columns = systems, columns
        self._length, self._steps = systems.length.clone(), 0

    def __call__(self, length: Tensor) -> Progress:
        self._length[self._columns] = length
        self._steps += 1
        return self._systems.progress(self._steps, self._length)


def _inverse(
    space: Space, preconditioner: Tensor | LowRank | None, damping: float
) -> Callable[[Tensor], Tensor] | None:
    """Make what applies a preconditioner's inverse."""
    if preconditioner is None:
        return None
    if isinstance(preconditioner, LowRank):
        return preconditioner.at(damping, space).inverse
    scale = _reciprocal(space, preconditioner)
    return lambda V: V * scale


def _reciprocal(space: Space, diagonal: Tensor) -> Tensor:
    """Invert a diagonal, but for a factor: no preconditioner has a size.

    Args:
        space: Where it lives.
        diagonal: [own] Positive.

    Returns:
        [own], as far below one as above it.

    Raises:
        ScaleOutOfRange: If its elements are so different that this leaves the range.
    """
    largest = units_of(space.peaks(diagonal[None]), diagonal.dtype)
    inverse = 1 / (diagonal / largest.to(diagonal))
    spread = float(space.peaks(inverse[None]))
    most = torch.finfo(diagonal.dtype).max ** 0.25
    if not spread <= most**2:
        msg = (
            f"elements of the preconditioner differ by a factor of {spread:.1e}; at most "
            f"{most**2:.1e} is of use in {diagonal.dtype}: clamp the small ones"
        )
        raise ScaleOutOfRange(msg, spread=spread)
    return inverse / math.sqrt(spread)
