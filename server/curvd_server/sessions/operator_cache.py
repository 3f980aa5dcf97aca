"""What a session has on the device: its objective, and the operators that are built.

An operator answers in its first tier while its last one is prepared: when the device is
idle, or in turns with products once these have taken so long that it is repaid. A plan that
was chosen on a busy machine is chosen anew when the machine is quiet, and the better one stays.

Nothing here is locked; the session's lock is held by whoever calls a method that
changes something.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from curvd.contract import OperatorSpec, PlanReport, Tier, Work
from curvd.errors import CurvdError
from curvd_server.device import Array, Batcher, Done, Operator, Problem, Ticket
from curvd_server.system import (
    Ongoing,
    Poll,
    collect_if_due,
    logger,
    look_at_all,
    none_while_building,
)

T = TypeVar("T")

REPAID_S = 5.0
"""Seconds of products in the first tier after which the last one, which takes about as
long to prepare, waits for an idle device no longer."""
_VERIFIED_BYTES = 24
"""Memory that verifying an operator takes per parameter: three float64 vectors."""


class _Make(Protocol):
    """Makes an operator with another plan; None if there is none."""

    def __call__(self, *, budget_bytes: int, cancelled: Poll) -> Operator | None:
        """Make it within so much memory."""


@dataclass(eq=False, slots=True)
class CachedOperator:
    """An operator, and who still needs it."""

    operator: Operator
    users: int = 0
    retired: bool = False
    successor: CachedOperator | None = None
    """The one with a better plan that took its place at the same version."""


class OperatorCache:
    """One session's share of the device; empty while the session is cold.

    Args:
        batcher: The queue of the device.
        budget_bytes: Memory for cached linearisations, of all operators together.
        operators: How many are kept built.
        plan: Which tier the first answer of an operator waits for.
        begin: Makes what tells how far long work on a subject is.
    """

    def __init__(
        self,
        batcher: Batcher,
        *,
        budget_bytes: int,
        operators: int,
        plan: Tier = Tier.FIRST,
        begin: Callable[[Work, str], Ongoing] = Ongoing,
    ) -> None:
        self._batcher, self._budget_bytes = batcher, budget_bytes
        self._capacity, self._plan, self._begin = operators, plan, begin
        self._improving: dict[OperatorSpec, asyncio.Task[None]] = {}
        self.problem: Problem | None = None
        # The longest unused first.
        self._built: dict[OperatorSpec, CachedOperator] = {}
        self._closing: set[asyncio.Future[Done[None]]] = set()
        self._is_large = False  # enough for garbage to be looked for at its end

    @property
    def reports(self) -> tuple[tuple[OperatorSpec, PlanReport], ...]:
        """The operators that are built, and how they are computed."""
        built = list(self._built.items())  # at once, on any thread
        return tuple((spec, b.operator.report) for spec, b in built)

    def has(self, spec: OperatorSpec | None) -> bool:
        """Tell whether nothing has to be loaded or built before an operator is used.

        Args:
            spec: Which; None: the objective is enough.
        """
        return self.problem is not None and (
            spec is None or unscaled(spec) in self._built
        )

    async def load(
        self, load: Callable[[], Problem], like: Problem | None = None
    ) -> Problem:
        """Warm up, unless that is done.

        Args:
            load: Brings model and data onto the device; called on its thread.
            like: Whose parameters it shares; None: its own.

        Returns:
            The objective.
        """

        def job(cancelled: Poll) -> Problem:
            problem = load()
            return problem if like is None else problem.sharing(like)

        if self.problem is None:
            self.problem = await self._run(self._staying(job))
        return self.problem

    async def check(self) -> None:
        """Find out whether the objective can be computed, before operators are asked for."""
        problem = self.problem
        assert problem is not None
        await self._run(lambda cancelled: problem.check(cancelled=cancelled))

    async def acquire(
        self, spec: OperatorSpec, opening: Ongoing | None = None
    ) -> CachedOperator:
        """Find or build an operator, and keep it until `release`.

        Args:
            spec: Which; its scale and damping do not matter, see `unscaled`.
            opening: What it is built for; None: a call that waits.

        Returns:
            The operator.
        """
        spec = unscaled(spec)
        built = self._built.pop(spec, None)
        if built is None:
            assert self.problem is not None
            with (
                self._begin(Work.BUILDING, str(spec.kind))
                if opening is None
                else contextlib.nullcontext(opening)
            ) as ongoing:
                building = _heard(ongoing, self._staying(self._building(spec)))
                nbytes = self._verified_bytes(spec)
                built = CachedOperator(await self._run(building, nbytes))
            excess = max(0, len(self._built) + 1 - self._capacity)
            oldest = list(self._built)[:excess]
            self._stop_improving(oldest)
            self._retire(oldest)
        self._built[spec] = built
        built.users += 1
        self._improve(spec)
        return built

    def latest(self, built: CachedOperator) -> CachedOperator:
        """Exchange an operator that is held for one that took its place.

        Args:
            built: What is held.

        Returns:
            What is held from now on: that with the best plan at the same version.
        """
        newer = built
        while newer.successor is not None and not newer.successor.retired:
            newer = newer.successor
        if newer is not built:
            newer.users += 1
            self.release(built)
        return newer

    def release(self, built: CachedOperator) -> None:
        """Let go of an operator; a retired one is closed with its last user."""
        built.users -= 1
        self._close_unused([built])

    async def move(
        self, values: Mapping[str, Array], like: Problem | None = None
    ) -> tuple[Problem, Callable[[], None]]:
        """Prepare the next version; nothing changes yet.

        Args:
            values: Parameters and buffers by name.
            like: Has them already, on other data, and shares them.

        Returns:
            The next version, and what changes over to it. Running work keeps the
            operators that it has.
        """
        old, operators = self.problem, dict(self._built)
        assert old is not None

        def job(cancelled: Poll) -> tuple[Problem, dict[OperatorSpec, CachedOperator]]:
            problem = old.with_parameters(values) if like is None else old.sharing(like)
            moved = {
                s: CachedOperator(problem.move(b.operator))
                for s, b in operators.items()
            }
            return problem, moved

        problem, moved = await self._run(job)

        def change_over() -> None:
            self._retire(list(self._built))
            self.problem, self._built = problem, moved
            for spec in moved:
                self._improve(spec)

        return problem, change_over

    async def close(self) -> None:
        """Give everything back; returns when the memory is free."""
        self.problem = None
        if self._improving:
            self._stop_improving(list(self._improving))
            # It runs when what was stopped has let go of its memory.
            last = self._batcher.run(lambda cancelled: None, lane=self._lane)
            self._closing.add(asyncio.wrap_future(last))
        self._retire(list(self._built))
        if self._closing:
            await asyncio.wait(self._closing)
        if self._is_large:
            self._is_large = False
            await asyncio.wrap_future(
                self._batcher.run(lambda cancelled: look_at_all())
            )

    def _building(self, spec: OperatorSpec) -> Callable[[Poll], Operator]:
        problem = self.problem
        assert problem is not None
        budget_bytes = self._budget_beside(spec)
        return lambda cancelled: problem.build(
            spec, budget_bytes=budget_bytes, cancelled=cancelled, tier=self._plan
        )

    def _budget_beside(self, spec: OperatorSpec) -> int:
        """Memory that all other operators leave for the linearisations of one."""
        others = [b.operator for s, b in self._built.items() if s != spec]
        taken = sum(operator.report.kept_bytes for operator in others)
        return max(0, self._budget_bytes - taken)

    def _verified_bytes(self, spec: OperatorSpec) -> int:
        assert self.problem is not None
        return _VERIFIED_BYTES * self.problem.layout.of_operator(spec).size

    @property
    def _lane(self) -> tuple[str, int]:
        """Where last tiers are prepared, one after the other."""
        return "improving", id(self)

    def choose_again(self) -> None:
        """Have plans that were chosen on a busy machine chosen anew, when it is quiet.

        The device has to be idle, too. Where one set of bits was asked for, they stay.
        """
        problem = self.problem
        if problem is None or self._plan is Tier.FINAL:
            return
        for spec, built in self._built.items():
            operator = built.operator
            if spec in self._improving or not operator.is_in_doubt:
                continue
            self._prepare(
                spec,
                functools.partial(problem.choose_again, operator),
                due=lambda: False,
                takes_over="plan chosen anew took over",
            )

    def _improve(self, spec: OperatorSpec) -> None:
        """Have the last tier of an operator prepared, unless it is there or on its way."""
        problem, operator = self.problem, self._built[spec].operator
        if operator.report.tier is Tier.FINAL or spec in self._improving:
            return
        assert problem is not None

        def is_due() -> bool:
            now = self._built.get(spec)
            return now is not None and now.operator.spent_s >= REPAID_S

        self._prepare(
            spec,
            functools.partial(problem.improve, operator),
            due=is_due,
            takes_over="last tier took over",
        )

    def _prepare(
        self, spec: OperatorSpec, make: _Make, *, due: Poll, takes_over: str
    ) -> None:
        """Have another plan of an operator prepared that nobody waits for.

        Args:
            spec: Which operator.
            make: Makes it; there may be none.
            due: Says whether it takes turns with products, or waits for an idle device.
            takes_over: What the log says then.
        """
        problem = self.problem
        assert problem is not None

        def job(cancelled: Poll) -> Operator | None:
            budget_bytes = self._budget_beside(spec)
            return make(budget_bytes=budget_bytes, cancelled=cancelled)

        staying = self._staying(job)

        def tidied(cancelled: Poll) -> Operator | None:
            made = staying(cancelled)
            collect_if_due()
            return made

        ongoing = self._begin(Work.IMPROVING, str(spec.kind))
        ticket = self._batcher.run_when_idle(
            _heard(ongoing, tidied),
            due=due,
            lane=self._lane,
            room_bytes=self._verified_bytes(spec),
        )
        waiting = self._take_over(spec, problem, ticket, ongoing, takes_over)
        self._improving[spec] = asyncio.ensure_future(waiting)

    async def _take_over(
        self,
        spec: OperatorSpec,
        problem: Problem,
        ticket: Ticket[Operator | None],
        ongoing: Ongoing,
        takes_over: str,
    ) -> None:
        """Put another plan into the place of the one that answers, once it is there.

        Args:
            spec: Which operator.
            problem: The version at which it is prepared; there may be a later one since.
            ticket: The operator with that plan, to come.
            ongoing: Tells how far it is.
            takes_over: What the log says when it has.
        """
        try:
            with ongoing:
                done = await asyncio.wrap_future(ticket)
        except CurvdError as error:  # the plan that there is goes on
            kind = str(spec.kind)
            logger().warning("no better plan", operator=kind, error=str(error))
            return
        finally:
            if self._improving.get(spec) is asyncio.current_task():
                del self._improving[spec]
        made = done.value
        if made is None:
            return
        if spec not in self._built:
            self._close_unused([CachedOperator(made, retired=True)])
            return
        assert self.problem is not None
        if self.problem is not problem:
            made = self.problem.move(made)
        before, after = self._built[spec], CachedOperator(made)
        before.successor, before.retired = after, True
        self._built[spec] = after  # as long unused as it was
        self._close_unused([before])
        logger().info(
            takes_over,
            operator=str(spec.kind),
            mode=made.report.mode,
            seconds=round(done.compute_s, 2),
        )

    def _stop_improving(self, specs: Iterable[OperatorSpec]) -> None:
        for spec in specs:
            task = self._improving.pop(spec, None)
            if task is not None:
                task.cancel()

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

    def _staying(self, make: Callable[[Poll], T]) -> Callable[[Poll], T]:
        """Keep full collections of garbage away from what stays until the end."""

        def made(cancelled: Poll) -> T:
            with none_while_building() as aside:
                value = make(cancelled)
            self._is_large = self._is_large or aside.some
            return value

        return made

    async def _run(self, job: Callable[[Poll], T], nbytes: int = 0) -> T:
        """Do long work on the device, in turns with others."""
        ticket = self._batcher.run_in_turns(job, lane=id(self), room_bytes=nbytes)
        return (await asyncio.wrap_future(ticket)).value


def _heard(ongoing: Ongoing, job: Callable[[Poll], T]) -> Callable[[Poll], T]:
    """Have long work tell how far it is."""

    def heard(cancelled: Poll) -> T:
        with ongoing.here():
            return job(cancelled)

    return heard


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
