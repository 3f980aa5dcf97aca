"""Plans: the candidates for an operator, timed, and the fastest that is right.

Imports operators and verification.
"""

from __future__ import annotations

from curvd_server.engine.tuning.bit_invariance import is_alike, steps
from curvd_server.engine.tuning.plan import Choice, Memory, Plan, choose

__all__ = [
    "Choice",
    "Memory",
    "Plan",
    "choose",
    "is_alike",
    "steps",
]
