"""HTTP/2 as gRPC uses it (RFC 9113), for payloads that are received and sent in place.

Nothing in here waits or opens a socket: a caller polls, or waits in its event loop, for what
a call says it needs. Imports `curvd.contract` and `curvd.errors`; knows no tensor and no
method of the contract.
"""

from __future__ import annotations

from curvd.http2.call import CallOptions, Wait, make_call
from curvd.http2.connection import H2Connection
from curvd.http2.frames import RECOGNISED, Code, Kind, Setting
from curvd.http2.messages import (
    BufferProvider,
    Format,
    Landed,
    ReceivesInPlace,
    framed,
    joined,
    not_looked_at,
)
from curvd.http2.peer import LONGEST_CHUNK
from curvd.http2.sockets import tune
from curvd.http2.stream import Headers, ProtocolError, Stream

__all__ = [
    "LONGEST_CHUNK",
    "RECOGNISED",
    "BufferProvider",
    "CallOptions",
    "Code",
    "Format",
    "H2Connection",
    "Headers",
    "Kind",
    "Landed",
    "ProtocolError",
    "ReceivesInPlace",
    "Setting",
    "Stream",
    "Wait",
    "framed",
    "joined",
    "make_call",
    "not_looked_at",
    "tune",
]
