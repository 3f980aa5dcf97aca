"""Queries of influence: where the gradients whose influence is asked for come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import Tensor

from curvd.errors import InvalidSpec
from curvd.v1 import query_service_pb2 as query_pb
from curvd_server.engine.data_points import Points
from curvd_server.engine.data_points.influence import gradients_of
from curvd_server.engine.objective import Problem, with_data
from curvd_server.linalg import Progress, Query
from curvd_server.service.given_points import named_as
from curvd_server.service.query_call import QueryCall
from curvd_server.sessions import Lease


class Queries(Protocol):
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


async def queries_of(
    call: QueryCall,
    header: query_pb.InfluenceHeader,
    points: Points,
    problem: Problem,
    tensors: Mapping[str, NDArray[Any]],
    other: Lease | None,
) -> Queries:
    """Choose where the gradients of the queries come from.

    Args:
        call: The call.
        header: What it names.
        points: The data points of its session.
        problem: The same, as a function of the operator's parameters.
        tensors: Data points that travelled.
        other: The session whose data points are the queries; None: there is none.

    Returns:
        The queries.

    Raises:
        InvalidSpec: If they are named twice or not at all, or do not fit the dataset.
    """
    _check_given(header, tensors)
    if other is not None:
        return _of_session(call, other)
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
    given: Problem = await call.drive(
        points.run(lambda cancelled: with_data(points.problem, named))
    )
    assert call.spec is not None
    own = given.restricted(call.spec)
    count = len(named[spec.target])
    return _DataQueries(call.points_beside(given), own, range(count))
