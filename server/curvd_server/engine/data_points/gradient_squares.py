"""Sums of the squares of single data points' gradients: an exact diagonal, of ``J^T J``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvd.contract import Stop
from curvd.contract.query_options.data_points import GradientSquaresOptions
from curvd_server.engine.data_points.gradients import TOGETHER, Gradients
from curvd_server.engine.data_points.points import Part, Points
from curvd_server.engine.objective import Batch
from curvd_server.linalg import Definition, Query, Room


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSquaresResult:
    """Sums over data points."""

    squares: Tensor
    """[P] of the squared elements of the gradients."""
    data_points: int
    """How many were summed over."""
    normaliser: float
    """What the objective divides by."""
    stopped: Stop


def gradient_squares(points: Points, *, rows: int) -> Query[GradientSquaresResult]:
    """Sum the squared elements of the gradients of the data points' losses.

    Args:
        points: The data points.
        rows: How many are differentiated together, each a vector of memory.

    Yields:
        Progress.

    Returns:
        The sums.
    """
    problem = points.problem
    gradients = Gradients(problem)
    total = torch.zeros(problem.layout.size, dtype=torch.float64, device=problem.device)

    def squares(batch: Batch) -> Tensor:
        # Over a part in the type of results, over parts in float64.
        return gradients.flat(batch).square().sum(0)

    def take(value: Tensor, part: Part) -> None:
        total.add_(value)

    stopped = yield from points.walk(squares, take, list(points.parts(rows)))
    return GradientSquaresResult(
        squares=total.to(problem.result_dtype),
        data_points=points.done,
        normaliser=problem.normaliser,
        stopped=stopped,
    )


def _rows(room: Room) -> int:
    return room.fitting(3, TOGETHER)  # a gradient, as one row, and its square


def _vectors(options: GradientSquaresOptions, room: Room) -> int:
    return 3 * _rows(room) + 4


def _begin(
    points: Points, options: GradientSquaresOptions, room: Room
) -> Query[GradientSquaresResult]:
    return gradient_squares(points, rows=_rows(room))


DEFINITION = Definition(
    options=GradientSquaresOptions,
    vectors=_vectors,
    begin=_begin,
    tensors=lambda result: {"squares": result.squares},
)
