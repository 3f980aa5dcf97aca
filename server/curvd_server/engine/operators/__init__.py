"""Operators, a file each, with a linearisation at one mini-batch in every AD mode.

Imports objective and program; knows nothing of timing and of truth.
"""

from __future__ import annotations

from curvd_server.engine.operators.linearize import (
    MODES,
    TRACED,
    block_ranges,
    cached_bytes,
)
from curvd_server.engine.operators.protocol import (
    Definition,
    Differences,
    Linearisation,
)
from curvd_server.engine.operators.registry import LINEARISED, definition

__all__ = [
    "LINEARISED",
    "MODES",
    "TRACED",
    "Definition",
    "Differences",
    "Linearisation",
    "block_ranges",
    "cached_bytes",
    "definition",
]
