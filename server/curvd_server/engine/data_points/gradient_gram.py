"""Inner products of the gradients of single data points' losses: the Gram matrix ``J J^T``.

As many rows as fit are held, and the data is gone through once for all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvd.contract import Stop
from curvd.contract.query_options.data_points import GradientGramOptions
from curvd.errors import LimitExceeded
from curvd_server.engine.data_points.gradients import TOGETHER, Gradients
from curvd_server.engine.data_points.points import Part, Points
from curvd_server.engine.objective import Batch
from curvd_server.linalg import Definition, Query, Room, in_units, sized_products

_LARGEST_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientGramResult:
    """Inner products of gradients, data points in order."""

    gram: Tensor
    """[n, n] float64; of the first data points if the query was stopped."""
    stopped: Stop


def gradient_gram(points: Points, *, rows: int, held: int) -> Query[GradientGramResult]:
    """Compute the inner product of the gradients of each two data points' losses.

    Args:
        points: The data points.
        rows: How many are differentiated together, each a vector of memory.
        held: Gradients that may be kept, besides.

    Yields:
        Progress.

    Returns:
        The matrix.

    Raises:
        ScaleOutOfRange: If its largest element is no number of float64.
    """
    parts = list(points.parts(rows))
    gram = _Gram(Gradients(points.problem), sum(map(len, parts)))
    stopped, first = Stop.CONVERGED, 0
    while first < len(parts) and stopped is Stop.CONVERGED:
        last, count = first, 0
        while last < len(parts) and (last == first or count + len(parts[last]) <= held):
            count += len(parts[last])
            last += 1
        stopped = yield from points.walk(gram.hold, gram.take_held, parts[first:last])
        if stopped is Stop.CONVERGED and last < len(parts):
            stopped = yield from points.walk(gram.against, gram.take, parts[last:])
        gram.release(complete=stopped is Stop.CONVERGED)
        first = last
    return GradientGramResult(gram=gram.known(), stopped=stopped)


class _Gram:
    """The matrix while it is made.

    Args:
        gradients: Of single data points.
        count: N.
    """

    def __init__(self, gradients: Gradients, count: int) -> None:
        self._gradients = gradients
        self._matrix = torch.zeros(count, count, dtype=torch.float64)
        self._held: list[tuple[Tensor, Tensor]] = []
        self._start = self._stop = self._complete = 0

    def hold(self, batch: Batch) -> Tensor:
        """Keep the gradients of a part, and multiply with those that are kept."""
        rows = in_units(self._gradients.flat(batch))
        self._held.append(rows)
        return self._with_held(rows)

    def take_held(self, value: Tensor, part: Part) -> None:
        """Fill in the inner products among those that are kept."""
        stop = part.start + len(part)
        self._put(slice(self._start, stop), slice(part.start, stop), value)
        self._stop = stop

    def against(self, batch: Batch) -> Tensor:
        """Multiply the gradients of a part with those that are kept."""
        return self._with_held(in_units(self._gradients.flat(batch)))

    def take(self, value: Tensor, part: Part) -> None:
        """Fill in the inner products of a part with those that are kept."""
        columns = slice(part.start, part.start + len(part))
        self._put(slice(self._start, self._stop), columns, value)

    def release(self, *, complete: bool) -> None:
        """Forget what is kept; what follows in the data comes next."""
        if complete or not self._complete:
            self._complete = self._stop
        self._held.clear()
        self._start = self._stop

    def known(self) -> Tensor:
        """Cut off data points that not all products are known of."""
        return self._matrix[: self._complete, : self._complete].contiguous()

    def _with_held(self, rows: tuple[Tensor, Tensor]) -> Tensor:
        found = [
            sized_products(
                held,
                rows,
                what="the largest inner product of gradients",
                remedy="scale the loss by a power of two",
            )
            for held in self._held
        ]
        return torch.cat(found).cpu()

    def _put(self, rows: slice, columns: slice, value: Tensor) -> None:
        self._matrix[rows, columns] = value
        self._matrix[columns, rows] = value.T


def _rows(room: Room) -> int:
    return room.fitting(4, TOGETHER)  # half of what may be held goes to what is kept


def _held(room: Room) -> int:
    return max(_rows(room), room.fitting(2, room.data_points))


def _vectors(options: GradientGramOptions, room: Room) -> int:
    count = min(room.data_points, options.max_products or room.data_points)
    nbytes = 8 * count**2
    if nbytes > _LARGEST_BYTES:
        most = math.isqrt(_LARGEST_BYTES // 8)
        msg = (
            f"a Gram matrix of {count} data points has {nbytes} bytes; the limit is "
            f"{_LARGEST_BYTES}: ask for the first {most} at most (max_products), or "
            "multiply a few columns by jacobian_product"
        )
        raise LimitExceeded(msg, data_points=count, limit=most)
    answer = math.ceil(2 * count**2 / room.size)  # float64, and a copy on the way out
    return 2 * _rows(room) + min(count, _held(room)) + 2 * answer


def _begin(
    points: Points, options: GradientGramOptions, room: Room
) -> Query[GradientGramResult]:
    return gradient_gram(points, rows=_rows(room), held=_held(room))


DEFINITION = Definition(
    options=GradientGramOptions,
    vectors=_vectors,
    begin=_begin,
    tensors=lambda result: {"gram": result.gram},
)
