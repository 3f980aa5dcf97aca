"""Linear systems: the query and its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from curvd._calls import Answer, Queries, QueryCall
from curvd.contract import SketchOptions, SolveOptions, Stop, StoredVector
from curvd.errors import InvalidSpec, InvalidVector
from curvd.remote.asking import asks, asks_about
from curvd.remote.queries.base import Floats, Result, check_name, drawn_on, ranks_only
from curvd.tensors import Operand

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Sketch", "SketchQueries", "Solution", "SystemQueries"]

_MOST_COLUMNS = 2**16
"""Columns of stored right-hand sides that are known by name alone: a server takes fewer."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Solution(Result):
    """Solutions of ``(A + damping * I) x = b``, column by column."""

    x: Any
    """In the layout and type of b, a list of one for each of several dampings; None if it
    stays in the session."""
    stored: StoredVector | None
    """x, if it stays in the session."""
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

    def brief(self) -> str:
        """Say the largest relative residual."""
        columns, worst = len(self.relative_residuals), max(self.relative_residuals)
        more = "" if columns == 1 else f" of the worst of {columns} columns"
        return f"relative residual {worst:.1e}{more}"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the relative residuals of the columns.

        Args:
            axes: Where to; None makes a figure.

        Returns:
            The axes.
        """
        axes = drawn_on(axes)
        column = np.arange(len(self.relative_residuals))
        axes.bar(column, self.relative_residuals, label="|b - A x| / |b|")
        axes.set(
            xlabel="column",
            ylabel="relative residual",
            yscale="log",
            title=f"residuals after {self.products} products, version {self.version}",
        )
        ranks_only(axes)
        axes.legend()
        return axes


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Sketch(Result):
    """Approximate eigenvalues, from below, of vectors that the session stores.

    They are those of the operator without its scale and damping: of G, for a sketch of
    ``3 * G + 0.2 * I`` or of ``2 * I - G``, as systems and determinants of every scale and
    damping are preconditioned with it. ``eigsh`` reports those of the operator itself, and
    stores these.
    """

    values: Floats
    """[r], largest first, without scale and damping."""
    stored: StoredVector
    """The vectors with their values: a preconditioner, at any damping and version."""

    def lines(self) -> Iterator[str]:
        """Say how far down it reaches."""
        name, rank = self.stored.name, len(self.values)
        reach = f", from {self.values[0]:.3e} to {self.values[-1]:.3e}" if rank else ""
        yield f"{name!r}: {rank} values{reach}"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the values.

        Args:
            axes: Where to; None makes a figure.

        Returns:
            The axes.
        """
        axes = drawn_on(axes)
        ranks = np.arange(1, len(self.values) + 1)
        axes.semilogy(ranks, self.values, "o", label="eigenvalue, from below")
        axes.set(
            xlabel="rank",
            ylabel="eigenvalue, from below",
            title=f"{len(ranks)} values of a sketch, version {self.version}",
        )
        ranks_only(axes)
        axes.legend()
        return axes


class SystemQueries:
    """The query for solutions of linear systems."""

    _queries: Queries

    @asks_about(SolveOptions)
    def solve(  # noqa: D417 - options say themselves what they are
        self, b: Any, options: SolveOptions
    ) -> QueryCall[Solution]:
        """Solve ``(A + damping * I) x = b``.

        Right-hand sides are solved together: conjugate gradients minimise each over the
        Krylov space of all, which takes a fraction of the products.

        Args:
            b: [P] or [P, K], or per parameter; any layout that `@` takes. Or what the
                session stores, or its name.

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
            >>> loss, b = session.gradient(store="b")  # nothing of length P travels
            >>> step = G.solve("b", damping=0.1, store="x").stored
            >>> np.allclose(session.get("x"), found.x, atol=1e-5)
            True
        """
        check_name(options.store)
        names, shapes = _systems(self._queries, b, options)
        sent, dampings = shapes.get("b"), _dampings(options)

        def read(answer: Answer) -> Solution:
            if options.store is not None:
                stored = _kept(options, self._queries, sent, b, answer)
                return answer.result(Solution, x=None, stored=stored)
            found: Any = answer.arrays["x"]
            solutions = [_restored(x, sent) for x in (found if dampings else [found])]
            x = solutions if dampings else solutions[0]
            return answer.result(Solution, x=x, stored=None)

        columns = _MOST_COLUMNS if sent is None else sent[0].columns or 1
        nbytes = columns * self._queries.column_bytes * max(1, len(dampings))
        return self._queries.call(
            "Solve",
            options,
            read,
            operands=shapes,
            max_bytes=nbytes,
            dampings=dampings,
            **names,
        )


class SketchQueries:
    """The query for what precondition systems."""

    _queries: Queries

    @asks(SketchOptions)
    def sketch(self, options: SketchOptions) -> QueryCall[Sketch]:
        """Sketch the largest eigenvalues, to precondition systems and determinants.

        Nystroem's approximation of the operator without its scale and damping, which must
        have no negative eigenvalue: sketch the GGN for systems of the Hessian. It serves
        every damping, and stays good while training goes on.

        Returns:
            The values, and what the session stores: give its name as ``preconditioner``.

        Examples:
            >>> G = session.ggn()
            >>> sketch = G.sketch("top", rank=20)
            >>> gradient = session.gradient()[1]
            >>> found = G.solve(gradient, damping=1e-3, preconditioner=sketch.stored)
            >>> found.converged, found.products < G.solve(gradient, damping=1e-3).products
            (True, True)
        """

        def read(answer: Answer) -> Sketch:
            stored = _vector(
                options.name, (len(answer.summary.values),), self._queries, answer
            )
            values = tuple(answer.summary.values)
            return answer.result(
                Sketch, stored=dataclasses.replace(stored, values=values)
            )

        return self._queries.call("Sketch", options, read)


def _dampings(options: SolveOptions) -> list[float]:
    """Read the dampings of a run for several."""
    if options.dampings is None:
        return []
    if isinstance(options.dampings, (int, float)):
        msg = f"dampings are several in a list, got {options.dampings}: say damping= for one"
        raise InvalidSpec(msg, dampings=options.dampings)
    try:
        if isinstance(options.dampings, str):
            raise TypeError
        dampings = [float(damping) for damping in options.dampings]
    except (TypeError, ValueError):
        msg = f"dampings are numbers in a list, got {options.dampings!r:.80}"
        raise InvalidSpec(msg, dampings=options.dampings) from None
    if not dampings or options.damping:
        msg = (
            f"dampings must be at least one, in place of damping, got {dampings} beside "
            f"damping {options.damping}"
        )
        raise InvalidSpec(msg, dampings=dampings)
    return dampings


def _restored(x: Any, sent: tuple[Operand, tuple[int, ...]] | None) -> Any:
    """Bring a solution into the layout of b; of a stored one, columns last."""
    if sent is None:
        return np.ascontiguousarray(x.T)
    return sent[0].restore(x.reshape(sent[0].shape))


def _kept(
    options: SolveOptions,
    queries: Queries,
    sent: tuple[Operand, tuple[int, ...]] | None,
    b: Any,
    answer: Answer,
) -> StoredVector:
    """Describe the solutions that the session stores."""
    if sent is None:
        many = len(answer.summary.residuals)
        leading = b.shape[:-1] if isinstance(b, StoredVector) else (many,)[many == 1 :]
    else:
        leading = sent[1][:-1]
    if options.dampings is not None:
        leading = (len(answer.summary.residuals),)
    return _vector(options.store or "", leading, queries, answer)


def _vector(
    name: str, leading: tuple[int, ...], queries: Queries, answer: Answer
) -> StoredVector:
    return queries.stored(name, (*leading, queries.session.layout.size), answer)


def _systems(
    queries: Queries, b: Any, options: SolveOptions
) -> tuple[dict[str, Any], dict[str, tuple[Operand, tuple[int, ...]]]]:
    """Check the operands of linear systems.

    Returns:
        What is stored, its name by what it is; and what is sent, with its shape.
    """
    if isinstance(options.preconditioner, int):
        msg = (
            f"preconditioner must be a diagonal, [P], or what sketch() stored, got "
            f"{options.preconditioner}: a diagonal that is estimated from products made "
            "CG slower; leave it out"
        )
        raise InvalidSpec(msg, preconditioner=options.preconditioner)
    given = {"b": b, "x0": options.x0, "preconditioner": options.preconditioner}
    names: dict[str, Any] = {}
    shapes: dict[str, tuple[Operand, tuple[int, ...]]] = {}
    size = queries.session.layout.size
    for what, value in given.items():
        if isinstance(value, str | StoredVector):
            names[what] = value if isinstance(value, str) else value.name
        elif value is not None:
            found = queries.operand(value)
            shapes[what] = (
                found,
                (size,) if found.columns is None else (found.columns, size),
            )
    if "b" in shapes and "x0" in shapes:
        _check_alike(shapes["b"][0], shapes["x0"][0])
    return names, shapes


def _check_alike(b: Operand, x0: Operand) -> None:
    if x0.columns != b.columns:
        msg = f"x0 has {x0.columns} columns and b has {b.columns}; they must be alike"
        raise InvalidVector(msg, columns=x0.columns)
