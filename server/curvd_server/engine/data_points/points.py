"""The data points of an objective, gone through a few at a time and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvd.contract import Mode, Stop
from curvd.errors import InvalidSpec
from curvd_server.engine.objective import (
    Batch,
    Problem,
    check_cancelled,
    on_host,
    rows_of,
)
from curvd_server.linalg import Progress, Query
from curvd_server.system import Poll

Compute = Callable[[Callable[[Poll], Any]], Any]
"""Runs a job on the device, in its turn, and returns what it returned."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some data points of one mini-batch, that follow one another."""

    batch: int
    """Index of the mini-batch."""
    rows: slice
    """In the mini-batch."""
    start: int
    """Index of the first in the data."""

    def __len__(self) -> int:
        """Count the data points, b."""
        count: int = self.rows.stop - self.rows.start
        return count


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

    def of(self, problem: Problem) -> Points:
        """Name the data points of another problem, asked in the same way.

        Args:
            problem: The objective.

        Returns:
            Its data points.
        """
        return Points(
            problem, compute=self._compute, limit=self._limit, expired=self._expired
        )

    def __len__(self) -> int:
        """Count the data points, N."""
        return sum(len(batch.targets) for batch in on_host(self.problem.data))

    def parts(self, rows: int) -> Iterator[Part]:
        """Cut the data, in order.

        Args:
            rows: Data points of a part at most.

        Yields:
            The parts.
        """
        first = 0
        for index, batch in enumerate(on_host(self.problem.data)):
            count = len(batch.targets)
            for start in range(0, count, rows):
                stop = min(start + rows, count)
                yield Part(index, slice(start, stop), first + start)
            first += count

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
        take: Callable[[Tensor, Part], None] = lambda value, part: found.append(value)  # noqa: E731
        stopped = yield from self.walk(function, take, list(self.parts(rows)))
        return torch.cat(found), stopped

    def walk(
        self,
        function: Callable[[Batch], Tensor],
        take: Callable[[Tensor, Part], None],
        parts: Sequence[Part],
    ) -> Query[Stop]:
        """Evaluate a function on parts of the data, on the device in its turn.

        Args:
            function: Maps the data points of a part to a value.
            take: Is given each value, and its part.
            parts: The parts in order; the first is evaluated in any case.

        Yields:
            Progress.

        Returns:
            Why it ended.
        """
        for number, whole in enumerate(parts):
            stop = self._refusal() if number else None
            if stop is not None:
                return stop
            part = self._allowed(whole)
            take(self._compute(self._job(function, part)), part)
            self.done += len(part)
            yield Progress(iteration=number + 1, products=self.done)
            if len(part) < len(whole):
                return Stop.PRODUCTS
        return Stop.CONVERGED

    def run(self, job: Callable[[Poll], Any]) -> Query[Any]:
        """Run a job on the device, in its turn; it counts no data points.

        Args:
            job: Takes what it polls for cancellation.

        Yields:
            Progress.

        Returns:
            What it returned.
        """
        yield Progress(iteration=0, products=self.done)
        return self._compute(job)

    def look(self, function: Callable[[Batch], Any]) -> Any:
        """Evaluate a function on the first data point, which does not count.

        Args:
            function: Maps one data point to anything.

        Returns:
            What it returned.
        """
        return self._compute(self._job(function, Part(0, slice(0, 1), 0)))

    def _job(
        self, function: Callable[[Batch], Any], part: Part
    ) -> Callable[[Poll], Any]:
        def job(cancelled: Poll) -> Any:
            check_cancelled(cancelled)
            return function(rows_of(self.problem.data[part.batch], part.rows))

        return job

    def _allowed(self, part: Part) -> Part:
        if self._limit is None or self._limit - self.done >= len(part):
            return part
        rows = slice(part.rows.start, part.rows.start + self._limit - self.done)
        return Part(part.batch, rows, part.start)

    def _refusal(self) -> Stop | None:
        if self._limit is not None and self.done >= self._limit:
            return Stop.PRODUCTS
        return Stop.TIME if self._expired() else None
