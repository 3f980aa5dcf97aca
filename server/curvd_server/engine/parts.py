"""Operators on parts of the data: a plan is decided on one part, and the others follow it.

Formulas are right or wrong whatever the data, so one part is compared with finite
differences, for all. What depends on shapes is compared where a part has others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from curvd.contract import OperatorSpec, Tier
from curvd.errors import CurvatureUnverified, OutOfMemory
from curvd.tensors import Pool
from curvd_server.engine.building import TUNING_S, verified_choice
from curvd_server.engine.objective import Problem, never, on_host
from curvd_server.engine.operator import Operator
from curvd_server.engine.tuning import Choice, Memory, Plan, disagreements_of, structure
from curvd_server.engine.verification import ProjectedReference


def decide(
    problem: Problem,
    spec: OperatorSpec,
    *,
    budget_bytes: int,
    memory: Memory,
    tier: Tier = Tier.FINAL,
    cancelled: Callable[[], bool] = never,
) -> tuple[Choice, frozenset[int]]:
    """Verify an operator and choose its plan, for others to `follow`.

    Args:
        problem: A part of the objective; some of its targets count.
        spec: The operator.
        budget_bytes: Memory for this part's cached linearisations.
        memory: Plans of earlier operators, and where this one's is kept.
        tier: Which tier; see `build`.
        cancelled: Polled between mini-batches and candidates.

    Returns:
        The choice, and the sizes of mini-batches that it was verified with, joined.
    """
    problem = problem.restricted(spec)
    choice, _ = verified_choice(
        problem,
        spec,
        tier=tier,
        plan=None,
        memory=memory,
        budget_bytes=budget_bytes,
        budget_s=TUNING_S,
        cancelled=cancelled,
    )
    return choice, _sizes(problem, choice.plan)


def follow(
    problem: Problem,
    spec: OperatorSpec,
    choice: Choice,
    *,
    budget_bytes: int,
    verified: Collection[int],
    results: Pool | None = None,
    cancelled: Callable[[], bool] = never,
) -> Operator:
    """Build an operator with a plan that was found right on another part of the data.

    Args:
        problem: A part of the objective; perhaps none of its targets counts.
        spec: The operator.
        choice: From `decide`.
        budget_bytes: Memory for this part's cached linearisations.
        verified: Sizes of mini-batches that the choice was verified with; others are
            compared here, if the plan depends on them.
        results: Memory of results on the host; None: fresh for each.
        cancelled: Polled between mini-batches.

    Returns:
        An operator that is ready to multiply.

    Raises:
        CurvatureUnverified: If the plan is wrong for the shapes of this part.
        NotDeterministic: If two products disagree.
    """
    problem = problem.restricted(spec)
    if not _sizes(problem, choice.plan) <= set(verified):
        wrong, beside = _wrong(problem, spec, choice, verified)
        if wrong:
            msg = (
                f"mode {choice.plan.mode} disagrees with {beside} on a mini-batch "
                f"of another size, in {', '.join(wrong)}: choose a batch_size that "
                "divides the data points, or ask for plan='first'"
            )
            raise CurvatureUnverified(msg, parameters=", ".join(wrong))
    operator = Operator(problem, spec, choice, budget_bytes, None, results)
    operator.make_ready(cancelled=cancelled)
    return operator


def _wrong(
    problem: Problem, spec: OperatorSpec, choice: Choice, verified: Collection[int]
) -> tuple[tuple[str, ...], str]:
    """Compare a plan on mini-batches of other sizes.

    Returns:
        Names of the parameters whose rows disagree, and what they disagree with.
    """
    if not choice.evidence.projections:
        wrong = disagreements_of(problem, spec, choice.plan, choice.plainer)
        return wrong, choice.plainer
    reference = ProjectedReference(problem, spec, verified)
    evidence = reference.examine(choice.plan.mode)
    if evidence.out_of_memory:
        msg = "there is not enough memory to verify a mini-batch of another size"
        raise OutOfMemory(msg)
    failed = (evidence.failure,) if evidence.failure else ()
    return (*evidence.wrong, *failed), "central differences"


def structure_of(problem: Problem, spec: OperatorSpec) -> str:
    """Name what plans are remembered by; see `tuning.structure`."""
    return structure(problem.restricted(spec), spec)


def _sizes(problem: Problem, plan: Plan) -> frozenset[int]:
    """List the sizes of what is computed in one step."""
    data = on_host(problem.joined(plan.batches_at_once).data)
    return frozenset(len(batch.targets) for batch in data)
