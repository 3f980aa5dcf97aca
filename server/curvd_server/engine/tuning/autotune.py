"""Plans that an operator may have, timed, and in the order in which to try them.

A plan is chosen once and kept for long, so a moment in which the machine is busy must
not decide: the clock is the CPU time of the thread that computes, those that are close
are timed in turn, and the best time of each counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvd.contract import OperatorSpec, Stage
from curvd_server.engine.objective import (
    Problem,
    add_rows,
    check_cancelled,
    tangents_of,
)
from curvd_server.engine.operators import (
    MODES,
    Linearisation,
    block_ranges,
    cached_bytes,
)
from curvd_server.engine.program import Interruptible
from curvd_server.system import advance, enter_stage, logger, waited_s, yield_point

WORTH = 0.9
"""A candidate must need less than this share of the best simpler one's time.

Walking columns one by one gives the same bits however requests were put together,
so columns go through together only where that really gains.
"""
CLOSE = 1.3
"""Plans within this factor of the fastest are timed again."""
PRUNE_FACTOR = 1.5
"""A plan whose first product takes more than this factor of the fastest, and long, is
not run again: the time is better spent on those that may win. Joined mini-batches are,
`_RUNS` times even when the time is up: the first run finds fresh memory for larger
activations, and the second some, which says nothing."""
JOINED = 0.9
"""What a joined step takes of the time of its mini-batches one by one, about.

It reads parameters and tangents, and adds rows to the result, once for all of them, so
they are joined unless that is slower: larger activations may outgrow the caches.
"""
LONGEST_STEP_S = 1.5
"""Mini-batches are joined only while one column's product stays below this.

Work that was given up stops after the step that runs: within one mini-batch, or within
so many seconds of short ones.
"""
MOST_JOINED = 16
"""More mini-batches in a step gain nothing, and take memory."""
WIDEST_BYTES = 4 << 30
"""Columns go together only while they, their rows and as much again take less."""
_WIDTHS = (8, 32)
_RUNS = 3
"""Most runs of a plan in a row; the best one counts."""
_REPEATS = 2
"""How often those that are close are timed again; once if they are long."""
_INTERRUPTED_S = 0.75
"""Wide products that may take longer are timed with yield points between operations."""
_LONG_S = 0.1
"""A product of this length needs no third run, and no second one if it was timed before
or is pruned. Joined mini-batches do."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to compute an operator."""

    mode: str
    """Name in `operators.MODES`."""
    columns_at_once: int = 1
    """Columns that go through the linear part together; 1 walks them one by one."""
    batches_at_once: int = 1
    """Consecutive mini-batches that are computed as one."""
    threads: int = 0
    """Threads that compute it on a CPU; 0: as many as there are."""

    @property
    def batched(self) -> bool:
        """Whether the vectorised product is used."""
        return self.columns_at_once > 1


def ranked(
    timer: PlanTimer, known: Plan | None, cancelled: Callable[[], bool]
) -> Iterator[Plan]:
    """Yield plans, the most promising first.

    The mode is the one that multiplies a single column fastest, because a lone caller
    waits for one; more columns go through together where that pays.

    Args:
        timer: Times one plan.
        known: The plan, from an earlier session; comes first, and nothing is timed if it is right.
        cancelled: Polled between plans.

    Yields:
        Each plan once, those that could not be timed last.
    """
    if known is not None:
        yield known
    # Mini-batches are joined in two numbers at most, by sixteen and by four.
    enter_stage(Stage.TUNING, total=len(MODES) + 2 + len(_WIDTHS))
    timed: dict[Plan, float] = {}
    _race(timer, [Plan(mode) for mode in MODES], timed, cancelled)
    modes = list(timed)
    for plan in sorted(modes, key=timed.__getitem__):
        narrow = _joined(timer, plan, timed, cancelled)
        wide = _widened(timer, narrow, timed, cancelled)
        logger().info("plans timed", **_listed(timed), chosen=_name(wide))
        yield wide
        if wide != narrow:
            yield narrow
    yield from (Plan(mode) for mode in MODES if Plan(mode) not in modes)


def _name(plan: Plan) -> str:
    return f"{plan.mode}/{plan.columns_at_once}/{plan.batches_at_once}"


def _listed(timed: Mapping[Plan, float]) -> dict[str, str]:
    """Write times per column and mini-batch, by mode, columns and mini-batches at once."""
    return {_name(plan): f"{1e3 * seconds:.3g} ms" for plan, seconds in timed.items()}


def _race(
    timer: PlanTimer,
    plans: Sequence[Plan],
    timed: dict[Plan, float],
    cancelled: Callable[[], bool],
) -> None:
    """Time plans, and those that are close to the fastest again, in turn.

    A machine that is busy for a moment must not decide between equals: each plan keeps
    its best time, and the moments of those that matter lie side by side.

    Args:
        timer: Times one plan.
        plans: The contestants.
        timed: Best seconds so far, by plan; those that are there are timed again only
            if they are close. Plans that cannot run do not get there.
        cancelled: Polled before each.
    """

    def take(plan: Plan) -> None:
        check_cancelled(cancelled)
        if timed and timer.is_over():
            return
        advance(len(timed), detail=_name(plan))
        seconds = timer.seconds_per_column(plan)
        if seconds is not None:
            timed[plan] = min(seconds, timed.get(plan, seconds))

    for plan in plans:
        if plan not in timed:
            take(plan)
    for repeat in range(_REPEATS):
        here = [plan for plan in plans if plan in timed]
        best = min((timed[plan] for plan in here), default=0.0)
        if repeat and best > _LONG_S:
            return
        close = [plan for plan in here if timed[plan] <= CLOSE * best]
        for plan in close if len(close) > 1 else []:
            take(plan)


def _joined(
    timer: PlanTimer,
    plan: Plan,
    timed: dict[Plan, float],
    cancelled: Callable[[], bool],
) -> Plan:
    """Join as many mini-batches as a short step and the memory hold, unless it is slower."""
    fit = int(LONGEST_STEP_S / (JOINED * timed[plan]))
    most = min(timer.batches, fit, MOST_JOINED)
    while most >= 2 and not timer.is_over():
        steps = -(-timer.batches // most)
        even = -(-timer.batches // steps)
        joined = dataclasses.replace(plan, batches_at_once=even)
        _race(timer, [plan, joined], timed, cancelled)
        if joined in timed:
            return joined if timed[joined] <= timed[plan] else plan
        most //= 4
    return plan


def _widened(
    timer: PlanTimer,
    plan: Plan,
    timed: dict[Plan, float],
    cancelled: Callable[[], bool],
) -> Plan:
    """Take several columns at once, if that is really faster."""
    best = plan
    for width in _WIDTHS:
        if not timer.allows(width * plan.batches_at_once * timed[plan]):
            break
        wide = dataclasses.replace(plan, columns_at_once=width)
        _race(timer, [best, wide], timed, cancelled)
        if wide in timed and timed[wide] < WORTH * timed[best]:
            best = wide
    return best


def is_faster(
    timer: PlanTimer, plan: Plan, known: Plan, cancelled: Callable[[], bool]
) -> bool:
    """Tell whether a plan is worth the change from one that is in use.

    Args:
        timer: Times one plan.
        plan: The new one.
        known: The one in use.
        cancelled: Polled before each timing.

    Returns:
        Whether it really gains, or differs in nothing but threads, which are measured
        by themselves.
    """
    if dataclasses.replace(plan, threads=known.threads) == known:
        return plan != known
    timed: dict[Plan, float] = {}
    _race(timer, [known, plan], timed, cancelled)
    return timed.get(plan, math.inf) < WORTH * timed.get(known, math.inf)


class PlanTimer:
    """Times plans on the first mini-batches, within a budget of measured time.

    On a CPU it is the time that this thread computes, which other processes do not
    lengthen; it takes its part in everything that torch's pool does, and spins until
    the others are done. Work on another device is timed by the wall.

    Args:
        problem: The objective.
        spec: The operator.
        budget_bytes: Memory for cached linearisations.
        budget_s: Seconds of products, by the same clock; tracing, linearising and
            verifying are not counted.
    """

    def __init__(
        self, problem: Problem, spec: OperatorSpec, budget_bytes: int, budget_s: float
    ) -> None:
        self._problem, self._spec, self._bytes = problem, spec, budget_bytes
        self._left_s = budget_s
        self._spent_s = self._waited_s = 0.0
        self._best_s, self._warm = math.inf, set[Plan]()
        on_cpu = problem.device.type == "cpu"
        self._clock = time.thread_time if on_cpu else time.perf_counter

    @property
    def batches(self) -> int:
        """Mini-batches that may be joined."""
        return self._problem.batches

    @property
    def busy(self) -> float:
        """Seconds per second of computing, waiting for a core included; 0: none timed."""
        return 1.0 + self._waited_s / self._spent_s if self._spent_s else 0.0

    def is_over(self) -> bool:
        """Tell whether the time is used up."""
        return self._left_s <= 0

    def allows(self, seconds: float) -> bool:
        """Tell whether a product of this length may be timed, if only once."""
        return seconds < self._left_s

    def seconds_per_column(self, plan: Plan) -> float | None:
        """Time a plan's product, and its linearisation in so far as it is not cached.

        The product is all that a step does: rows are added to a result.

        Args:
            plan: The candidate.

        Returns:
            Seconds per column and mini-batch, or None if torch cannot run it, a
            joined linearisation exceeds the budget of bytes, or the columns are more
            than `WIDEST_BYTES` allow.
        """
        column_bytes = self._problem.layout.size * self._problem.dtype.itemsize
        if plan.batched and 3 * plan.columns_at_once * column_bytes > WIDEST_BYTES:
            return None
        problem = self._problem.joined(plan.batches_at_once)
        batch = problem.data[0]
        share = len(self._problem.data[0].targets) / len(batch.targets)
        limit_s = PRUNE_FACTOR * self._best_s * plan.columns_at_once / share
        joined = plan.batches_at_once > 1 and not plan.batched
        least = _RUNS if joined and plan not in self._warm else 1
        try:
            size = cached_bytes(plan.mode, problem, self._spec, batch)  # warms, traces
            if plan.batches_at_once > 1 and size > self._bytes:
                return None
            yield_point()
            start = self._clock()
            linear = MODES[plan.mode](problem, self._spec, batch)
            build_s = self._since(start)
            product_s = self._product_s(linear, plan, limit_s, least)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            return None
        cached = min(1.0, self._bytes / max(size * problem.batches, 1))
        seconds = share * (product_s / plan.columns_at_once + (1.0 - cached) * build_s)
        self._best_s = min(self._best_s, seconds)
        return seconds

    def _product_s(
        self, linear: Linearisation, plan: Plan, limit_s: float, least: int
    ) -> float:
        p = self._problem
        blocks = block_ranges(self._spec, len(p.parameters))
        shape = (*((plan.columns_at_once,) if plan.batched else ()), p.layout.size)
        columns = torch.ones(shape, dtype=p.dtype, device=p.device)
        out = torch.zeros(shape, dtype=p.result_dtype, device=p.device)
        tangents = tangents_of(columns, p.layout)
        seconds: list[float] = []
        # A step of many columns may be as long as many steps. On another device the
        # pauses would count, and operations only wait there.
        long = plan.batched and p.device.type == "cpu" and limit_s > _INTERRUPTED_S
        inside = Interruptible() if long else contextlib.nullcontext()
        waited_before_s = waited_s()
        while len(seconds) < _RUNS:  # the first warms caches and allocators
            rows: list[Tensor | None] = []
            spent_s = 0.0
            for block in blocks:
                yield_point()  # while the clock stands still
                start = self._clock()
                with inside:
                    cut = tangents[block.start : block.stop]
                    rows += linear.product(cut, block, batched=plan.batched)
                spent_s += self._since(start)
            start = self._clock()
            add_rows(out, p.layout, rows)
            del rows  # before the next ones are made
            seconds.append(spent_s + self._since(start))
            self._left_s -= seconds[-1]
            long = seconds[-1] > _LONG_S
            enough = len(seconds) == 2 or plan in self._warm or seconds[-1] > limit_s
            if len(seconds) >= least and (self.is_over() or (long and enough)):
                break
        self._warm.add(plan)
        self._waited_s += waited_s() - waited_before_s
        self._spent_s += sum(seconds)
        return min(seconds)

    def _since(self, start: float) -> float:
        """Wait for the device, whose work is asynchronous, and read the clock."""
        if self._problem.device.type == "cuda":
            torch.cuda.synchronize(self._problem.device)
        return self._clock() - start
