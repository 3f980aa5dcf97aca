"""How an operator may be computed: plans are timed, and the fastest that is right is taken.

Imports operators and verification.
"""

from __future__ import annotations

from curvd_server.engine.tuning.bit_invariance import is_alike, steps
from curvd_server.engine.tuning.plan import Choice, Memory, Plan, begin, choose

__all__ = [
    "Choice",
    "Memory",
    "Plan",
    "begin",
    "choose",
    "is_alike",
    "steps",
]
