"""Norms of the gradients of single data points' losses, exact, some points at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvd.contract import Stop
from curvd.contract.query_options.data_points import GradientNormsOptions
from curvd_server.engine.data_points.gradients import TOGETHER, Gradients
from curvd_server.engine.data_points.points import Points
from curvd_server.engine.objective import Batch, Problem
from curvd_server.linalg import Definition, Query, Room, as_type, lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientNormsResult:
    """Norms of gradients, data point by data point."""

    norms: Tensor
    """[n], of the first ones if the query was stopped."""
    parameter_norms: Tensor | None
    """[n, T] of each parameter's part."""
    stopped: Stop


def gradient_norms(
    points: Points, *, rows: int, by_parameter: bool = False
) -> Query[GradientNormsResult]:
    """Compute the norm of the gradient of each data point's summed loss.

    Args:
        points: The data points.
        rows: How many are differentiated together, each a vector of memory.
        by_parameter: Whether to keep each parameter's part.

    Yields:
        Progress.

    Returns:
        The norms.

    Raises:
        ScaleOutOfRange: If the largest is no number of the type of results.
    """
    lengths_of = GradientLengths(points.problem)

    def kept(batch: Batch) -> Tensor:
        found = lengths_of(batch)
        return found if by_parameter else lengths(found)[:, None]

    found, stopped = yield from points.each(kept, rows)
    dtype = points.problem.result_dtype
    how = {
        "what": "the largest norm of a gradient",
        "remedy": "scale the loss by a power of two",
    }
    return GradientNormsResult(
        norms=as_type(lengths(found), dtype, **how),
        parameter_norms=as_type(found, dtype, **how) if by_parameter else None,
        stopped=stopped,
    )


class GradientLengths:
    """Maps data points to ``|dloss_n/dp|`` of each parameter p: [b, T], float64.

    Args:
        problem: The objective.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem, self._gradients = problem, Gradients(problem)

    @property
    def vectorised(self) -> bool | None:
        """Whether torch's vectorised gradients are right; None: not known yet."""
        return self._gradients.vectorised

    def __call__(self, batch: Batch) -> Tensor:
        """Measure the gradients of one part."""
        count, wide = len(batch.targets), self._problem.result_dtype
        rows = (g.reshape(count, -1).to(wide) for g in self._gradients(batch))
        return torch.stack([lengths(row) for row in rows], 1)


def _rows(room: Room) -> int:
    return room.fitting(2, TOGETHER)  # a gradient, and what it takes in its unit


def _vectors(options: GradientNormsOptions, room: Room) -> int:
    numbers = room.parameters if options.by_parameter else 1
    # In float64, as they are sent, and a copy on the way out.
    answer = 4 * room.data_points * numbers
    return 2 * _rows(room) + math.ceil(answer / room.size)


def _begin(
    points: Points, options: GradientNormsOptions, room: Room
) -> Query[GradientNormsResult]:
    return gradient_norms(points, rows=_rows(room), by_parameter=options.by_parameter)


def _tensors(result: GradientNormsResult) -> dict[str, Tensor]:
    if result.parameter_norms is None:
        return {"norms": result.norms}
    return {"norms": result.norms, "parameter_norms": result.parameter_norms}


DEFINITION = Definition(
    options=GradientNormsOptions,
    vectors=_vectors,
    begin=_begin,
    tensors=_tensors,
)
