"""Operators: built once with evidence and a plan, applied any number of times.

    problem = Problem.load(module, parameters, arrays, data, loss)
    operator = build(problem, OperatorSpec(), budget_bytes=2**30)
    rows = operator.apply(columns)            # [K, P] -> [K, P]
    first = build(problem, OperatorSpec(), budget_bytes=2**30, tier=Tier.FIRST)
    operator = improve(first, budget_bytes=2**30)
    operator = operator.at(problem.with_parameters(new))

Everything here is synchronous and belongs to whoever has the turn of its device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from curvd.contract import OperatorSpec, Tier
from curvd.tensors import Pool
from curvd_server.engine.objective import Problem, check_cancelled, never
from curvd_server.engine.operator import Operator
from curvd_server.engine.operators import definition
from curvd_server.engine.program import Compiler
from curvd_server.engine.tuning import (
    Choice,
    Memory,
    Plan,
    Renewed,
    begin,
    choose,
    choose_untimed,
)
from curvd_server.engine.verification import ProjectedReference, Reference, reference_of

TUNING_S = 6.0
"""Default time for measuring candidate plans."""


def build(
    problem: Problem,
    spec: OperatorSpec,
    *,
    budget_bytes: int,
    plan: Plan | None = None,
    memory: Memory | None = None,
    compiler: Compiler | None = None,
    results: Pool | None = None,
    tuning_s: float = TUNING_S,
    tier: Tier = Tier.FINAL,
    cancelled: Callable[[], bool] = never,
) -> Operator:
    """Verify an operator, choose its plan and warm it up.

    Args:
        problem: The objective at its current parameters.
        spec: The operator.
        budget_bytes: Memory for cached linearisations.
        plan: Taken if it verifies; else candidates are timed.
        memory: Plans of earlier operators, and where this one's is kept.
        compiler: Makes native code of what is used long enough; None: nothing does.
        results: Memory of results on the host; None: fresh for each.
        tuning_s: Time for timing candidates.
        tier: ``first``: take the first mode that is right and needs no preparation, and
            time nothing; where there is none the plan is final all the same, and so is
            that of a large model, for which nothing is timed.
        cancelled: Polled between mini-batches and candidates.

    Returns:
        An operator that is ready to multiply.

    Raises:
        InvalidSpec: If the operator's parameters or blocks are not the problem's, or
            its loss has no such operator.
        NotDeterministic: If two evaluations disagree.
        CurvatureUnverified: If no AD mode is right.
    """
    problem = problem.restricted(spec)
    choice, reference = verified_choice(
        problem,
        spec,
        tier=tier,
        plan=plan,
        memory={} if memory is None else memory,
        budget_bytes=budget_bytes,
        budget_s=tuning_s,
        cancelled=cancelled,
    )
    operator = Operator(problem, spec, choice, budget_bytes, compiler, results)
    if choice.tier is Tier.FIRST:
        operator.reference = reference
    operator.make_ready(cancelled=cancelled)
    return operator


def verified_choice(
    problem: Problem, spec: OperatorSpec, *, tier: Tier, **how: Any
) -> tuple[Choice, Reference | None]:
    """Verify an operator and choose its plan.

    Args:
        problem: The objective, restricted to the operator's parameters.
        spec: The operator.
        tier: Which tier; see `build`.
        how: As for `tuning.choose`.

    Returns:
        The choice, and what a later tier is compared with; None if this is the last.

    Raises:
        InvalidSpec: If its loss has no such operator.
        NotDeterministic: If two evaluations disagree.
        CurvatureUnverified: If no AD mode is right.
    """
    definition(spec.kind).check_loss(problem.loss.spec.name, spec)
    reference = reference_of(problem, spec)
    reference.check_objective()
    check_cancelled(how["cancelled"])
    if isinstance(reference, ProjectedReference):
        return choose_untimed(
            problem, spec, reference=reference, cancelled=how["cancelled"]
        ), None
    choice = None
    if tier is Tier.FIRST:
        choice = begin(problem, spec, reference, how["cancelled"])
    if choice is None:
        choice = choose(problem, spec, reference=reference, **how)
    return choice, reference


def improve(
    first: Operator,
    *,
    budget_bytes: int,
    memory: Memory | None = None,
    tuning_s: float = TUNING_S,
    cancelled: Callable[[], bool] = never,
) -> Operator:
    """Choose the final plan of an operator that answers already.

    Args:
        first: The operator; it stays valid, and gives its linearisations back before
            those of the other are made, so that there is memory for one of them.
        budget_bytes: Memory for cached linearisations.
        memory: Plans of earlier operators, and where this one's is kept.
        tuning_s: Time for timing candidates.
        cancelled: Polled between mini-batches and candidates.

    Returns:
        The same operator in its last tier, verified and warm.

    Raises:
        CurvatureUnverified: If no AD mode is right any more.
    """
    problem, spec = first.problem, first.spec
    choice = choose(
        problem,
        spec,
        reference=first.reference or Reference(problem, spec),
        plan=None,
        memory={} if memory is None else Renewed(memory),
        budget_bytes=budget_bytes,
        budget_s=tuning_s,
        cancelled=cancelled,
    )
    operator = first.with_choice(choice, budget_bytes)
    first.close()
    operator.make_ready(cancelled=cancelled)
    return operator
