"""Queries of an operator, blocking and asynchronous; see `curvd._calls.query_requests`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from curvd._calls import Observe, Queries, QueryCall
from curvd._transport import AsyncConnection, Connection
from curvd.contract import Estimator, Solver, StoredVector, Which
from curvd.remote.progress import watched
from curvd.results import (
    Density,
    DiagonalEstimate,
    Eigenpairs,
    Estimate,
    LogDeterminant,
    Solution,
)

T = TypeVar("T")
P = ParamSpec("P")


class QueryMethods:
    """Whole computations that run on the server; a base of `curvd.RemoteOperator`.

    Results say what they cost (`products`), to which parameter `version` they belong
    and whether they `converged`. Leaving a call, by an exception or Ctrl-C, stops the
    work on the server; the latest progress is a note of the exception.
    """

    _connection: Connection
    _queries: Queries

    def eigsh(
        self,
        k: int = 6,
        *,
        which: Which | str = Which.LARGEST,
        tolerance: float = 1e-6,
        basis_size: int = 0,
        seed: int = 0,
        warm_start: bool = False,
        vectors: bool = True,
        start: StoredVector | str | None = None,
        store: str | None = None,
        max_products: int | None = None,
        time_limit_s: float | None = None,
        progress: Observe | bool = False,
    ) -> Eigenpairs:
        """Compute extremal eigenpairs, each eigenvalue as often as it is repeated.

        A result has `converged` if the residuals have, and if a search in the complement
        of the pairs has shown that no copy of a wanted eigenvalue is missing; it
        overlooks one with a probability below 1e-4.

        Args:
            k: How many.
            which: ``largest``, ``smallest``, ``both`` or ``largest_magnitude``.
            tolerance: Residual relative to each eigenvalue's magnitude.
            basis_size: Vectors in the server's memory before a restart; 0: 2 k + 20,
                or as many small ones (256 at most) as fit 64 MiB.
            seed: Of the start vector.
            warm_start: Begin with what the last call of this kind found, at whatever
                version: it tracks the eigenpairs of changing parameters. What the start
                lacks is searched for, so this pays at tolerances of about 1e-3, or
                where the operator has moved by little more than the tolerance.
            vectors: Whether to fetch the eigenvectors; for values alone, False spares
                k vectors on the wire.
            start: Begin with vectors that the session stores, [P] or [s, P], instead;
                it pays where `warm_start` does.
            store: Keep the eigenvectors in the session under this name, and fetch none:
                for `start`, for products, or for ``session.get``.
            max_products: Stop after so many columns; None: the server's limit.
            time_limit_s: Start no product after so long; the result is the best so far.
            progress: Called with a `QueryProgress`; True draws a line on a terminal.

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
        call = self._queries.eigsh(
            k,
            which,
            tolerance,
            basis_size,
            seed,
            warm_start,
            vectors,
            start,
            store,
            max_products,
            time_limit_s,
        )
        return self._ask(call, progress)

    def trace(
        self,
        *,
        estimator: Estimator | str = Estimator.EXCHANGEABLE,
        relative_error: float = 0.0,
        absolute_error: float = 0.0,
        samples: int = 100,
        seed: int = 0,
        max_products: int | None = None,
        time_limit_s: float | None = None,
        progress: Observe | bool = False,
    ) -> Estimate:
        """Estimate the trace.

        Args:
            estimator: ``exchangeable`` (XTrace), ``hutch++`` or ``hutchinson``. The
                first two gain where eigenvalues decay, Hutch++ with a given number of
                samples and no error to stop at, as it divides them in advance.
            relative_error: Standard error at which to stop, relative; 0: never.
            absolute_error: Standard error at which to stop; 0: never.
            samples: Products at most.
            seed: Of the probes, see `curvd.tensors.random_probes`.
            max_products: Stop after so many columns; None: the server's limit.
            time_limit_s: Start no product after so long; the result is the best so far.
            progress: Called with a `QueryProgress`; True draws a line on a terminal.

        Returns:
            The trace with its error.

        Examples:
            >>> found = session.ggn().trace(samples=43)
            >>> exact = np.trace(session.ggn() @ np.eye(43))
            >>> low, high = found.interval
            >>> bool(low - 1e-9 <= exact <= high + 1e-9)
            True
        """
        call = self._queries.trace(
            estimator,
            relative_error,
            absolute_error,
            samples,
            seed,
            max_products,
            time_limit_s,
        )
        return self._ask(call, progress)

    def diagonal(
        self,
        *,
        estimator: Estimator | str = Estimator.EXCHANGEABLE,
        relative_error: float = 0.0,
        absolute_error: float = 0.0,
        samples: int = 100,
        seed: int = 0,
        max_products: int | None = None,
        time_limit_s: float | None = None,
        progress: Observe | bool = False,
    ) -> DiagonalEstimate:
        """Estimate the diagonal.

        Args:
            estimator: ``exchangeable`` (XDiag) or ``hutchinson``.
            relative_error: Stop when the norm of the errors is so small, relative to
                the diagonal's; 0: never.
            absolute_error: The same, absolute; 0: never.
            samples: Products at most.
            seed: Of the probes, see `curvd.tensors.random_probes`.
            max_products: Stop after so many columns; None: the server's limit.
            time_limit_s: Start no product after so long; the result is the best so far.
            progress: Called with a `QueryProgress`; True draws a line on a terminal.

        Returns:
            The diagonal [P] with its errors.

        Examples:
            >>> found = session.ggn().diagonal(samples=20)
            >>> found.values.shape, found.half_widths.shape, found.products
            ((43,), (43,), 20)
        """
        call = self._queries.diagonal(
            estimator,
            relative_error,
            absolute_error,
            samples,
            seed,
            max_products,
            time_limit_s,
        )
        return self._ask(call, progress)

    def frobenius_norm(
        self,
        *,
        relative_error: float = 0.0,
        absolute_error: float = 0.0,
        samples: int = 100,
        seed: int = 0,
        max_products: int | None = None,
        time_limit_s: float | None = None,
        progress: Observe | bool = False,
    ) -> Estimate:
        """Estimate the Frobenius norm.

        Args:
            relative_error: Standard error at which to stop, relative; 0: never.
            absolute_error: Standard error at which to stop; 0: never.
            samples: Products at most.
            seed: Of the probes, see `curvd.tensors.random_probes`.
            max_products: Stop after so many columns; None: the server's limit.
            time_limit_s: Start no product after so long; the result is the best so far.
            progress: Called with a `QueryProgress`; True draws a line on a terminal.

        Returns:
            The norm with its error.

        Examples:
            >>> found = session.hessian().frobenius_norm(relative_error=0.05, samples=400)
            >>> found.standard_error <= 0.05 * found.value, found.converged
            (True, True)
        """
        call = self._queries.frobenius_norm(
            relative_error,
            absolute_error,
            samples,
            seed,
            max_products,
            time_limit_s,
        )
        return self._ask(call, progress)

    def spectral_density(
        self,
        *,
        probes: int = 8,
        steps: int = 64,
        points: int = 512,
        width: float | None = None,
        logarithmic: bool = False,
        floor: float | None = None,
        seed: int = 0,
        max_products: int | None = None,
        time_limit_s: float | None = None,
        progress: Observe | bool = False,
    ) -> Density:
        """Estimate the density of eigenvalues.

        Args:
            probes: Random vectors that are averaged over.
            steps: Lanczos steps per probe, each one product: what they do not resolve
                is not in the error, so take many of them rather than many probes.
            points: Of the grid.
            width: Of the smoothing Gaussian; None: 1 % of the axis.
            logarithmic: Whether the axis is the logarithm of the magnitude.
            floor: Smallest magnitude on that axis; None: 1e-7 of the largest.
            seed: Of the probes.
            max_products: Stop after so many columns; None: the server's limit.
            time_limit_s: Start no product after so long; the result is the best so far.
            progress: Called with a `QueryProgress`; True draws a line on a terminal.

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
        call = self._queries.spectral_density(
            probes,
            steps,
            points,
            width,
            logarithmic,
            floor,
            seed,
            max_products,
            time_limit_s,
        )
        return self._ask(call, progress)

    def solve(
        self,
        b: Any,
        /,
        *,
        solver: Solver | str = Solver.CG,
        damping: float = 0.0,
        tolerance: float = 1e-6,
        x0: Any = None,
        preconditioner: Any = None,
        max_products: int | None = None,
        time_limit_s: float | None = None,
        progress: Observe | bool = False,
    ) -> Solution:
        """Solve ``(A + damping * I) x = b``.

        Args:
            b: [P] or [P, K], or per parameter; any layout that `@` takes.
            solver: ``cg``, or ``minres`` for indefinite operators.
            damping: Added to every eigenvalue, beside the operator's own.
            tolerance: Residual relative to ``|b|``.
            x0: First guess, like b.
            preconditioner: CG: the diagonal of the damped operator, positive [P]. It
                pays where parameters have scales of their own, as with features in
                different units, and only if it is accurate; elsewhere it costs
                iterations.
            max_products: Stop after so many columns; None: the server's limit.
            time_limit_s: Start no product after so long; the result is the best so far.
            progress: Called with a `QueryProgress`; True draws a line on a terminal.

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
        call = self._queries.solve(
            b,
            solver,
            damping,
            tolerance,
            x0,
            preconditioner,
            max_products,
            time_limit_s,
        )
        return self._ask(call, progress)

    def logdet(
        self,
        *,
        damping: float = 0.0,
        steps: int = 32,
        relative_error: float = 0.0,
        absolute_error: float = 0.0,
        probes: int = 30,
        seed: int = 0,
        max_products: int | None = None,
        time_limit_s: float | None = None,
        progress: Observe | bool = False,
    ) -> LogDeterminant:
        """Estimate ``log det(A + damping * I)``.

        Args:
            damping: Added to every eigenvalue, beside the operator's own.
            steps: Lanczos steps per probe, each one product.
            relative_error: Standard error at which to stop, relative; 0: never.
            absolute_error: Standard error at which to stop; 0: never.
            probes: Random vectors at most.
            seed: Of the probes.
            max_products: Stop after so many columns; None: the server's limit.
            time_limit_s: Start no product after so long; the result is the best so far.
            progress: Called with a `QueryProgress`; True draws a line on a terminal.

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
        call = self._queries.logdet(
            damping,
            steps,
            relative_error,
            absolute_error,
            probes,
            seed,
            max_products,
            time_limit_s,
        )
        return self._ask(call, progress)

    def _ask(self, call: QueryCall[T], progress: Observe | bool) -> T:
        with call.explained(), watched(progress, call.rpc.name) as observe:
            call.observe = observe
            return self._connection.run(call)


def _awaited(
    method: Callable[Concatenate[QueryMethods, P], T],
) -> Callable[Concatenate[AsyncQueryMethods, P], Coroutine[Any, Any, T]]:
    """Make the asyncio twin of a method: the same, but that `_ask` is to be awaited."""

    async def twin(self: AsyncQueryMethods, /, *args: P.args, **options: P.kwargs) -> T:
        asking: Any = method(self, *args, **options)  # type: ignore[arg-type]
        result: T = await asking
        return result

    functools.update_wrapper(twin, method)
    return twin


class AsyncQueryMethods:
    """The same for asyncio; a base of `curvd.AsyncOperator`."""

    _connection: AsyncConnection
    _queries: Queries

    eigsh = _awaited(QueryMethods.eigsh)
    trace = _awaited(QueryMethods.trace)
    diagonal = _awaited(QueryMethods.diagonal)
    frobenius_norm = _awaited(QueryMethods.frobenius_norm)
    spectral_density = _awaited(QueryMethods.spectral_density)
    solve = _awaited(QueryMethods.solve)
    logdet = _awaited(QueryMethods.logdet)

    async def _ask(self, call: QueryCall[T], progress: Observe | bool) -> T:
        with call.explained(), watched(progress, call.rpc.name) as observe:
            call.observe = observe
            return await self._connection.run(call)
