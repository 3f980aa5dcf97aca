"""From a target to answered calls: connections, retries, and why a server is not reached.

Carries `curvd._calls`, blocking or in an event loop, over HTTP/2 of our own or grpcio's
channel. Knows no session and no operator.
"""

from __future__ import annotations

from curvd._transport.connection import AsyncConnection, Connection
from curvd._transport.process import Process, current_process

__all__ = [
    "AsyncConnection",
    "Connection",
    "Process",
    "current_process",
]
