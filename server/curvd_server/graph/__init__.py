"""Models and losses as graphs, a list of operators: decoded and checked here.

Knows no torch: a graph is judged before it costs anything. `curvd_server.graph.execution`
runs them.
"""

from __future__ import annotations

from curvd_server.graph.decoder import canonical, decode

__all__ = [
    "canonical",
    "decode",
]
