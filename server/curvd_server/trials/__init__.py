"""Models of strangers are tried in processes of their own, bounded in time and memory.

The pool of such processes and what runs in them. Knows torch only there.
"""

from __future__ import annotations

from curvd_server.trials.pool import PEER, Trials, start

__all__ = [
    "PEER",
    "Trials",
    "start",
]
