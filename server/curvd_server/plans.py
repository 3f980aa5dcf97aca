"""How an operator is computed: candidates are timed, the fastest that is right wins.

A plan is remembered by structure (architecture, shapes, loss, operator, device), so
the next session of that structure verifies one plan instead of timing many.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from curvd.errors import CurvatureUnverified
from curvd.types import OperatorSpec
from torch import Tensor

from curvd_server.curvature import MODES
from curvd_server.objective import Problem, check_cancelled
from curvd_server.verify import Evidence, Truth, block_ranges

WORTH = 0.9
"""A candidate must need less than this share of the best simpler one's time.

Walking columns one by one gives the same bits however requests were put together,
so columns go through together only where that really gains.
"""
_WIDTHS = (8, 32)


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to compute an operator."""

    mode: str
    """Name in `curvature.MODES`."""
    columns_at_once: int = 1
    """Columns that go through the linear part together; 1 walks them one by one."""

    @property
    def batched(self) -> bool:
        """Whether the vectorised product is used."""
        return self.columns_at_once > 1


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan with the evidence that it is right."""

    plan: Plan
    evidence: Evidence


_remembered: dict[tuple[Any, ...], Plan] = {}


def structure(problem: Problem, spec: OperatorSpec) -> tuple[Any, ...]:
    """Name everything that a plan's speed and rightness depend on but the values."""
    first = problem.data[0]
    return (
        repr(problem.model.skeleton),
        problem.layout.parameters,
        tuple(t.shape for t in (*first.inputs, first.targets)),
        problem.loss.spec,
        problem.mode,
        problem.dtype,
        problem.device.type,
        (spec.kind, spec.block_sizes, spec.mc_samples),
    )


def recall(problem: Problem, spec: OperatorSpec) -> Plan | None:
    """Look up the plan of an earlier session of the same structure."""
    return _remembered.get(structure(problem, spec))


def remember(problem: Problem, spec: OperatorSpec, plan: Plan) -> None:
    """Keep a verified plan for later sessions of the same structure."""
    _remembered[structure(problem, spec)] = plan


def choose(
    problem: Problem,
    spec: OperatorSpec,
    *,
    plan: Plan | None,
    budget_s: float,
    cancelled: Callable[[], bool],
) -> Choice:
    """Find the fastest plan that is right.

    Args:
        problem: The objective.
        spec: The operator.
        plan: Taken if it verifies, without timing anything.
        budget_s: Time for measuring candidates, verification excluded.
        cancelled: Polled between candidates.

    Returns:
        The plan and its evidence.

    Raises:
        CurvatureUnverified: If no mode reproduces finite differences.
    """
    truth = Truth(problem, spec)
    found: dict[str, Evidence] = {}
    ranked = _ranked(problem, spec, plan, budget_s, cancelled)
    for candidate in ranked:
        check_cancelled(cancelled)
        evidence = truth.examine(candidate.mode, batched=candidate.batched)
        if evidence.ok:
            remember(problem, spec, candidate)
            return Choice(candidate, evidence)
        found[candidate.mode] = evidence
    raise _unverified(found)


def _ranked(
    problem: Problem,
    spec: OperatorSpec,
    plan: Plan | None,
    budget_s: float,
    cancelled: Callable[[], bool],
) -> Iterator[Plan]:
    """Yield plans, the most promising first."""
    known = plan or recall(problem, spec)
    if known is not None:
        yield known
    timed: dict[Plan, float] = {}
    deadline = time.perf_counter() + budget_s
    for candidate in _candidates():
        check_cancelled(cancelled)
        if timed and time.perf_counter() > deadline:
            break
        seconds = seconds_per_column(problem, spec, candidate)
        if seconds is not None:
            timed[candidate] = seconds
    yield from sorted(timed, key=lambda p: timed[p] * (1.0 if p.batched else WORTH))
    yield from (Plan(mode) for mode in MODES if Plan(mode) not in timed)


def _candidates() -> Iterator[Plan]:
    for mode in MODES:
        yield Plan(mode)
    for width in _WIDTHS:
        for mode in MODES:
            yield Plan(mode, width)


def seconds_per_column(
    problem: Problem, spec: OperatorSpec, plan: Plan
) -> float | None:
    """Time the linear part of a plan on the first mini-batch.

    Args:
        problem: The objective.
        spec: The operator.
        plan: The candidate.

    Returns:
        Seconds per column, or None if torch cannot run it.
    """
    blocks = block_ranges(spec, len(problem.parameters))
    lead = (plan.columns_at_once,) if plan.batched else ()
    columns = [p.expand(*lead, *p.shape) for p in problem.parameters]
    best = float("inf")
    try:
        linear = MODES[plan.mode](problem, spec, problem.data[0])
        for _ in range(2):  # the first run warms caches and allocators
            start = time.perf_counter()
            for block in blocks:
                inside = columns[block.start : block.stop]
                rows = linear.product(inside, block, batched=plan.batched)
            _wait(problem, rows)
            best = min(best, time.perf_counter() - start)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    return best / plan.columns_at_once


def _wait(problem: Problem, rows: list[Tensor | None]) -> None:
    """Wait for the device, whose work is asynchronous."""
    del rows
    if problem.device.type == "cuda":
        torch.cuda.synchronize(problem.device)


def _unverified(found: dict[str, Evidence]) -> CurvatureUnverified:
    details = [
        f"{mode}: {e.failure}"
        if e.failure
        else f"{mode}: wrong in {', '.join(e.wrong)}"
        for mode, e in found.items()
    ]
    wrong = sorted({name for e in found.values() for name in e.wrong})
    msg = (
        "no AD mode reproduces central differences of the gradient ("
        + "; ".join(details)
        + "). A layer that owns these parameters has no right second derivative in "
        "torch: write it with elementary operations, or freeze them "
        "(requires_grad=False)"
    )
    return CurvatureUnverified(msg, parameters=", ".join(wrong))
