"""Operators on shards of the parameters: decided in step, and made anew where one was lost.

All processes verify the operator as it will be used, with the truth of all shards, so they
come to the same verdict. What else decides how a product goes, which is what of it is kept,
is handed on, so that a process that comes later goes the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from curvd.contract import OperatorSpec
from curvd.tensors import Pool
from curvd_server.engine.objective import Problem, check_cancelled, never
from curvd_server.engine.operator import Operator
from curvd_server.engine.operators import definition
from curvd_server.engine.tuning import Choice, choose_among
from curvd_server.engine.verification import Reference

_MODES = ("double_backward",)
"""Others have no place for what processes send to each other."""


def build_in_step(
    problem: Problem,
    spec: OperatorSpec,
    *,
    budget_bytes: int,
    results: Pool | None = None,
    cancelled: Callable[[], bool] = never,
) -> Operator:
    """Verify an operator on shards, and build it; all processes at once.

    Args:
        problem: The objective on this process' shards.
        spec: The operator.
        budget_bytes: Memory of each process for cached linearisations.
        results: Memory of results on the host; None: fresh for each.
        cancelled: Says the same to all processes.

    Returns:
        An operator that is ready to multiply.

    Raises:
        InvalidSpec: If its loss has no such operator.
        NotDeterministic: If two evaluations disagree.
        CurvatureUnverified: If double backward is wrong.
        OutOfMemory: If the host cannot hold what an examination takes.
    """
    problem = problem.restricted(spec)
    definition(spec.kind).check_loss(problem.loss.spec.name, spec)
    reference = Reference(problem, spec)
    reference.check_objective()
    check_cancelled(cancelled)
    choice = choose_among(
        _MODES,
        problem,
        lambda mode: reference.examine(mode, batched=False),
        cancelled=cancelled,
    )
    operator = Operator(problem, spec, choice, budget_bytes, None, results)
    operator.make_ready(cancelled=cancelled)
    return operator


def made_anew(
    problem: Problem,
    spec: OperatorSpec,
    choice: Choice,
    *,
    budget_bytes: int,
    sizes: Sequence[int],
    results: Pool | None = None,
) -> Operator:
    """Make an operator that the others have; nothing is computed yet.

    Args:
        problem: The objective on this process' shards.
        spec: The operator.
        choice: How it is computed.
        budget_bytes: Memory of each process for cached linearisations.
        sizes: Bytes of each linearisation, as `Operator.sizes` says at the others.
        results: Memory of results on the host; None: fresh for each.

    Returns:
        The operator.
    """
    return Operator(
        problem.restricted(spec),
        spec,
        choice,
        budget_bytes,
        None,
        results,
        sizes=sizes,
    )
