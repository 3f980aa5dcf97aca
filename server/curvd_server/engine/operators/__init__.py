"""Linearisations: what each operator does at one mini-batch, in every mode it can be had.

Imports objective and program; knows nothing of timing and of truth.
"""

from __future__ import annotations

from curvd_server.engine.operators.linearize import (
    MODES,
    Linearisation,
    block_ranges,
    kept_bytes,
)

__all__ = [
    "MODES",
    "Linearisation",
    "block_ranges",
    "kept_bytes",
]
