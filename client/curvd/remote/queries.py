"""Queries of an operator, blocking and asynchronous; see `curvd._calls.query_requests`."""

from __future__ import annotations

from typing import Any, TypeVar

from curvd._calls import OWN_TYPE, Answer, Observe, Queries, QueryCall
from curvd._transport import AsyncConnection, Connection
from curvd.contract import (
    DiagonalOptions,
    EigshOptions,
    FrobeniusNormOptions,
    LogDetOptions,
    SolveOptions,
    SpectralDensityOptions,
    StoredVector,
    TraceOptions,
)
from curvd.errors import InvalidSpec, InvalidVector
from curvd.remote.asking import asks, asks_about, awaited
from curvd.remote.progress import watched
from curvd.results import (
    Density,
    DiagonalEstimate,
    Eigenpairs,
    Estimate,
    LogDeterminant,
    Solution,
)
from curvd.tensors import Operand, vector_dtype

T = TypeVar("T")


class QueryMethods:
    """Whole computations that run on the server; a base of `curvd.RemoteOperator`.

    Results say what they cost (`products`), to which parameter `version` they belong
    and whether they `converged`. Leaving a call, by an exception or Ctrl-C, stops the
    work on the server; the latest progress is a note of the exception.
    """

    _connection: Connection
    _queries: Queries

    @asks(EigshOptions)
    def eigsh(self, options: EigshOptions) -> QueryCall[Eigenpairs]:
        """Compute extremal eigenpairs, each eigenvalue as often as it is repeated.

        A result has `converged` if the residuals have, and if a search in the complement
        of the pairs has shown that no copy of a wanted eigenvalue is missing; it
        overlooks one with a probability below 1e-4.

        Returns:
            The pairs, largest eigenvalue first; the best so far if it was stopped.

        Examples:
            >>> found = session.hessian().eigsh(k=3, tolerance=1e-6)
            >>> found.values.round(4)
            array([1.3995, 0.6971, 0.4593])
            >>> found.converged, found.vectors.shape
            (True, (43, 3))
            >>> bool(np.all(found.residuals <= found.tolerances))
            True
        """
        if options.store == "":
            msg = "stored vectors need a name, at least one character"
            raise InvalidSpec(msg, store=options.store)
        fetch = options.vectors and options.store is None

        def read(answer: Answer) -> Eigenpairs:
            return answer.result(
                Eigenpairs,
                vectors=answer.arrays["vectors"].T if fetch else None,
                stored=_stored(options.store, self._queries, answer),
            )

        nbytes = options.k * self._queries.column_bytes
        return self._queries.call(
            "Eigsh", options, read, max_bytes=nbytes, values_only=not fetch
        )

    @asks(TraceOptions)
    def trace(self, options: TraceOptions) -> QueryCall[Estimate]:
        """Estimate the trace.

        Returns:
            The trace with its error.

        Examples:
            >>> found = session.ggn().trace(samples=43)
            >>> exact = np.trace(session.ggn() @ np.eye(43))
            >>> low, high = found.interval
            >>> bool(low - 1e-9 <= exact <= high + 1e-9)
            True
        """
        return self._queries.call("Trace", options, _estimate)

    @asks(DiagonalOptions)
    def diagonal(self, options: DiagonalOptions) -> QueryCall[DiagonalEstimate]:
        """Estimate the diagonal.

        Returns:
            The diagonal [P] with its errors.

        Examples:
            >>> found = session.ggn().diagonal(samples=20)
            >>> found.values.shape, found.half_widths.shape, found.products
            ((43,), (43,), 20)
        """

        def read(answer: Answer) -> DiagonalEstimate:
            return answer.result(DiagonalEstimate, values=answer.arrays["diagonal"])

        nbytes = 2 * self._queries.column_bytes
        return self._queries.call("Diagonal", options, read, max_bytes=nbytes)

    @asks(FrobeniusNormOptions)
    def frobenius_norm(self, options: FrobeniusNormOptions) -> QueryCall[Estimate]:
        """Estimate the Frobenius norm.

        Returns:
            The norm with its error.

        Examples:
            >>> found = session.hessian().frobenius_norm(relative_error=0.05, samples=400)
            >>> found.standard_error <= 0.05 * found.value, found.converged
            (True, True)
        """
        return self._queries.call("FrobeniusNorm", options, _estimate)

    @asks(SpectralDensityOptions)
    def spectral_density(self, options: SpectralDensityOptions) -> QueryCall[Density]:
        """Estimate the density of eigenvalues.

        Returns:
            The density with its error.

        Examples:
            >>> found = session.hessian().spectral_density(probes=4, steps=20, points=200)
            >>> found.grid.shape, found.density.shape
            ((200,), (200,))
            >>> step = found.grid[1] - found.grid[0]
            >>> round(float(found.density.sum() * step), 2)
            1.0
        """

        def read(answer: Answer) -> Density:
            return answer.result(Density, logarithmic=options.logarithmic)

        nbytes = 8 * (4 * options.points + 2 * options.probes * options.steps)
        return self._queries.call("SpectralDensity", options, read, max_bytes=nbytes)

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

    @asks(LogDetOptions)
    def logdet(self, options: LogDetOptions) -> QueryCall[LogDeterminant]:
        """Estimate ``log det(A + damping * I)``.

        Returns:
            The number with its error; NaN, with the Ritz value that proves it, if the
            operator is not positive definite.

        Examples:
            >>> found = session.ggn().logdet(damping=1.0, probes=20, steps=20)
            >>> exact = np.linalg.slogdet(session.ggn(damping=1.0) @ np.eye(43)).logabsdet
            >>> bool(abs(found.value - exact) <= found.half_width)
            True
            >>> session.hessian().logdet().value, session.hessian().logdet().smallest < 0
            (nan, True)
        """
        return self._queries.call(
            "LogDet", options, lambda answer: answer.result(LogDeterminant)
        )

    def _ask(self, call: QueryCall[T], progress: Observe | bool) -> T:
        with call.explained(), watched(progress, call.rpc.name) as observe:
            call.observe = observe
            return self._connection.run(call)


class AsyncQueryMethods:
    """The same for asyncio; a base of `curvd.AsyncOperator`."""

    _connection: AsyncConnection
    _queries: Queries

    eigsh = awaited(QueryMethods.eigsh)
    trace = awaited(QueryMethods.trace)
    diagonal = awaited(QueryMethods.diagonal)
    frobenius_norm = awaited(QueryMethods.frobenius_norm)
    spectral_density = awaited(QueryMethods.spectral_density)
    solve = awaited(QueryMethods.solve)
    logdet = awaited(QueryMethods.logdet)

    async def _ask(self, call: QueryCall[T], progress: Observe | bool) -> T:
        with call.explained(), watched(progress, call.rpc.name) as observe:
            call.observe = observe
            return await self._connection.run(call)


def _estimate(answer: Answer) -> Estimate:
    return answer.result(Estimate)


def _stored(name: str | None, queries: Queries, answer: Answer) -> StoredVector | None:
    if name is None:
        return None
    layout, dtype = queries.session.layout, vector_dtype(queries.session.dtype)
    return StoredVector(
        name=name,
        shape=(len(answer.summary.values), layout.size),
        dtype=OWN_TYPE[dtype],
        version=answer.header.version,
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
