"""Plans that were chosen on a busy machine are chosen anew when it is quiet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from curvd_server.engine.building import TUNING_S
from curvd_server.engine.objective import never
from curvd_server.engine.operator import Operator
from curvd_server.engine.tuning import (
    BUSY,
    Memory,
    PlanTimer,
    Renewed,
    choose,
    is_faster,
    remember,
    structure,
)
from curvd_server.engine.verification import Reference
from curvd_server.system import is_quiet


def is_in_doubt(operator: Operator) -> bool:
    """Tell whether the plan of an operator was chosen on a busy machine."""
    return operator.choice.busy > BUSY


def choose_again(
    operator: Operator,
    *,
    budget_bytes: int,
    memory: Memory,
    tuning_s: float = TUNING_S,
    quiet: Callable[[], bool] = is_quiet,
    cancelled: Callable[[], bool] = never,
) -> Operator | None:
    """Choose the plan of an operator anew, if the machine is quiet, and keep the better one.

    Args:
        operator: The operator; it stays valid, and gives its linearisations back before
            those of another are made.
        budget_bytes: Memory for cached linearisations.
        memory: Plans of earlier operators, and where the better one is kept.
        tuning_s: Time for timing candidates.
        quiet: Tells whether nobody else wants the cores.
        cancelled: Polled between mini-batches and candidates.

    Returns:
        The same operator with a better plan, verified and warm. None: its plan is the
        better one, which it takes note of; or the machine is no quieter than it was.

    Raises:
        CurvatureUnverified: If no AD mode is right any more.
    """
    if not quiet():
        return None
    problem, spec, known = operator.problem, operator.spec, operator.choice
    choice = choose(
        problem,
        spec,
        reference=Reference(problem, spec),
        plan=None,
        memory={},
        budget_bytes=budget_bytes,
        budget_s=tuning_s,
        cancelled=cancelled,
    )
    if choice.busy >= known.busy:
        return None
    timer = PlanTimer(problem, spec, budget_bytes, tuning_s)
    better = is_faster(timer, choice.plan, known.plan, cancelled)
    renewed: dict[str, str] = {}
    key = structure(problem, spec)
    remember(renewed, key, choice.plan if better else known.plan, choice.busy)
    Renewed(memory).renew(key, renewed[key])
    if not better:
        operator.settle(choice.busy)
        return None
    choice = dataclasses.replace(choice, revision=known.revision + 1)
    made = operator.with_choice(choice, budget_bytes)
    operator.close()
    made.make_ready(cancelled=cancelled)
    return made
