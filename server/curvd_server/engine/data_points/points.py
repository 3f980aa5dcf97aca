"""The data points of an objective, gone through a few at a time and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvd.contract import Mode, Stop
from curvd.errors import InvalidSpec
from curvd_server.engine.objective import Batch, Problem, check_cancelled, rows_of
from curvd_server.linalg import Progress, Query
from curvd_server.system import Poll

Compute = Callable[[Callable[[Poll], Any]], Any]
"""Runs a job on the device, in its turn, and returns what it returned."""


class Points:
    """What a query about data points asks.

    Args:
        problem: The objective.
        compute: Runs a job on the device, in its turn.
        limit: Most data points; None: all.
        expired: Whether the time is up; asked between jobs.

    Raises:
        InvalidSpec: If a data point's loss depends on others of its mini-batch.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        compute: Compute,
        limit: int | None = None,
        expired: Callable[[], bool] = lambda: False,
    ) -> None:
        if problem.mode is Mode.BATCH_STATISTICS:
            msg = (
                "mode is batch_statistics: the loss of a data point depends on the others "
                "of its mini-batch, so it has no gradient of its own; make a session with "
                "mode='eval'"
            )
            raise InvalidSpec(msg, mode=problem.mode)
        self.problem, self.done = problem, 0
        self._compute, self._limit, self._expired = compute, limit, expired

    def each(
        self, function: Callable[[Batch], Tensor], rows: int
    ) -> Query[tuple[Tensor, Stop]]:
        """Evaluate a function on the data points in order; the first ones in any case.

        Args:
            function: Maps data points, at most `rows` of one mini-batch, to [b, ...].
            rows: How many together.

        Yields:
            Progress.

        Returns:
            The values of all that were allowed, [n, ...], and why there are no more.
        """
        found: list[Tensor] = []
        for index in range(self.problem.batches):
            start, total = 0, 1
            while start < total:
                stop = self._refusal() if found else None
                if stop is not None:
                    return torch.cat(found), stop
                part = slice(start, start + self._allowed(rows))
                value, total = self._compute(self._job(function, index, part))
                found.append(value)
                start += len(value)
                self.done += len(value)
                yield Progress(iteration=len(found), products=self.done)
        return torch.cat(found), Stop.CONVERGED

    def _job(
        self, function: Callable[[Batch], Tensor], index: int, part: slice
    ) -> Callable[[Poll], tuple[Tensor, int]]:
        def job(cancelled: Poll) -> tuple[Tensor, int]:
            check_cancelled(cancelled)
            batch = self.problem.data[index]
            return function(rows_of(batch, part)), len(batch.targets)

        return job

    def _allowed(self, rows: int) -> int:
        return rows if self._limit is None else min(rows, self._limit - self.done)

    def _refusal(self) -> Stop | None:
        if self._limit is not None and self.done >= self._limit:
            return Stop.PRODUCTS
        return Stop.TIME if self._expired() else None
