"""How an operator is computed: the fastest of the plans that is right.

Finding it takes seconds, most of them for tracing. Who cannot wait has the first tier
meanwhile: the first mode that is right among those that need no preparation (`begin`).

A plan is remembered by structure (architecture, shapes, loss, operator, device), so
the next session of that structure, or the same one after a restart, verifies one plan
instead of timing many, and rounds as before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from curvd.contract import OperatorSpec, Tier
from curvd.errors import CurvatureUnverified, OutOfMemory
from curvd_server.engine.objective import Problem, check_cancelled
from curvd_server.engine.operators import MODES, TRACED
from curvd_server.engine.tuning.autotune import Plan, PlanTimer, ranked
from curvd_server.engine.tuning.thread_count import measured_threads
from curvd_server.engine.verification import (
    LEAN,
    Evidence,
    ProjectedReference,
    Reference,
    disagreements,
    explanation,
)

__all__ = [
    "Choice",
    "Memory",
    "Plan",
    "begin",
    "choose",
    "choose_among",
    "choose_untimed",
    "disagreements_of",
    "recall",
    "remember",
    "structure",
]

UNPREPARED = ("double_backward", "forward_over_reverse")
"""Modes that trace nothing, the usually faster first."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan with the evidence that it is right."""

    plan: Plan
    evidence: Evidence
    tier: Tier = Tier.FINAL
    busy: float = 0.0
    """Of the machine while plans were timed; see `PlanReport.busy`."""
    revision: int = 0
    """How often a plan that was chosen anew took over."""
    plainer: str = ""
    """Name of the mode that a traced one was compared with; empty: with none."""


class Memory(Protocol):
    """Plans by structure, as JSON: a dict, or something that outlives the process."""

    def get(self, key: str, default: str, /) -> str:
        """Look one up."""

    def __setitem__(self, key: str, value: str, /) -> None:
        """Keep one."""


def structure(problem: Problem, spec: OperatorSpec) -> str:
    """Hash everything that a plan's speed and rightness depend on but the values."""
    first = problem.data[0]
    parts = (
        repr(problem.model.skeleton),
        problem.layout.parameters,
        [tuple(t.shape) for t in (*first.inputs, first.targets)],
        problem.batches,
        problem.loss.spec,
        problem.mode,
        problem.dtype,
        problem.device.type,
        torch.__version__,
        (spec.kind, spec.block_sizes, spec.mc_samples),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def recall(memory: Memory, key: str) -> Plan | None:
    """Look up the plan of an earlier session of the same structure.

    Args:
        memory: Where plans are kept.
        key: From `structure`.

    Returns:
        The plan, or None if there is none that this version understands.
    """
    found = _recalled(memory, key)
    return None if found is None else found[0]


def _recalled(memory: Memory, key: str) -> tuple[Plan, float] | None:
    """Look up a plan, and how busy the machine was when it was chosen."""
    try:
        fields = json.loads(memory.get(key, ""))
        busy = float(fields.pop("busy", 0.0))
        plan = Plan(**fields)
    except (ValueError, TypeError, AttributeError):
        return None
    return (plan, busy) if plan.mode in MODES else None


def remember(memory: Memory, key: str, plan: Plan, busy: float = 0.0) -> None:
    """Keep a verified plan for later sessions of the same structure.

    Args:
        memory: Where plans are kept.
        key: From `structure`.
        plan: The plan.
        busy: How busy the machine was when it was chosen.
    """
    memory[key] = json.dumps({**dataclasses.asdict(plan), "busy": busy})


def begin(
    problem: Problem,
    spec: OperatorSpec,
    reference: Reference,
    cancelled: Callable[[], bool],
) -> Choice | None:
    """Find a plan that is right without preparing anything.

    Args:
        problem: The objective.
        spec: The operator.
        reference: What it is compared with.
        cancelled: Polled between modes.

    Returns:
        The plan and its evidence; None if no mode that traces nothing is right.
    """
    for mode in UNPREPARED:
        check_cancelled(cancelled)
        evidence = reference.examine(mode, batched=False)
        if evidence.ok:
            plan = Plan(mode)
            threads = measured_threads(problem, spec, plan)
            plan = dataclasses.replace(plan, threads=threads)
            return Choice(plan, evidence, Tier.FIRST)
    return None


def choose(
    problem: Problem,
    spec: OperatorSpec,
    *,
    reference: Reference,
    plan: Plan | None,
    memory: Memory,
    budget_bytes: int,
    budget_s: float,
    cancelled: Callable[[], bool],
) -> Choice:
    """Find the fastest plan that is right.

    Args:
        problem: The objective.
        spec: The operator.
        reference: What plans are compared with.
        plan: Taken if it verifies, without timing anything.
        memory: Plans of earlier sessions; likewise.
        budget_bytes: Memory for cached linearisations.
        budget_s: Time for measuring plans, verification excluded.
        cancelled: Polled between plans.

    Returns:
        The plan and its evidence.

    Raises:
        CurvatureUnverified: If no mode reproduces finite differences.
        OutOfMemory: If one did not for want of memory.
    """
    timer = PlanTimer(problem, spec, budget_bytes, budget_s)
    found: dict[str, Evidence] = {}
    key = structure(problem, spec)
    recalled = (plan, 0.0) if plan else _recalled(memory, key)
    known, busy = recalled or (None, 0.0)
    for candidate in ranked(timer, known, cancelled):
        check_cancelled(cancelled)
        if candidate.batches_at_once > 1 and not reference.is_sum_over_data():
            candidate = dataclasses.replace(candidate, batches_at_once=1)
        evidence = reference.examine(candidate.mode, batched=False)
        if evidence.ok and candidate.batched:
            evidence = reference.examine(candidate.mode, batched=True)
        plainer = ""
        if evidence.ok and candidate.mode in TRACED:
            plainer = _plainer(reference, candidate)
            wrong = disagreements_of(problem, spec, candidate, plainer)
            evidence = dataclasses.replace(evidence, wrong=wrong)
        if evidence.ok:
            if candidate != known:
                threads = measured_threads(problem, spec, candidate)
                candidate = dataclasses.replace(candidate, threads=threads)
                busy = timer.busy
            remember(memory, key, candidate, busy)
            return Choice(candidate, evidence, busy=busy, plainer=plainer)
        found[candidate.mode] = evidence
    raise _refused(found, problem)


def choose_untimed(
    problem: Problem,
    spec: OperatorSpec,
    *,
    reference: ProjectedReference,
    cancelled: Callable[[], bool],
) -> Choice:
    """Find the plan of a model of which few copies fit: nothing is timed.

    A traced program is taken if it is right, because it holds nothing of the parameters'
    size beside operand and result. Timing would hold three vectors, and columns or
    mini-batches together more.

    Args:
        problem: The objective.
        spec: The operator.
        reference: What modes are compared with.
        cancelled: Polled between modes.

    Returns:
        The plan and its evidence.

    Raises:
        CurvatureUnverified: If no mode reproduces finite differences.
        OutOfMemory: If one did not for want of memory.
    """
    return choose_among(
        (LEAN, *UNPREPARED), problem, reference.examine, cancelled=cancelled
    )


def choose_among(
    modes: Sequence[str],
    problem: Problem,
    examine: Callable[[str], Evidence],
    *,
    cancelled: Callable[[], bool],
) -> Choice:
    """Take the first mode that is right, a column and a mini-batch at a time.

    Args:
        modes: Names of modes, those that are preferred first.
        problem: The objective.
        examine: Compares a mode with the truth.
        cancelled: Polled between modes.

    Returns:
        The plan and its evidence.

    Raises:
        CurvatureUnverified: If no mode reproduces finite differences.
        OutOfMemory: If one did not for want of memory.
    """
    found: dict[str, Evidence] = {}
    for mode in modes:
        check_cancelled(cancelled)
        try:
            found[mode] = examine(mode)
        except OutOfMemory:
            if any(evidence.wrong for evidence in found.values()):
                break
            raise
        if found[mode].ok:
            return Choice(Plan(mode), found[mode])
    raise _refused(found, problem)


def _refused(
    found: dict[str, Evidence], problem: Problem
) -> CurvatureUnverified | OutOfMemory:
    """Say why no mode may be used."""
    if any(evidence.out_of_memory for evidence in found.values()):
        msg = (
            "there is not enough memory to verify the operator: use a smaller batch_size, "
            "or delete sessions"
        )
        return OutOfMemory(msg)
    return _unverified(found, getattr(problem.model.skeleton, "cut_off", ()))


def _plainer(reference: Reference, plan: Plan) -> str:
    """Find another mode that is right; its name, or nothing if there is none."""
    others = (
        m for m in MODES if m != plan.mode and reference.examine(m, batched=False).ok
    )
    return next(others, "")


def disagreements_of(
    problem: Problem, spec: OperatorSpec, plan: Plan, plainer: str
) -> tuple[str, ...]:
    """Hold a plan whose work depends on shapes and blocks against a plainer one.

    Args:
        problem: The objective, whose mini-batches have all the shapes that matter.
        spec: The operator.
        plan: The plan.
        plainer: Name of a mode that reproduced the truth; empty: there is none.

    Returns:
        Names of the parameters whose rows disagree on some mini-batch.
    """
    if not plainer:
        return ()
    work = problem.joined(plan.batches_at_once)
    return disagreements(work, spec, plan.mode, plainer, batched=plan.batched)


def _unverified(
    found: dict[str, Evidence], cut_off: Sequence[str]
) -> CurvatureUnverified:
    details = [
        f"{mode}: {e.failure}"
        if e.failure
        else f"{mode}: wrong in {', '.join(e.wrong)}"
        for mode, e in found.items()
    ]
    wrong = sorted({name for e in found.values() for name in e.wrong})
    why = explanation(cut_off)
    if found and all(evidence.is_rounding for evidence in found.values()):
        why = (
            "Its products are below 1e-7 of those of outputs whose loss has a slope of "
            "one, where differences are rounding, so nothing can be proved: the outputs are "
            "saturated, or the loss is constant in these parameters. Take other "
            "parameters, or params= without these"
        )
    msg = (
        "no AD mode reproduces central differences of the gradient "
        f"({'; '.join(details)}). {why}"
    )
    return CurvatureUnverified(msg, parameters=", ".join(wrong))
