"""Linearisations of mini-batches, cached as far as a budget of memory goes."""

from __future__ import annotations

from dataclasses import dataclass

from curvd.contract import OperatorSpec
from curvd_server.engine.objective import Problem, on_host
from curvd_server.engine.operators import MODES, Linearisation, cached_bytes


@dataclass(slots=True)
class Counters:
    """Work that an operator has done so far; for tests and metrics."""

    linearisations: int = 0
    """Mini-batches linearised (forward and first backward)."""
    batch_products: int = 0
    """Mini-batches multiplied, each with one chunk of columns."""
    columns: int = 0
    """Columns returned."""


class LinearizationCache:
    """Linearises mini-batches, and keeps the first that fit a budget.

    Args:
        problem: The objective; what is computed in one step is one of its mini-batches.
        spec: The operator.
        mode: Name of the AD mode.
        budget_bytes: Memory for what is cached.
        counters: Where linearisations are counted.
        sizes: Bytes of each linearisation, where they were measured before.
    """

    def __init__(
        self,
        problem: Problem,
        spec: OperatorSpec,
        mode: str,
        budget_bytes: int,
        counters: Counters,
        sizes: list[int] | None = None,
    ) -> None:
        self._problem, self._spec, self._mode = problem, spec, mode
        self._budget_bytes, self._counters = budget_bytes, counters
        self._cached: list[Linearisation | None] = [None] * problem.batches
        self.measured_sizes = sizes
        """What `sizes` found, once it was asked; the same at every version."""

    def get(self, index: int) -> Linearisation:
        """Find the linearisation of a mini-batch, or make it."""
        cached = self._cached[index]
        if cached is not None:
            return cached
        self._counters.linearisations += 1
        batch = self._problem.data[index]
        fresh = MODES[self._mode](self._problem, self._spec, batch)
        if index in self.indices():
            self._cached[index] = fresh
        return fresh

    def peek(self, index: int) -> Linearisation | None:
        """Find the linearisation of a mini-batch if it is cached."""
        return self._cached[index]

    def indices(self) -> range:
        """Say which mini-batches are cached: the first that fit the budget."""
        total = 0
        for index, size in enumerate(self.sizes()):
            total += size
            if total > self._budget_bytes or not size:
                return range(index)
        return range(self._problem.batches)

    def keeps_all(self) -> bool:
        """Tell whether nothing has to be linearised again."""
        return len(self.indices()) == self._problem.batches

    def sizes(self) -> list[int]:
        """Bytes of each linearisation: the first is measured, the others by rows."""
        if self.measured_sizes is None:
            data = on_host(self._problem.data)
            batch = self._problem.data[0]
            first = cached_bytes(self._mode, self._problem, self._spec, batch)
            rows = [len(b.targets) for b in data]
            company = self._problem.model.company
            if company.shares:  # what is kept has to be the same everywhere
                (first,) = map(int, company.most([first]))
                rows = [1] * len(rows)
            self.measured_sizes = [-(-first * n // rows[0]) for n in rows]
        return self.measured_sizes

    def is_empty(self) -> bool:
        """Tell whether nothing is cached at the moment."""
        return not any(self._cached)

    def clear(self) -> None:
        """Return the memory of everything that is cached, now."""
        self._cached = [None] * self._problem.batches

    def give_up(self) -> None:
        """Return the memory, and keep nothing from now on."""
        self._budget_bytes = 0
        self.clear()
