"""HTTP/2 as gRPC uses it (RFC 9113), for payloads that are received and sent in place.

Nothing in here waits or opens a socket: a caller polls, or waits in its event loop, for what
a call says it needs. Imports `curvd.contract` and `curvd.errors`; knows no tensor and no
method of the contract.
"""

from __future__ import annotations

from curvd.http2.call import Terms, Wait, exchange
from curvd.http2.connection import Line
from curvd.http2.frames import RECOGNISED, Code, Kind, Setting
from curvd.http2.messages import Format, InPlace, Room, framed
from curvd.http2.sockets import tune
from curvd.http2.stream import Broken, Headers, Stream

__all__ = [
    "RECOGNISED",
    "Broken",
    "Code",
    "Format",
    "Headers",
    "InPlace",
    "Kind",
    "Line",
    "Room",
    "Setting",
    "Stream",
    "Terms",
    "Wait",
    "exchange",
    "framed",
    "tune",
]
