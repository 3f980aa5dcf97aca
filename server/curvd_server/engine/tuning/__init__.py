"""How an operator may be computed: plans are timed, and the fastest that is right is taken.

Imports operators and verification.
"""

from __future__ import annotations

from curvd_server.engine.tuning.autotune import PlanTimer, is_faster
from curvd_server.engine.tuning.bit_invariance import is_alike, steps
from curvd_server.engine.tuning.chosen_anew import BUSY, Renewed
from curvd_server.engine.tuning.plan import (
    Choice,
    Memory,
    Plan,
    begin,
    choose,
    choose_among,
    choose_untimed,
    disagreements_of,
    recall,
    remember,
    structure,
)

__all__ = [
    "BUSY",
    "Choice",
    "Memory",
    "Plan",
    "PlanTimer",
    "Renewed",
    "begin",
    "choose",
    "choose_among",
    "choose_untimed",
    "disagreements_of",
    "is_alike",
    "is_faster",
    "recall",
    "remember",
    "steps",
    "structure",
]
