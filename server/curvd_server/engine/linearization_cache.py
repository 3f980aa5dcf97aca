"""Linearisations of mini-batches, cached as far as a budget of memory goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from curvd.contract import OperatorSpec
from curvd_server.engine.objective import Problem, on_host
from curvd_server.engine.operators import MODES, Linearisation, cached_bytes
from curvd_server.graph.execution import GraphModule


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
            first = self._first_bytes()
            rows = [len(b.targets) for b in data]
            company = self._problem.model.company
            if company.shares:  # what is kept has to be the same everywhere
                (first,) = map(int, company.most([first]))
                rows = [1] * len(rows)
            self.measured_sizes = [-(-first * n // rows[0]) for n in rows]
        return self.measured_sizes

    def _first_bytes(self) -> int:
        """Measure the first mini-batch's, or find it measured for another session.

        A graph has run without memory before, so its shapes depend on no values, and
        what is kept of them depends on all that a trace depends on. A builder's module
        may do as it likes.
        """
        problem, batch = self._problem, self._problem.data[0]
        model = problem.model
        if not isinstance(model.skeleton, GraphModule) or model.company.shares:
            return cached_bytes(self._mode, problem, self._spec, batch)
        tensors = (*batch.inputs, batch.targets)
        shapes = tuple((tuple(t.shape), t.dtype) for t in tensors)
        key: tuple[Any, ...] = ("cached bytes", self._mode, self._spec, shapes)
        key += (model.names, *model.constants, model.data, problem.loss.spec)
        key += (problem.mode, problem.dtype, problem.device)
        if key not in model.programs:
            found = cached_bytes(self._mode, problem, self._spec, batch)
            model.programs[key] = found
        known: int = model.programs[key]
        return known

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
