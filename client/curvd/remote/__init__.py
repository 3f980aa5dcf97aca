"""The blocking client: what a caller holds while the work is done elsewhere.

A client, its sessions, their operators and queries; `curvd.aio` has the same names with
``await``. Imports calls and transport; what it returns are values of `curvd.contract` and
`curvd.results`.
"""

from __future__ import annotations

from curvd.remote.algebra import Algebra, Identity, Indices, dense_bytes
from curvd.remote.asking import AsyncAsks
from curvd.remote.client import Client, checked, configured, connect
from curvd.remote.factored import Functions
from curvd.remote.ggn_queries import GgnQueries
from curvd.remote.jacobian import AsyncJacobian, Jacobian
from curvd.remote.operator import OperatorBase, RemoteOperator
from curvd.remote.operator_sum import AsyncOperatorSum, OperatorSum
from curvd.remote.progress import ClientStages, opening, shown
from curvd.remote.queries import DataPointQueries, OperatorQueries
from curvd.remote.queries.base import check_drawable
from curvd.remote.session import Session
from curvd.remote.session_base import SessionBase
from curvd.remote.stored_vectors import AsyncStoredVectors
from curvd.remote.submatrix import AsyncSubmatrix, Submatrix
from curvd.remote.torch_names import AsyncMultiplies

__all__ = [
    "Algebra",
    "AsyncAsks",
    "AsyncJacobian",
    "AsyncMultiplies",
    "AsyncOperatorSum",
    "AsyncStoredVectors",
    "AsyncSubmatrix",
    "Client",
    "ClientStages",
    "DataPointQueries",
    "Functions",
    "GgnQueries",
    "Identity",
    "Indices",
    "Jacobian",
    "OperatorBase",
    "OperatorQueries",
    "OperatorSum",
    "RemoteOperator",
    "Session",
    "SessionBase",
    "Submatrix",
    "check_drawable",
    "checked",
    "configured",
    "connect",
    "dense_bytes",
    "opening",
    "shown",
]
