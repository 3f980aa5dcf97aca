"""Sums of the squares of single data points' gradients: an exact diagonal, of ``J^T J``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvd.contract import Stop
from curvd.contract.query_options.data_points import GradientSquaresOptions
from curvd_server.engine.data_points.gradients import TOGETHER, Gradients
from curvd_server.engine.data_points.points import Points
from curvd_server.engine.objective import Batch, Problem
from curvd_server.linalg import (
    Definition,
    Query,
    Room,
    Space,
    check_exponents,
    units_of,
)


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

    Raises:
        ScaleOutOfRange: If the largest is no number of the type of results.
    """
    problem = points.problem
    gradients, total = Gradients(problem), _Squares(problem)

    def add(batch: Batch) -> Tensor:
        total.add(gradients.flat(batch))
        return batch.targets

    stopped = yield from points.walk(
        add, lambda value, part: None, list(points.parts(rows))
    )
    return GradientSquaresResult(
        squares=total.found(),
        data_points=points.done,
        normaliser=problem.normaliser,
        stopped=stopped,
    )


class _Squares:
    """The sum while it is made, of gradients divided by a power of two.

    Args:
        problem: The objective.
    """

    def __init__(self, problem: Problem) -> None:
        size, self._dtype = problem.layout.size, problem.result_dtype
        self._sum = torch.zeros(size, dtype=torch.float64, device=problem.device)
        self._unit = 0.0

    def add(self, rows: Tensor) -> None:
        """Add the squares of some gradients.

        Args:
            rows: [b, P], whose memory is used.
        """
        own = (
            float(units_of(Space.of(rows).peaks(rows), rows.dtype).amax())
            if len(rows)
            else 0.0
        )
        if own > self._unit:
            self._sum *= (self._unit / own) ** 2
            self._unit = own
        # Over a part in the type of results, over parts in float64.
        self._sum += rows.div_(self._unit or 1.0).square_().sum(0)

    def found(self) -> Tensor:
        """Multiply back, in the type of results: [P]."""
        power = math.frexp(self._unit or 1.0)[1] - 1
        each = torch.tensor(power, device=self._sum.device)
        check_exponents(
            self._sum,
            2 * each,
            self._dtype,
            what="the largest sum of squares of gradients",
            remedy="scale the loss by a power of two",
        )
        return torch.ldexp(torch.ldexp(self._sum, each), each).to(self._dtype)


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
