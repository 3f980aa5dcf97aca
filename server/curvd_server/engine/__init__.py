"""Curvature operators: built once with evidence and a plan, applied any number of times.

`objective` is the function that is differentiated, `operators` its linearisations, `program`
their linear part, `tuning` finds the fastest way, `verification` proves it. Imports torch and
graphs; knows no network, no storage and no session.
"""

from __future__ import annotations

from curvd_server.engine.choose_again import choose_again, is_in_doubt
from curvd_server.engine.finite import check_finite_gradient, finite_gradient
from curvd_server.engine.objective import (
    Cut,
    Problem,
    check_batch_axis,
    use_differentiable_attention,
)
from curvd_server.engine.program import Compiler
from curvd_server.engine.threads import use_threads
from curvd_server.engine.tuning import Memory
from curvd_server.engine.verification import check_gradient

__all__ = [
    "Compiler",
    "Cut",
    "Memory",
    "Problem",
    "check_batch_axis",
    "check_finite_gradient",
    "check_gradient",
    "choose_again",
    "finite_gradient",
    "is_in_doubt",
    "use_differentiable_attention",
    "use_threads",
]
