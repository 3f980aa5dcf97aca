"""Influence: gradients of queries, systems, and one pass over the data for each block."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from torch import Tensor

from curvd.contract import InfluenceOptions, Stop, Tier, convert_enums
from curvd.v1 import query_service_pb2 as query_pb
from curvd_server.device.factored import FactoredOperator, SharedFactors
from curvd_server.device.torch_operator import TorchOperator
from curvd_server.engine import building
from curvd_server.engine.data_points import Points
from curvd_server.engine.data_points.influence import Scores
from curvd_server.engine.data_points.jacobian_products import together
from curvd_server.engine.objective import part_of
from curvd_server.linalg import LowRank, Products, SolveResult, solve
from curvd_server.service.given_points import received
from curvd_server.service.influence_queries import queries_of
from curvd_server.service.influence_sinks import groups_of, sink_of
from curvd_server.service.query_call import QueryCall
from curvd_server.service.query_run import products_of
from curvd_server.service.streams import Chunks
from curvd_server.sessions import Lease
from curvd_server.system import Poll

_OF_QUERY = 4
"""Vectors that are held of a query beside its system: gradient, solution, and copies."""
_BLOCK_BYTES = 1 << 26
"""Scores that are held at once, unless one query has more."""


async def answer(
    call: QueryCall,
    header: query_pb.InfluenceHeader,
    options: InfluenceOptions,
    chunks: Chunks,
    other: Lease | None = None,
) -> None:
    """Compute the influence of data points on queries.

    Args:
        call: The call, about an operator.
        header: Whose influence.
        options: The options in it.
        chunks: The queries, if they travel, and groups.
        other: The session whose data points are the queries; None: there is none.

    Raises:
        InvalidSpec: If queries are named twice or not at all, or do not fit the dataset.
        InvalidVector: If a tensor is of another shape or type.
        LimitExceeded: If the queries do not fit.
    """
    assert call.spec is not None
    points = call.points_beside()
    problem = points.problem.restricted(call.spec)
    tensors = await received(call, chunks)
    groups = groups_of(tensors.pop("groups", None), call.data_points, options)
    queries = await queries_of(call, header, points, problem, tensors, other)
    count = len(queries)
    block = min(call.together(count, options.block), _fitting(call.data_points))
    call.reserve(_OF_QUERY * block + 11 * block + 2 * together(call))
    call.reserve_bytes(2 * 8 * block * call.data_points)
    products, used = await _products(call, points, options)
    known = call.known(options.preconditioner) if options.preconditioner else None
    solver = _Solver(call, products, options, known, block)
    scores = Scores(points, problem, together(call))
    sink = sink_of(call, options, groups, count)
    await sink.begin()
    for start in range(0, count, block):
        rows = range(start, min(start + block, count))
        if solver.stopped is not None:
            solver.skip(len(rows))
            await sink.skip(len(rows))
            continue
        call.begin_part(start / count, rows.stop / count, tolerance=options.tolerance)
        gradients = await call.drive(queries.gradients(rows))
        solutions, unknown = await solver.solve(gradients)
        if unknown.all():
            await sink.skip(len(rows))
        elif not options.self_only:
            found = await call.drive(scores.along(solutions))
            await sink.take(found, unknown.to(found.device))
    await sink.end()
    await call.finish(solver.summary(problem.normaliser, used))


def _fitting(data_points: int) -> int:
    return max(1, _BLOCK_BYTES // (8 * data_points))


async def _products(
    call: QueryCall, points: Points, options: InfluenceOptions
) -> tuple[Products, int]:
    """Find the map that is inverted, and how many data points it is made of."""
    if not options.part or options.part >= call.data_points:
        return call.products, call.data_points
    spec, share = call.spec, options.part / call.data_points
    assert spec is not None
    plain = dataclasses.replace(spec, scale=1.0, damping=0.0)
    budget = min(call.lease.info.budget_bytes, call.room_bytes)
    budget = math.ceil(share * budget)
    call.reserve_bytes(budget)

    def build(cancelled: Poll) -> TorchOperator | FactoredOperator:
        few = part_of(points.problem, options.part, options.part_seed)
        if plain.kind.is_factored:
            return SharedFactors().build(
                few, plain, budget_bytes=budget, cancelled=cancelled
            )
        built = building.build(
            few, plain, budget_bytes=budget, tier=Tier.FIRST, cancelled=cancelled
        )
        return TorchOperator(built)

    operator: TorchOperator | FactoredOperator = await call.drive(points.run(build))
    call.stack.callback(operator.close)
    limit = options.max_products
    products = products_of(call.run, operator, spec, limit)
    call.run.subject = products
    return products, options.part


@dataclass
class _Solver:
    """Solves the systems of queries, and remembers how true the solutions are."""

    call: QueryCall
    products: Products
    options: InfluenceOptions
    known: LowRank | None
    block: int
    stopped: Stop | None = None
    """Why no more systems are begun."""
    residuals: list[float] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)

    async def solve(self, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Solve a block: [m, P], and of which queries nothing is known, [m]."""
        found: SolveResult = await self.call.drive(
            self.products.begin(
                solve,
                gradients,
                damping=self.options.damping,
                tolerance=self.options.tolerance,
                preconditioner=self.known,
                block=self.block,
            )
        )
        unknown = found.unknown
        own = (found.solution.double() * gradients.double()).sum(1)
        for values, new in (
            (self.residuals, found.residuals),
            (self.relative, found.relative_residuals),
            (self.own, own.tolist()),
        ):
            known = zip(new, unknown.tolist(), strict=True)
            values += [math.nan if none else value for value, none in known]
        self.stops += found.column_stops
        if found.stopped in (Stop.PRODUCTS, Stop.TIME):
            self.stopped = found.stopped
        return found.solution, unknown

    def skip(self, count: int) -> None:
        """Note queries that are not begun."""
        assert self.stopped is not None
        for values in (self.residuals, self.relative, self.own):
            values += [math.nan] * count
        self.stops += [self.stopped] * count

    def summary(self, normaliser: float, used: int) -> query_pb.InfluenceSummary:
        """Say how true the solutions are, and what they took."""
        severity = list(Stop)
        worst = max(self.stops, key=severity.index, default=Stop.CONVERGED)
        return query_pb.InfluenceSummary(
            query=self.call.summary(worst),
            residuals=self.residuals,
            relative_residuals=self.relative,
            self_influence=self.own,
            column_stops=map(convert_enums.stop_to_proto, self.stops),
            normaliser=normaliser,
            data_points=used,
        )
