"""Where connections come in: who calls, what strangers may take, and HTTP/2 of our own.

Imports `curvd.http2` and `curvd_server.system`; knows methods by their names only, and
neither sessions nor torch.
"""

from __future__ import annotations

from curvd_server.transport.access import USUAL_LINES, AccessLog
from curvd_server.transport.addresses import bound, cleared, target_of
from curvd_server.transport.admission import raise_descriptor_limit
from curvd_server.transport.callers import Callers
from curvd_server.transport.calls import Calls, Context
from curvd_server.transport.drops import Drops
from curvd_server.transport.interceptors import Gate, TokenInterceptor
from curvd_server.transport.limits import ConnectionLimits
from curvd_server.transport.listener import Front
from curvd_server.transport.stalls import Stalled, StallGuard
from curvd_server.transport.tally import BOUNDS_S, Tally
from curvd_server.transport.token_file import TokenFile

__all__ = [
    "BOUNDS_S",
    "USUAL_LINES",
    "AccessLog",
    "Callers",
    "Calls",
    "ConnectionLimits",
    "Context",
    "Drops",
    "Front",
    "Gate",
    "StallGuard",
    "Stalled",
    "Tally",
    "TokenFile",
    "TokenInterceptor",
    "bound",
    "cleared",
    "raise_descriptor_limit",
    "target_of",
]
