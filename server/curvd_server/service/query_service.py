"""QueryService: whole computations on an operator, with progress."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import structlog

from curvd.contract import (
    DiagonalOptions,
    EigshOptions,
    Estimator,
    FrobeniusNormOptions,
    LogDetOptions,
    Part,
    QueryOptions,
    SolveOptions,
    Solver,
    SpectralDensityOptions,
    TraceOptions,
    Which,
    convert,
    convert_enums,
    query_messages,
)
from curvd.v1 import query_service_pb2 as query_pb
from curvd_server.config import LimitsConfig
from curvd_server.device import Batcher
from curvd_server.linalg import (
    EigshResult,
    SolveResult,
    default_basis,
    diagonal,
    eigsh,
    frobenius_norm,
    logdet,
    search_basis,
    solve,
    spectral_density,
    trace,
)
from curvd_server.service import query_validation as check
from curvd_server.service.query_call import QueryCall, to_numpy
from curvd_server.service.query_run import QueryRun, vectors_bytes
from curvd_server.service.streams import Send, opened
from curvd_server.service.warm_starts import WarmStarts
from curvd_server.sessions import SessionStore

R = TypeVar("R")

_QUERIES_AT_ONCE = 32
"""Threads that algorithms run in; they wait for the device most of the time."""
_PRODUCTS = 10_000
"""Columns that a query may multiply, unless it says otherwise."""


class QueryService:
    """One method per RPC.

    Args:
        sessions: The sessions of the server.
        batcher: The queue of their device.
        limits: The limits of the server.
    """

    def __init__(
        self, *, sessions: SessionStore, batcher: Batcher, limits: LimitsConfig
    ) -> None:
        self._sessions, self._batcher, self._limits = sessions, batcher, limits
        self._threads = concurrent.futures.ThreadPoolExecutor(
            _QUERIES_AT_ONCE, thread_name_prefix="query"
        )
        self._warm = WarmStarts(sessions, limits.stored_bytes)

    def close(self) -> None:
        """End the threads, once their queries are done."""
        self._threads.shutdown()

    async def eigsh(self, request: query_pb.EigshRequest, send: Send) -> None:
        """Compute extremal eigenpairs."""
        options = query_messages.read(EigshOptions, request)
        async with self._open("Eigsh", request.query, options, send) as call:
            size = call.run.products.size
            which = Which(options.which)
            k = check.between("k", options.k, 1, size)
            basis = check.basis_size(options.basis_size, k, size) or default_basis(
                k, size, call.run.products.vector_bytes
            )
            key = (request.query.session_id, call.spec, which)
            if options.store:
                call.lease.vectors.check_room(options.store, vectors_bytes(call.run, k))
            start = call.stored(request.start) if options.start else None
            if options.warm_start:
                check.one_start(options)
                start = self._warm.get(key)
            searching = search_basis(call.run.products.vector_bytes)
            call.reserve(
                basis + searching + 2 * k + (1 if start is None else len(start))
            )
            result: EigshResult = await call.drive(
                eigsh(
                    call.run.products,
                    k,
                    which=which,
                    tolerance=options.tolerance,
                    basis=basis,
                    start=start,
                    seed=options.seed,
                )
            )
            self._warm.put(key, result.vectors)
            cost = call.summary(result.stopped)
            if options.store:
                call.store(options.store, result.vectors)
            if not request.values_only:
                await call.send_tensors({"vectors": to_numpy(result.vectors)})
            await call.finish(
                query_pb.EigshSummary(
                    query=cost,
                    values=result.values,
                    residuals=result.residuals,
                    tolerances=result.tolerances,
                    asymmetry=result.asymmetry,
                    restarts=result.restarts,
                    warm=start is not None,
                )
            )

    async def trace(self, request: query_pb.TraceRequest, send: Send) -> None:
        """Estimate the trace."""
        options = query_messages.read(TraceOptions, request)
        async with self._open("Trace", request.query, options, send) as call:
            target = check.target(options, options.samples)
            block = call.block
            estimator = Estimator(options.estimator)
            call.reserve(check.vectors_of(estimator, target.samples, block))
            result = await call.drive(
                trace(
                    call.run.products,
                    estimator=estimator,
                    target=target,
                    seed=options.seed,
                    block=block,
                )
            )
            await call.finish(call.estimate(result))

    async def diagonal(self, request: query_pb.DiagonalRequest, send: Send) -> None:
        """Estimate the diagonal."""
        options = query_messages.read(DiagonalOptions, request)
        async with self._open("Diagonal", request.query, options, send) as call:
            target = check.target(options, options.samples)
            estimator = check.diagonal_estimator(Estimator(options.estimator))
            call.reserve(check.vectors_of(estimator, target.samples, call.block))
            result = await call.drive(
                diagonal(
                    call.run.products,
                    estimator=estimator,
                    target=target,
                    seed=options.seed,
                    block=call.block,
                )
            )
            cost = call.summary(result.stopped)
            await call.send_tensors({
                "diagonal": to_numpy(result.values),
                "standard_errors": to_numpy(result.standard_errors),
            })
            await call.finish(
                query_pb.DiagonalSummary(
                    query=cost,
                    samples=result.samples,
                    quantile=result.quantile,
                )
            )

    async def frobenius_norm(
        self, request: query_pb.FrobeniusNormRequest, send: Send
    ) -> None:
        """Estimate the Frobenius norm."""
        options = query_messages.read(FrobeniusNormOptions, request)
        async with self._open("FrobeniusNorm", request.query, options, send) as call:
            call.reserve(2 * call.block)
            result = await call.drive(
                frobenius_norm(
                    call.run.products,
                    target=check.target(options, options.samples),
                    seed=options.seed,
                    block=call.block,
                )
            )
            await call.finish(call.estimate(result))

    async def spectral_density(
        self, request: query_pb.SpectralDensityRequest, send: Send
    ) -> None:
        """Estimate the density of eigenvalues."""
        options = query_messages.read(SpectralDensityOptions, request)
        async with self._open("SpectralDensity", request.query, options, send) as call:
            steps = min(options.steps, call.run.products.size)
            block = call.krylov_block(steps, options.probes)
            call.reserve(block * (steps + 3))
            result = await call.drive(
                spectral_density(
                    call.run.products,
                    samples=options.probes,
                    steps=steps,
                    points=options.points,
                    width=options.width,
                    logarithmic=options.logarithmic,
                    floor=options.floor,
                    seed=options.seed,
                    block=block,
                )
            )
            cost = call.summary(result.stopped)
            await call.send_tensors({
                "grid": result.grid,
                "density": result.density,
                "standard_error": result.standard_error,
                "half_width": result.half_width,
                "nodes": result.nodes,
                "weights": result.weights,
            })
            await call.finish(
                query_pb.SpectralDensitySummary(query=cost, width=result.width)
            )

    async def solve(self, requests: AsyncIterator[Part], send: Send) -> None:
        """Solve linear systems."""
        header, chunks = await opened(requests)
        options = query_messages.read(SolveOptions, header)
        async with self._open("Solve", header.query, options, send) as call:
            solver = Solver(options.solver)
            tensors = await call.operands(chunks)
            given = tensors.get("preconditioner")
            check.solve(header, solver, given)
            b = call.tensor(tensors["b"])
            result: SolveResult = await call.drive(
                solve(
                    call.run.products,
                    b,
                    solver=solver,
                    damping=options.damping,
                    tolerance=options.tolerance,
                    start=call.tensor(tensors["x0"]) if "x0" in tensors else None,
                    preconditioner=None if given is None else call.tensor(given),
                )
            )
            cost = call.summary(result.stopped)
            await call.send_tensors({"x": to_numpy(result.solution)})
            await call.finish(
                query_pb.SolveSummary(
                    query=cost,
                    residuals=result.residuals,
                    relative_residuals=result.relative_residuals,
                    curvatures=result.curvatures,
                    indefinite=result.indefinite,
                    column_stops=map(convert_enums.stop_to_proto, result.column_stops),
                    iterations=result.iterations,
                )
            )

    async def log_det(self, request: query_pb.LogDetRequest, send: Send) -> None:
        """Estimate the logarithm of the determinant."""
        options = query_messages.read(LogDetOptions, request)
        async with self._open("LogDet", request.query, options, send) as call:
            steps = min(options.steps, call.run.products.size)
            block = call.krylov_block(steps, options.probes)
            call.reserve(block * (steps + 3))
            result = await call.drive(
                logdet(
                    call.run.products,
                    damping=options.damping,
                    steps=steps,
                    target=check.target(options, options.probes),
                    seed=options.seed,
                    block=block,
                )
            )
            await call.finish(
                query_pb.LogDetSummary(
                    estimate=call.estimate(result), smallest=result.smallest
                )
            )

    @contextlib.asynccontextmanager
    async def _open(
        self, name: str, query: query_pb.Query, options: QueryOptions, send: Send
    ) -> AsyncIterator[QueryCall]:
        """Lease the session and send the header."""
        structlog.contextvars.bind_contextvars(
            session=query.session_id, request_id=query.request_id
        )
        spec = convert.operator_from_proto(query.operator)
        expected = (
            query.expected_version if query.HasField("expected_version") else None
        )
        async with self._sessions.lease(
            query.session_id, operator=spec, expected_version=expected
        ) as lease:
            assert lease.operator is not None
            run: QueryRun[Any] = QueryRun(
                lease.operator,
                spec,
                batcher=self._batcher,
                threads=self._threads,
                max_products=options.max_products or _PRODUCTS,
                time_limit_s=options.time_limit_s,
            )
            with contextlib.ExitStack() as stack:
                call = QueryCall(
                    name, lease, spec, run, self._batcher, self._limits, stack, send
                )
                await call.begin()
                yield call
