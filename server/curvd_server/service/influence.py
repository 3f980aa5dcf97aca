"""Influence: gradients of queries, systems, and one pass over the data for each block."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvd.contract import InfluenceOptions, Stop, Tier, convert_enums
from curvd.errors import InvalidSpec, InvalidVector
from curvd.tensors import chunks as wire
from curvd.tensors import safetensors_header
from curvd.v1 import query_service_pb2 as query_pb
from curvd_server.device.torch_device import TorchOperator
from curvd_server.engine import operator as engine
from curvd_server.engine.data_points import Points
from curvd_server.engine.data_points.influence import Scores, gradients_of
from curvd_server.engine.data_points.jacobian_products import together
from curvd_server.engine.objective import Problem, part_of, with_data
from curvd_server.linalg import LowRank, Products, Progress, Query, SolveResult, solve
from curvd_server.service.given_points import named_as, received
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
    groups = _groups(tensors.pop("groups", None), call.data_points, options)
    if other is None:
        queries = await _queries(call, header, points, problem, tensors)
    else:
        _check_given(header, tensors)
        queries = _of_session(call, other)
    count = len(queries)
    block = min(call.together(count, options.block), _fitting(call.data_points))
    call.reserve(_OF_QUERY * block + 11 * block + 2 * together(call))
    call.reserve_bytes(2 * 8 * block * call.data_points)
    products, used = await _products(call, points, options)
    known = call.known(options.preconditioner) if options.preconditioner else None
    solver = _Solver(call, products, options, known, block)
    scores = Scores(points, problem, together(call))
    sink = _sink(call, options, groups, count)
    await sink.begin()
    for start in range(0, count, block):
        rows = range(start, min(start + block, count))
        if solver.stopped is not None:
            solver.skip(len(rows))
            await sink.skip(len(rows))
            continue
        call.begin_part(start / count, rows.stop / count, tolerance=options.tolerance)
        gradients = await call.drive(queries.gradients(rows))
        solutions = await solver.solve(gradients)
        if not options.self_only:
            await sink.take(await call.drive(scores.along(solutions)))
    await sink.end()
    await call.finish(solver.summary(problem.normaliser, used))


def _fitting(data_points: int) -> int:
    return max(1, _BLOCK_BYTES // (8 * data_points))


# --- queries -------------------------------------------------------------------------


class _Queries(Protocol):
    """Where the gradients of queries come from."""

    def __len__(self) -> int:
        """Count the queries, M."""

    def gradients(self, rows: range) -> Query[Tensor]:
        """Compute the gradients of some queries: [m, P]."""


@dataclass(frozen=True, slots=True)
class _DataQueries:
    """Losses of data points."""

    points: Points
    problem: Problem
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def gradients(self, rows: range) -> Query[Tensor]:
        return gradients_of(
            self.points, self.problem, self.rows[rows.start : rows.stop]
        )


@dataclass(frozen=True, slots=True)
class _StoredQueries:
    """Vectors that the session stores."""

    vectors: Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    def gradients(self, rows: range) -> Query[Tensor]:
        yield Progress(iteration=0, products=0)
        return self.vectors[rows.start : rows.stop]


def _check_given(
    header: query_pb.InfluenceHeader, tensors: Mapping[str, NDArray[Any]]
) -> None:
    """Refuse queries that are named twice, or not at all."""
    ways = {
        "data points": bool(tensors),
        "rows": bool(header.rows),
        "all_rows": header.all_rows,
        "stored": bool(header.stored),
        "other_session_id": bool(header.other_session_id),
    }
    given = [way for way, is_given in ways.items() if is_given]
    if len(given) != 1:
        msg = (
            "queries are either data points, or rows or all_rows of the session, or those "
            f"of another, or stored vectors, got {' and '.join(given) or 'none of them'}"
        )
        raise InvalidSpec(msg, given=", ".join(given))


def _of_session(call: QueryCall, other: Lease) -> _DataQueries:
    """Take all data points of another session that has the same parameters."""
    mine, theirs = call.lease.info, other.info
    if (mine.model_id, mine.parameters_digest) != (
        theirs.model_id,
        theirs.parameters_digest,
    ):
        msg = (
            f"session {theirs.id} has other parameters than session {mine.id}, or is at "
            "another version: make it by on(), which shares them"
        )
        raise InvalidSpec(msg, session=theirs.id)
    points = call.points_beside(lease=other)
    assert call.spec is not None
    problem = points.problem.restricted(call.spec)
    return _DataQueries(points, problem, range(theirs.data_points))


async def _queries(
    call: QueryCall,
    header: query_pb.InfluenceHeader,
    points: Points,
    problem: Problem,
    tensors: Mapping[str, NDArray[Any]],
) -> _Queries:
    """Choose where the gradients of the queries come from."""
    _check_given(header, tensors)
    if header.stored:
        return _StoredQueries(call.stored(header.stored))
    if header.all_rows:
        return _DataQueries(points, problem, range(call.data_points))
    if header.rows:
        rows = list(header.rows)
        if max(rows) >= call.data_points:
            msg = f"row {max(rows)} is beyond the session's {call.data_points} data points"
            raise InvalidSpec(msg, row=max(rows), data_points=call.data_points)
        return _DataQueries(points, problem, rows)
    spec = points.problem.model.data
    named = named_as((*spec.inputs, spec.target), tensors)
    other: Problem = await call.drive(
        points.run(lambda cancelled: with_data(points.problem, named))
    )
    assert call.spec is not None
    own = other.restricted(call.spec)
    count = len(named[spec.target])
    return _DataQueries(call.points_beside(other), own, range(count))


def _groups(
    array: NDArray[Any] | None, data_points: int, options: InfluenceOptions
) -> Tensor | None:
    """Judge which group each data point belongs to: [N]."""
    if array is None:
        return None
    if array.dtype != np.int64 or array.shape != (data_points,):
        msg = f"groups are I64 [{data_points}], got {array.dtype} {list(array.shape)}"
        raise InvalidVector(msg, data_points=data_points)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= data_points:
        msg = f"groups are numbered from 0 to {data_points - 1} at most, got {low} to {high}"
        raise InvalidVector(msg, low=low, high=high)
    if options.top or options.self_only:
        msg = (
            f"groups exclude top and self_only, got top {options.top}; drop one of them"
        )
        raise InvalidSpec(msg, top=options.top)
    return torch.from_numpy(array)


# --- systems -------------------------------------------------------------------------


async def _products(
    call: QueryCall, points: Points, options: InfluenceOptions
) -> tuple[Products, int]:
    """Find the map that is inverted, and how many data points it is made of."""
    if not options.part or options.part >= call.data_points:
        return call.products, call.data_points
    spec, share = call.spec, options.part / call.data_points
    assert spec is not None
    plain = dataclasses.replace(spec, scale=1.0, damping=0.0)
    budget = min(call.lease.info.budget_bytes, call.limits.pending_bytes // 8)
    budget = math.ceil(share * budget)
    call.reserve_bytes(budget)

    def build(cancelled: Poll) -> TorchOperator:
        few = part_of(points.problem, options.part, options.part_seed)
        built = engine.build(
            few, plain, budget_bytes=budget, tier=Tier.FIRST, cancelled=cancelled
        )
        return TorchOperator(built)

    operator: TorchOperator = await call.drive(points.run(build))
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

    async def solve(self, gradients: Tensor) -> Tensor:
        """Solve a block: [m, P]."""
        found: SolveResult = await self.call.drive(
            solve(
                self.products,
                gradients,
                damping=self.options.damping,
                tolerance=self.options.tolerance,
                preconditioner=self.known,
                block=self.block,
            )
        )
        self.residuals += found.residuals
        self.relative += found.relative_residuals
        self.stops += found.column_stops
        own = (found.solution.double() * gradients.double()).sum(1)
        self.own += own.tolist()
        if found.stopped in (Stop.PRODUCTS, Stop.TIME):
            self.stopped = found.stopped
        return found.solution

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


# --- answers -------------------------------------------------------------------------


class _Sink(Protocol):
    """Takes scores, a block of queries after the other."""

    async def begin(self) -> None:
        """Say what comes."""

    async def take(self, scores: Tensor) -> None:
        """Take those of the next queries: [m, N]."""

    async def skip(self, count: int) -> None:
        """Take note of queries that have none."""

    async def end(self) -> None:
        """Send what was not sent yet."""


def _sink(
    call: QueryCall, options: InfluenceOptions, groups: Tensor | None, count: int
) -> _Sink:
    if options.self_only:
        return _Nothing()
    if options.top:
        return _Extremes(call, min(options.top, call.data_points))
    return _Rows(call, groups, count)


class _Nothing:
    """Sends no scores."""

    async def begin(self) -> None:
        """Do nothing."""

    async def take(self, scores: Tensor) -> None:
        """Do nothing."""

    async def skip(self, count: int) -> None:
        """Do nothing."""

    async def end(self) -> None:
        """Do nothing."""


class _Rows:
    """Sends all scores, or their sums over groups, as they come: [M, N] or [M, G].

    Args:
        call: The call.
        groups: [N] The group of each data point; None: each is its own.
        count: M.
    """

    def __init__(self, call: QueryCall, groups: Tensor | None, count: int) -> None:
        self._call, self._groups = call, groups
        width = call.data_points if groups is None else int(groups.max()) + 1
        self._shape = (count, width)

    async def begin(self) -> None:
        """Send the header of the file."""
        header = {"scores": safetensors_header.TensorHeader("F32", self._shape, 0)}
        await self._call.send(memoryview(safetensors_header.dump_header(header)))

    async def take(self, scores: Tensor) -> None:
        """Send the next rows."""
        scores = scores.double().cpu()
        if self._groups is not None:
            sums = scores.new_zeros(len(scores), self._shape[1])
            scores = sums.index_add_(1, self._groups, scores)
        await self._send(scores.float().numpy())

    async def skip(self, count: int) -> None:
        """Send rows of NaN."""
        await self._send(np.full((count, self._shape[1]), np.nan, np.float32))

    async def end(self) -> None:
        """Do nothing: all was sent."""

    async def _send(self, rows: NDArray[np.float32]) -> None:
        for chunk in wire.pieces(wire.bytes_of(rows)):
            await self._call.send(chunk)


class _Extremes:
    """Keeps the k largest and the k smallest scores of each query.

    Args:
        call: The call.
        k: How many of either.
    """

    def __init__(self, call: QueryCall, k: int) -> None:
        self._call, self._k = call, k
        self._indices: list[NDArray[np.int64]] = []
        self._scores: list[NDArray[np.float32]] = []

    async def begin(self) -> None:
        """Do nothing: all is sent at the end."""

    async def take(self, scores: Tensor) -> None:
        """Keep the ends of the next rows."""
        ends = [scores.topk(self._k, largest=largest) for largest in (True, False)]
        self._indices.append(torch.stack([e.indices for e in ends], 1).cpu().numpy())
        values = torch.stack([e.values for e in ends], 1)
        self._scores.append(values.float().cpu().numpy())

    async def skip(self, count: int) -> None:
        """Keep rows without data points."""
        shape = (count, 2, self._k)
        self._indices.append(np.full(shape, -1, np.int64))
        self._scores.append(np.full(shape, np.nan, np.float32))

    async def end(self) -> None:
        """Send what was kept."""
        await self._call.send_tensors({
            "indices": np.concatenate(self._indices),
            "top_scores": np.concatenate(self._scores),
        })
