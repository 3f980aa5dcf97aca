"""The blocking client: what a caller holds while the work is done elsewhere.

A client, its sessions, their operators and queries; `curvd.aio` has the same names with
``await``. Imports calls and transport; what it returns are values of `curvd.contract` and
`curvd.results`.
"""

from __future__ import annotations

from curvd.remote.asking import AsyncAsks
from curvd.remote.client import Client, configured, connect
from curvd.remote.operator import OperatorBase, RemoteOperator
from curvd.remote.progress import shown
from curvd.remote.queries import DataPointQueries, OperatorQueries
from curvd.remote.session import Session
from curvd.remote.session_base import SessionBase, name_of

__all__ = [
    "AsyncAsks",
    "Client",
    "DataPointQueries",
    "OperatorBase",
    "OperatorQueries",
    "RemoteOperator",
    "Session",
    "SessionBase",
    "configured",
    "connect",
    "name_of",
    "shown",
]
