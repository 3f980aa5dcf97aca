"""Products with the Jacobian of the losses or of the outputs, in both directions.

The rows belong to the data points, in their order: [N, P] of the losses, [N C, P] of the
outputs, whose C numbers per data point lie one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvd.contract import JacobianOf, OperatorSpec, Stop
from curvd_server.engine.data_points.gradients import TOGETHER
from curvd_server.engine.data_points.jacobian import Jacobian
from curvd_server.engine.data_points.points import Part, Points
from curvd_server.engine.objective import Batch, Problem
from curvd_server.linalg import (
    Progress,
    Query,
    Room,
    Space,
    in_units,
    multiply_by_powers,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JacobianProductResult:
    """A product with a Jacobian, or with its transpose."""

    result: Tensor
    """[K, n C], of the first n data points if it was stopped; or, transposed, [K, P], a sum
    over all data points, NaN if it was stopped."""
    row_shape: tuple[int, ...]
    """Of the outputs of a data point; empty for losses."""
    plan: str
    """The way that was the fastest."""
    stopped: Stop


@dataclass(frozen=True, slots=True)
class Rows:
    """Which Jacobian: of what, in which parameters, and the shape of a data point's."""

    problem: Problem
    of: JacobianOf
    shape: tuple[int, ...]

    @property
    def each(self) -> int:
        """C, the rows of one data point."""
        return math.prod(self.shape)


def rows_of_points(
    points: Points, of: JacobianOf, parameters: Sequence[str] | None
) -> Query[Rows]:
    """Find out what the rows of a Jacobian look like, from one data point.

    Args:
        points: The data points.
        of: Of what.
        parameters: Names of the parameters that it is in, in order; None: all.

    Returns:
        The rows.

    Raises:
        InvalidSpec: If a name is unknown.
    """
    spec = OperatorSpec(parameters=None if parameters is None else tuple(parameters))
    problem = points.problem.restricted(spec)
    jacobian = Jacobian(problem, of)
    yield Progress(iteration=0, products=0)
    return Rows(problem, of, points.look(jacobian.outputs_shape))


def jacobian_product(
    points: Points, which: Rows, operand: Tensor, *, transposed: bool, rows: int
) -> Query[JacobianProductResult]:
    """Multiply with a Jacobian, a part of the data after the other.

    Args:
        points: The data points.
        which: The Jacobian.
        operand: [K, P] or, transposed, [K, N C].
        transposed: Whether to multiply with the transpose.
        rows: Data points of a part at most.

    Yields:
        Progress.

    Returns:
        The product; of columns of any size.

    Raises:
        ScaleOutOfRange: If it is no number of its type.
    """
    jacobian = Jacobian(which.problem, which.of)
    parts = list(points.parts(rows))
    if not len(operand):
        width = which.problem.layout.size if transposed else len(points) * which.each
        empty = operand.new_zeros(0, width)
        return _result(empty, which, "none", Stop.CONVERGED)
    operand, units = in_units(operand)
    if transposed:
        product = _Transposed(jacobian, which, operand)
        stopped = yield from points.walk(product.of_part, product.take, parts)
        if stopped is Stop.CONVERGED:
            restore(product.total, units)
        else:
            product.total.fill_(math.nan)  # a part of the sum looks like the sum
        return _result(product.total, which, jacobian.plans["pull"], stopped)
    found: list[Tensor] = []

    def push(batch: Batch) -> Tensor:
        return jacobian.push(batch, operand)

    def take(value: Tensor, part: Part) -> None:
        found.append(value)

    stopped = yield from points.walk(push, take, parts)
    pushed = torch.cat(found).movedim(1, 0).reshape(len(operand), -1)
    restore(pushed, units)
    return _result(pushed, which, jacobian.plans["push"], stopped)


def restore(product: Tensor, units: Tensor) -> None:
    """Multiply products of columns in their units back, in place.

    Args:
        product: [K, L].
        units: [K], see `in_units`.

    Raises:
        ScaleOutOfRange: If they are no numbers of their type.
    """
    if (units == 1).all():
        return
    multiply_by_powers(
        product,
        units,
        Space.of(product).peaks(product),
        what="the product of column {row} with the Jacobian",
        remedy="multiply ({factor} * v)",
    )


class _Transposed:
    """Adds the parts of ``J^T w`` up.

    Args:
        jacobian: The rows.
        which: What they are.
        operand: [K, N C].
    """

    def __init__(self, jacobian: Jacobian, which: Rows, operand: Tensor) -> None:
        self._jacobian = jacobian
        self._weights = operand.reshape(len(operand), -1, *which.shape).movedim(1, 0)
        size = which.problem.layout.size
        self.total = operand.new_zeros(len(operand), size)

    def of_part(self, batch: Batch) -> Tensor:
        """Multiply with the rows of some data points: [K, P]."""
        stop = batch.start + len(batch.targets)
        return self._jacobian.pull(batch, self._weights[batch.start : stop])

    def take(self, value: Tensor, part: Part) -> None:
        """Add a part."""
        self.total += value


def _result(
    result: Tensor, which: Rows, plan: str, stopped: Stop
) -> JacobianProductResult:
    return JacobianProductResult(
        result=result, row_shape=which.shape, plan=plan, stopped=stopped
    )


def together(room: Room) -> int:
    """Count the data points of a part: each may take a gradient, and half as much again."""
    return room.fitting(2, TOGETHER)
