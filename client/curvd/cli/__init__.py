"""The command line, ``curvd``: ``serve``, ``info``, ``health``, ``demo``, and queries.

A user of the client as any other; the server is imported when it is to be started.
"""

from __future__ import annotations

from curvd.cli.commands import main

__all__ = [
    "main",
]
