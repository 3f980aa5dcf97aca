"""Which models are verified entry by entry, and which layer by layer."""

from __future__ import annotations

from curvd.contract import OperatorSpec
from curvd_server.engine.objective import Problem
from curvd_server.engine.verification.projected import ProjectedReference
from curvd_server.engine.verification.verify import Reference, whole_bytes
from curvd_server.system import default_bytes

SHARE = 0.25
"""Of what a server may hold of its host's memory. It is what the machine has, not what is
free now, that decides: the same model is verified, and computed, alike every time."""


def is_large(problem: Problem) -> bool:
    """Tell whether a problem's float64 vectors would take too much of the host."""
    return whole_bytes(problem) > SHARE * default_bytes()


def reference_of(
    problem: Problem, spec: OperatorSpec
) -> Reference | ProjectedReference:
    """Choose what an operator is compared with.

    Args:
        problem: The objective.
        spec: The operator.

    Returns:
        Its reference.

    Raises:
        OutOfMemory: If the host cannot hold what a small problem's examination takes.
    """
    kind = ProjectedReference if is_large(problem) else Reference
    return kind(problem, spec)
