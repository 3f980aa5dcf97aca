"""Gradients of queries, and scores of data points along solutions: what influence is made of.

The score of data point n for query q is ``g_q^T (A + damping I)^-1 g_n`` (Koh and Liang,
ICML 2017), with the gradients of their own losses: rows of two Jacobians, which stay here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvd.contract import JacobianOf, Stop
from curvd_server.engine.data_points.gradients import TOGETHER, Gradients
from curvd_server.engine.data_points.jacobian import Jacobian
from curvd_server.engine.data_points.jacobian_products import restore
from curvd_server.engine.data_points.points import Part, Points
from curvd_server.engine.objective import Batch, Problem
from curvd_server.linalg import Query, in_units


def gradients_of(
    points: Points, problem: Problem, rows: Sequence[int]
) -> Query[Tensor]:
    """Compute the gradients of some data points' losses.

    Args:
        points: The data points.
        problem: The same, as a function of the parameters in question.
        rows: Indices of data points, in any order.

    Yields:
        Progress.

    Returns:
        [m, P], in the order of the indices.
    """
    wanted = torch.tensor(rows, dtype=torch.int64)
    found = torch.empty(
        len(rows),
        problem.layout.size,
        dtype=problem.result_dtype,
        device=problem.device,
    )
    gradients = Gradients(problem)

    def compute(batch: Batch) -> Tensor:
        places = _places(wanted, batch.start, len(batch.targets))
        for some in places.split(TOGETHER):  # type: ignore[no-untyped-call]
            local = (wanted[some] - batch.start).to(batch.targets.device)
            inputs = tuple(t[local] for t in batch.inputs)
            picked = Batch(batch.start, inputs, batch.targets[local])
            found[some.to(found.device)] = gradients.flat(picked)
        return places

    parts = [
        part
        for part in points.parts(2**62)
        if len(_places(wanted, part.start, len(part)))
    ]
    yield from points.walk(compute, _forget, parts)
    return found


class Scores:
    """Scores of all data points along solutions, block after block of queries.

    Args:
        points: The data points.
        problem: The same, as a function of the parameters in question.
        rows: Data points of a part at most.
    """

    def __init__(self, points: Points, problem: Problem, rows: int) -> None:
        self._points, self._rows = points, rows
        # The way to multiply is chosen once, on the first block.
        self._jacobian = Jacobian(problem, JacobianOf.LOSSES)

    def along(self, X: Tensor) -> Query[Tensor]:
        """Compute ``X J^T``.

        Args:
            X: [m, P].

        Yields:
            Progress.

        Returns:
            [m, N], or of the first data points if it was stopped.

        Raises:
            ScaleOutOfRange: If those of a query are no numbers of their type.
        """
        found: list[Tensor] = []
        X, units = in_units(X)

        def push(batch: Batch) -> Tensor:
            return self._jacobian.push(batch, X)

        def take(value: Tensor, part: Part) -> None:
            found.append(value)

        parts = list(self._points.parts(self._rows))
        stopped = yield from self._points.walk(push, take, parts)
        assert stopped is Stop.CONVERGED  # such points have no limit
        scores = torch.cat(found).T.contiguous()
        restore(scores, units)
        return scores


def _places(wanted: Tensor, start: int, count: int) -> Tensor:
    """Find which of the indices lie in a mini-batch."""
    return ((wanted >= start) & (wanted < start + count)).nonzero().flatten()


def _forget(value: Tensor, part: Part) -> None:
    """Do nothing: the gradients are where they belong."""
