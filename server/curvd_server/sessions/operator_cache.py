"""What a session has on the device: its objective, and the operators that are built.

Nothing here is locked; the session's lock is held by whoever calls a method that
changes something.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from curvd.contract import OperatorSpec, PlanReport
from curvd_server.device import Array, Batcher, Done, Operator, Problem
from curvd_server.system import Poll

T = TypeVar("T")

_VERIFIED_BYTES = 24
"""Memory that verifying an operator takes per parameter: three float64 vectors."""


@dataclass(eq=False, slots=True)
class CachedOperator:
    """An operator, and who still needs it."""

    operator: Operator
    users: int = 0
    retired: bool = False


class OperatorCache:
    """One session's share of the device; empty while the session is cold.

    Args:
        batcher: The queue of the device.
        budget_bytes: Memory for cached linearisations, of all operators together.
        operators: How many are kept built.
    """

    def __init__(self, batcher: Batcher, *, budget_bytes: int, operators: int) -> None:
        self._batcher, self._budget_bytes = batcher, budget_bytes
        self._capacity = operators
        self.problem: Problem | None = None
        # The longest unused first.
        self._built: dict[OperatorSpec, CachedOperator] = {}
        self._closing: set[asyncio.Future[Done[None]]] = set()

    @property
    def reports(self) -> tuple[tuple[OperatorSpec, PlanReport], ...]:
        """The operators that are built, and how they are computed."""
        return tuple((spec, b.operator.report) for spec, b in self._built.items())

    def has(self, spec: OperatorSpec | None) -> bool:
        """Tell whether nothing has to be loaded or built before an operator is used.

        Args:
            spec: Which; None: the objective is enough.
        """
        return self.problem is not None and (
            spec is None or unscaled(spec) in self._built
        )

    async def load(self, load: Callable[[], Problem]) -> Problem:
        """Warm up, unless that is done.

        Args:
            load: Brings model and data onto the device; called on its thread.

        Returns:
            The objective.
        """
        if self.problem is None:
            self.problem = await self._run(lambda cancelled: load())
        return self.problem

    async def acquire(self, spec: OperatorSpec) -> CachedOperator:
        """Find or build an operator, and keep it until `release`.

        Args:
            spec: Which; its scale and damping do not matter, see `unscaled`.

        Returns:
            The operator.
        """
        spec = unscaled(spec)
        built = self._built.pop(spec, None)
        if built is None:
            assert self.problem is not None
            nbytes = _VERIFIED_BYTES * self.problem.layout.of_operator(spec).size
            built = CachedOperator(await self._run(self._building(spec), nbytes))
            self._retire(list(self._built)[: len(self._built) + 1 - self._capacity])
        self._built[spec] = built
        built.users += 1
        return built

    def release(self, built: CachedOperator) -> None:
        """Let go of an operator; a retired one is closed with its last user."""
        built.users -= 1
        self._close_unused([built])

    async def move(self, values: Mapping[str, Array]) -> Callable[[], None]:
        """Prepare the next version; nothing changes yet.

        Args:
            values: Parameters and buffers by name.

        Returns:
            Changes over to it. Running work keeps the operators that it has.
        """
        old, operators = self.problem, dict(self._built)
        assert old is not None

        def job(cancelled: Poll) -> tuple[Problem, dict[OperatorSpec, CachedOperator]]:
            problem = old.with_parameters(values)
            moved = {
                s: CachedOperator(problem.move(b.operator))
                for s, b in operators.items()
            }
            return problem, moved

        problem, moved = await self._run(job)

        def change_over() -> None:
            self._retire(list(self._built))
            self.problem, self._built = problem, moved

        return change_over

    async def close(self) -> None:
        """Give everything back; returns when the memory is free."""
        self.problem = None
        self._retire(list(self._built))
        if self._closing:
            await asyncio.wait(self._closing)

    def _building(self, spec: OperatorSpec) -> Callable[[Poll], Operator]:
        problem = self.problem
        assert problem is not None
        taken = sum(b.operator.report.kept_bytes for b in self._built.values())
        budget_bytes = max(0, self._budget_bytes - taken)
        return lambda cancelled: problem.build(
            spec, budget_bytes=budget_bytes, cancelled=cancelled
        )

    def _retire(self, specs: Iterable[OperatorSpec]) -> None:
        retired = [self._built.pop(spec) for spec in specs]
        for built in retired:
            built.retired = True
        self._close_unused(retired)

    def _close_unused(self, candidates: Iterable[CachedOperator]) -> None:
        unused = [b.operator for b in candidates if b.retired and not b.users]

        def close(cancelled: Poll) -> None:
            for operator in unused:
                operator.close()

        if unused:
            closing = asyncio.wrap_future(self._batcher.run(close))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _run(self, job: Callable[[Poll], T], nbytes: int = 0) -> T:
        """Do long work on the device, in turns with others."""
        ticket = self._batcher.run_in_turns(job, lane=id(self), room_bytes=nbytes)
        return (await asyncio.wrap_future(ticket)).value


def unscaled(spec: OperatorSpec) -> OperatorSpec:
    """Take scale and damping away.

    They are applied to products, so that operators that differ in nothing else share
    what is built, and run together.

    Args:
        spec: Any.

    Returns:
        The same operator A, without them.
    """
    if spec.scale == 1.0 and not spec.damping:
        return spec
    return replace(spec, scale=1.0, damping=0.0)
