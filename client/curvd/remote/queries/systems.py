"""Linear systems: the query and its result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from curvd._calls import Answer, Queries, QueryCall
from curvd.contract import SolveOptions, Stop
from curvd.errors import InvalidSpec, InvalidVector
from curvd.remote.asking import asks_about
from curvd.remote.queries.base import Floats, Result, drawn_on
from curvd.tensors import Operand

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Solution", "SystemQueries"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution(Result):
    """Solutions of ``(A + damping * I) x = b``, column by column."""

    x: Any
    """In the layout and type of b."""
    residuals: Floats
    """[K] ``|b - (A + damping * I) x|``, from products, true to a percent."""
    relative_residuals: Floats
    """[K] The same relative to ``|b|``."""
    curvatures: Floats
    """[K] Smallest Rayleigh quotient of a search direction, damping included."""
    indefinite: tuple[bool, ...]
    """[K] Whether the damped operator was found not to be positive definite."""
    column_stops: tuple[Stop, ...]
    """[K] Why each column ended."""
    iterations: int

    def lines(self) -> Iterator[str]:
        """Say how true each solution is."""
        for column, residual in enumerate(self.relative_residuals):
            stop = self.column_stops[column]
            yield f"column {column}: {stop}, relative residual {residual:.1e}"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the relative residuals of the columns.

        Args:
            axes: Where to; None makes a figure.

        Returns:
            The axes.
        """
        axes = drawn_on(axes)
        rank = np.arange(len(self.relative_residuals))
        axes.bar(rank, self.relative_residuals)
        axes.set(xlabel="column", ylabel="relative residual", yscale="log")
        return axes


class SystemQueries:
    """The query for solutions of linear systems."""

    _queries: Queries

    @asks_about(SolveOptions)
    def solve(  # noqa: D417 - options say themselves what they are
        self, b: Any, options: SolveOptions
    ) -> QueryCall[Solution]:
        """Solve ``(A + damping * I) x = b``.

        Args:
            b: [P] or [P, K], or per parameter; any layout that `@` takes.

        Returns:
            The solutions, and how true they are. Check `Solution.converged`: CG stops,
            and says so, where the operator has negative curvature.

        Examples:
            >>> loss, gradient = session.gradient()
            >>> G = session.ggn()
            >>> found = G.solve(gradient, damping=0.1, tolerance=1e-8)
            >>> found.converged
            True
            >>> np.allclose(G @ found.x + 0.1 * found.x, gradient, atol=1e-7)
            True
        """
        operands, target = _systems(self._queries, b, options)

        def read(answer: Answer) -> Solution:
            x = answer.arrays["x"].reshape(target.shape)
            return answer.result(Solution, x=target.restore(x))

        columns = 1 if target.columns is None else target.columns
        nbytes = columns * self._queries.column_bytes
        return self._queries.call(
            "Solve", options, read, operands=operands, max_bytes=nbytes
        )


def _systems(
    queries: Queries, b: Any, options: SolveOptions
) -> tuple[dict[str, tuple[Operand, tuple[int, ...]]], Operand]:
    """Check the operands of linear systems.

    Returns:
        What is sent, by name and with its shape; and the right-hand sides.
    """
    if isinstance(options.preconditioner, int):
        msg = (
            f"preconditioner must be a diagonal, [P], got {options.preconditioner}: one "
            "that is estimated from products made CG slower; leave it out"
        )
        raise InvalidSpec(msg, preconditioner=options.preconditioner)
    given = {"b": queries.operand(b)}
    target = given["b"]
    if options.x0 is not None:
        given["x0"] = queries.operand(options.x0)
        if given["x0"].columns != target.columns:
            msg = (
                f"x0 has {given['x0'].columns} columns and b has {target.columns}; they "
                "must be alike"
            )
            raise InvalidVector(msg, columns=given["x0"].columns)
    size = queries.session.layout.size
    columns = 1 if target.columns is None else target.columns
    shapes: dict[str, tuple[Operand, tuple[int, ...]]] = {
        name: (value, (columns, size)) for name, value in given.items()
    }
    if options.preconditioner is not None:
        shapes["preconditioner"] = (queries.operand(options.preconditioner), (size,))
    return shapes, target
