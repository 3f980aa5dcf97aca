"""The truth about a linearisation: finite differences in float64, symmetry, repeatability.

Imports objective, program and operators; an operator that it refuses is not served.
"""

from __future__ import annotations

from curvd_server.engine.verification.determinism import (
    check_objective,
    check_repeatable,
)
from curvd_server.engine.verification.gradient import check_gradient, explanation
from curvd_server.engine.verification.verify import Evidence, Reference, disagreements

__all__ = [
    "Evidence",
    "Reference",
    "check_gradient",
    "check_objective",
    "check_repeatable",
    "disagreements",
    "explanation",
]
