"""How a server fares <-> messages; see `curvd.contract.convert`."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from curvd.contract import infos
from curvd.v1 import session_service_pb2 as session_pb

_MAPS = ("operators", "memory_bytes")


def status_to_proto(
    status: infos.ServerStatus | None,
) -> session_pb.ServerStatus | None:
    """Convert how a server fares; None stays None."""
    return None if status is None else session_pb.ServerStatus(**asdict(status))


def status_from_proto(
    message: session_pb.GetServerInfoResponse,
) -> infos.ServerStatus | None:
    """Read how a server fares; None: it does not say, as older ones."""
    if not message.HasField("status"):
        return None
    status = message.status
    told: dict[str, Any] = {
        f.name: getattr(status, f.name) for f in fields(infos.ServerStatus)
    }
    return infos.ServerStatus(**told | {name: dict(told[name]) for name in _MAPS})
