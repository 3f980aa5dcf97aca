"""The methods of the contract: one short method per RPC, on top of sessions.

Judges what comes in, streams what goes out. Imports the contract, sessions, devices and
`curvd_server.linalg`; models and objectives are none of its business.
"""

from __future__ import annotations

from curvd_server.service.curvature_service import CurvatureService
from curvd_server.service.endpoint import serving
from curvd_server.service.metrics import exposed
from curvd_server.service.query_service import QueryService
from curvd_server.service.session_service import SessionService
from curvd_server.service.status import Sources, status_of

__all__ = [
    "CurvatureService",
    "QueryService",
    "SessionService",
    "Sources",
    "exposed",
    "serving",
    "status_of",
]
