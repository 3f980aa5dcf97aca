"""QueryService: whole computations on an operator, with progress."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Any

import structlog
from numpy.typing import NDArray
from torch import Tensor

from curvd.contract import (
    QUERIES,
    EigshOptions,
    InfluenceOptions,
    JacobianProductOptions,
    MarginalLikelihoodOptions,
    Part,
    PosteriorSamplesOptions,
    PredictiveOptions,
    QueryOptions,
    SketchOptions,
    SolveOptions,
    Solver,
    Stage,
    Which,
    Work,
    convert_enums,
    most_products,
    query_messages,
)
from curvd.v1 import query_service_pb2 as query_pb
from curvd_server.config import LimitsConfig
from curvd_server.device import Batcher
from curvd_server.linalg import (
    Definition,
    EigshResult,
    LowRank,
    NystromResult,
    Query,
    SolveResult,
    default_basis,
    definitions_in,
    eigsh,
    joined,
    nystrom,
    search_basis,
    solve,
    solve_dampings,
)
from curvd_server.service import influence, jacobians, laplace, marginal_likelihood
from curvd_server.service import query_validation as check
from curvd_server.service.handlers import method_name
from curvd_server.service.query_call import QueryCall, to_numpy
from curvd_server.service.query_run import QueryRun, subject_of
from curvd_server.service.streams import Send, opened
from curvd_server.service.warm_starts import WarmStarts
from curvd_server.sessions import SessionStore
from curvd_server.system import Ongoing, calling, logger

_QUERIES_AT_ONCE = 32
"""Threads that algorithms run in; they wait for the device most of the time."""
_PATIENCE_S = 5.0
"""Within so long a query that was given up is expected to ask for something, and to end."""
_DEFINITIONS = {
    **definitions_in("curvd_server.linalg"),
    **definitions_in("curvd_server.engine.data_points"),
}


class QueryService:
    """A method for each RPC: written here if it needs more of a session than an operator.

    The others are the definitions that stand beside their algorithms.

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
        for rpc, query in QUERIES.items():
            if definition := _DEFINITIONS.get(query.options):
                answer = functools.partial(self._answer, rpc, definition)
                setattr(self, method_name(rpc), answer)

    def close(self) -> None:
        """End the threads, once their queries are done; those that are not are left."""
        ending = threading.Thread(target=self._threads.shutdown, daemon=True)
        ending.start()
        ending.join(_PATIENCE_S)
        if ending.is_alive():
            under_way = self._sessions.activities.under_way()
            logger().warning("queries do not end", work=list(under_way))

    async def eigsh(self, request: query_pb.EigshRequest, send: Send) -> None:
        """Compute extremal eigenpairs."""
        options = query_messages.read(EigshOptions, request)
        async with self._open("Eigsh", request.query, options, send) as call:
            size = call.products.size
            which = Which(options.which)
            k = check.between("k", options.k, 1, size)
            basis = check.basis_size(options.basis_size, k, size) or default_basis(
                k, size, call.products.vector_bytes
            )
            assert call.spec is not None
            key = (request.query.session_id, calling().name, call.spec, which)
            if options.store:
                call.lease.vectors.check_room(options.store, call.vectors_bytes(k))
            start = call.stored(request.start) if options.start else None
            if options.warm_start:
                check.one_start(options)
                start = self._warm.get(key)
            searching = search_basis(call.products.vector_bytes)
            call.reserve(
                basis + searching + 2 * k + (1 if start is None else len(start))
            )
            result: EigshResult = await call.drive(
                call.products.begin(
                    eigsh,
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
                call.store(options.store, result.vectors, result.values)
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

    async def solve(self, requests: AsyncIterator[Part], send: Send) -> None:
        """Solve linear systems."""
        header, chunks = await opened(requests)
        options = query_messages.read(SolveOptions, header)
        async with self._open("Solve", header.query, options, send) as call:
            names = {"b": header.b, "x0": header.x0}
            dampings = len(header.dampings)
            tensors = await call.operands(chunks, names, options.block, dampings)
            check.solve(header, Solver(options.solver), tensors)
            if options.store:
                nbytes = tensors["b"].nbytes * max(1, dampings)
                call.lease.vectors.check_room(options.store, nbytes)
            result = await call.drive(_systems(call, header, options, tensors))
            cost = call.summary(result.stopped)
            x, shape = result.solution, tensors["b"].shape
            if options.store:
                flat = dampings or len(shape) > 1
                call.store(
                    options.store,
                    x.reshape(-1, shape[-1]) if flat else x.reshape(shape),
                )
            else:
                shape = (dampings, *shape) if dampings else shape
                await call.send_tensors({"x": to_numpy(x.reshape(shape))})
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

    async def sketch(self, request: query_pb.SketchRequest, send: Send) -> None:
        """Sketch the largest eigenvalues, for later systems."""
        options = query_messages.read(SketchOptions, request)
        async with self._open(
            "Sketch", request.query, options, send, plain=True
        ) as call:
            asked = check.operator_of("Sketch", request.query)
            assert asked is not None
            rank = min(options.rank, call.size)
            call.lease.vectors.check_room(options.name, call.vectors_bytes(rank))
            call.reserve(4 * rank)  # probes and products; factors and vectors
            call.products.scale_free = True  # scale and damping are left out
            result: NystromResult = await call.drive(
                call.products.begin(
                    nystrom,
                    rank,
                    # That of the systems to come, in the scale of the sketch.
                    damping=max(0.0, options.damping + asked.damping)
                    / (abs(asked.scale) or 1.0),
                    columns=options.columns or None,
                    tolerance=options.tolerance,
                    seed=options.seed,
                )
            )
            check.semidefinite(result, call.spec)
            sketch, cost = result.sketch, call.summary(result.stopped)
            call.store(options.name, sketch.vectors, sketch.values.tolist())
            await call.finish(
                query_pb.SketchSummary(query=cost, values=sketch.values.tolist())
            )

    async def jacobian_product(self, requests: AsyncIterator[Part], send: Send) -> None:
        """Multiply with a Jacobian of the data points."""
        header, chunks = await opened(requests)
        options = query_messages.read(JacobianProductOptions, header)
        async with self._open("JacobianProduct", header.query, options, send) as call:
            await jacobians.answer(call, header, options, chunks)

    async def influence(self, requests: AsyncIterator[Part], send: Send) -> None:
        """Compute the influence of data points on queries."""
        header, chunks = await opened(requests)
        options = query_messages.read(InfluenceOptions, header)
        async with (
            self._open("Influence", header.query, options, send) as call,
            contextlib.AsyncExitStack() as stack,
        ):
            other = None
            if header.other_session_id:
                lease = self._sessions.lease(header.other_session_id)
                other = await stack.enter_async_context(lease)
            await influence.answer(call, header, options, chunks, other)

    async def predictive(self, requests: AsyncIterator[Part], send: Send) -> None:
        """Compute variances of predictions."""
        header, chunks = await opened(requests)
        options = query_messages.read(PredictiveOptions, header)
        async with self._open("Predictive", header.query, options, send) as call:
            await laplace.predictive(call, header, options, chunks)

    async def posterior_samples(
        self, request: query_pb.PosteriorSamplesRequest, send: Send
    ) -> None:
        """Draw from a posterior."""
        options = query_messages.read(PosteriorSamplesOptions, request)
        async with self._open("PosteriorSamples", request.query, options, send) as call:
            await laplace.samples(call, request, options)

    async def marginal_likelihood(
        self, request: query_pb.MarginalLikelihoodRequest, send: Send
    ) -> None:
        """Compute marginal likelihoods."""
        options = query_messages.read(MarginalLikelihoodOptions, request)
        async with self._open(
            "MarginalLikelihood", request.query, options, send
        ) as call:
            await marginal_likelihood.compute(call, request, options)

    async def _answer(
        self, rpc: str, definition: Definition[Any, Any, Any], request: Any, send: Send
    ) -> None:
        """Answer a query that is all algorithm."""
        options = query_messages.read(definition.options, request)
        async with self._open(rpc, request.query, options, send) as call:
            call.reserve(definition.vectors(options, call))
            query = definition.begin(call.run.subject, options, call)
            result = await call.drive(query)
            await call.answer(result, definition.tensors(result))

    @contextlib.asynccontextmanager
    async def _open(
        self,
        name: str,
        query: query_pb.Query,
        options: QueryOptions,
        send: Send,
        *,
        plain: bool = False,
    ) -> AsyncIterator[QueryCall]:
        """Lease the session and send the header.

        Args:
            name: The name of the RPC.
            query: What the request names.
            options: The options of the query.
            send: Sends one part.
            plain: Whether the operator's scale and damping are left out.

        Yields:
            The call.
        """
        structlog.contextvars.bind_contextvars(
            session=query.session_id, request_id=query.request_id
        )
        spec = check.operator_of(name, query)
        if plain and spec is not None:
            spec = dataclasses.replace(spec, scale=1.0, damping=0.0)
        expected = (
            query.expected_version if query.HasField("expected_version") else None
        )
        async with self._sessions.lease(
            query.session_id, operator=spec, expected_version=expected
        ) as lease:
            run = QueryRun(
                batcher=self._batcher,
                threads=self._threads,
                time_limit_s=options.time_limit_s,
                lease=lease,
            )
            with contextlib.closing(run):
                run.subject = subject_of(run, lease, spec, options.max_products)
                info = lease.info
                run.ongoing = Ongoing(
                    Work.QUERY,
                    name,
                    session=lambda: (info.id, info.name),
                    activities=self._sessions.activities,
                )
                most = most_products(name, options, info.data_points)
                run.ongoing.enter(Stage.MULTIPLYING, total=most)
                with run.ongoing, contextlib.ExitStack() as stack:
                    call = QueryCall(
                        name, lease, spec, run, self._batcher, self._limits, stack, send
                    )
                    await call.begin()
                    yield call


def _systems(
    call: QueryCall,
    header: query_pb.SolveHeader,
    options: SolveOptions,
    tensors: Mapping[str, NDArray[Any]],
) -> Query[SolveResult]:
    """Make the algorithm of Solve, not begun.

    Args:
        call: The call.
        header: What is to be solved.
        options: The options in it.
        tensors: The operands, by what they are.

    Returns:
        The algorithm; it returns the solutions, of several dampings damping by damping.
    """
    B = call.columns(tensors["b"])
    together = call.together(len(B), options.block)
    if header.dampings:
        return joined(
            call.products.begin(
                solve_dampings,
                B,
                tuple(header.dampings),
                tolerance=options.tolerance,
                block=together,
            )
        )
    known: Tensor | LowRank | None = None
    if header.preconditioner:
        known = call.known(header.preconditioner)
    elif "preconditioner" in tensors:
        known = call.tensor(tensors["preconditioner"])
    return call.products.begin(
        solve,
        B,
        solver=Solver(options.solver),
        damping=options.damping,
        tolerance=options.tolerance,
        start=call.columns(tensors["x0"]) if "x0" in tensors else None,
        preconditioner=known,
        block=together,
    )
