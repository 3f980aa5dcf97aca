"""Sessions: their parameters, versions, operators and stored vectors, and how they end.

Imports devices and storage by their doors; knows neither torch nor messages of the contract.
"""

from __future__ import annotations

from curvd_server.sessions.opening import NewSession
from curvd_server.sessions.session import Lease, SessionDependencies, Update
from curvd_server.sessions.store import SessionStatistics, SessionStore
from curvd_server.sessions.stored_vectors import Vector, Vectors, check_same

__all__ = [
    "Lease",
    "NewSession",
    "SessionDependencies",
    "SessionStatistics",
    "SessionStore",
    "Update",
    "Vector",
    "Vectors",
    "check_same",
]
