"""Graphs are run: tried without memory, then interpreted operator by operator.

An operator that the allow-list does not name has no function here. Imports torch and
`curvd_server.graph`; knows no dataset and no curvature.
"""

from __future__ import annotations

from curvd_server.graph.execution.dryrun import DryRun, dry_run
from curvd_server.graph.execution.interpret import Interpreter
from curvd_server.graph.execution.loss import CustomLoss
from curvd_server.graph.execution.module import GraphModule
from curvd_server.graph.execution.operators import without_onednn

__all__ = [
    "CustomLoss",
    "DryRun",
    "GraphModule",
    "Interpreter",
    "dry_run",
    "without_onednn",
]
