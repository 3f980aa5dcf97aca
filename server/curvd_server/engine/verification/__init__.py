"""The truth about a linearisation: finite differences in float64, symmetry, repeatability.

Small models are compared entry by entry (`verify`), and those of which no float64 copies
fit by projections, layer by layer (`projected`); `size` decides which. Then modes are held
against one another where they will be used (`agreement`).

Imports objective, program and operators; an operator that it refuses is not served.
"""

from __future__ import annotations

from curvd_server.engine.verification.agreement import disagreements
from curvd_server.engine.verification.determinism import check_repeatable
from curvd_server.engine.verification.gradient import check_gradient, explanation
from curvd_server.engine.verification.projected import LEAN, ProjectedReference
from curvd_server.engine.verification.size import reference_of
from curvd_server.engine.verification.verify import Evidence, Reference

__all__ = [
    "LEAN",
    "Evidence",
    "ProjectedReference",
    "Reference",
    "check_gradient",
    "check_repeatable",
    "disagreements",
    "explanation",
    "reference_of",
]
