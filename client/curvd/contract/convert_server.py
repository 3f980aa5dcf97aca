"""What a server says about itself <-> messages; see `curvd.contract.convert`."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from curvd.contract import server_info
from curvd.contract.convert_activities import activities_from_proto, activity_to_proto
from curvd.contract.convert_fields import same_names
from curvd.v1 import session_service_pb2 as session_pb

_MAPS = ("operators", "memory_bytes")


def server_info_to_proto(
    info: server_info.ServerInfo,
) -> session_pb.GetServerInfoResponse:
    """Convert a server's description."""
    return session_pb.GetServerInfoResponse(
        version=info.version,
        torch_version=info.torch_version,
        limits=session_pb.Limits(**asdict(info.limits)),
        devices=[session_pb.Device(**asdict(d)) for d in info.devices],
        builders=info.builders,
        capabilities=info.capabilities,
        datasets=info.datasets,
        activities=map(activity_to_proto, info.activities),
        workers=[session_pb.Worker(**asdict(w)) for w in info.workers],
        generation=info.generation,
        status=_status_to_proto(info.status),
    )


def server_info_from_proto(
    message: session_pb.GetServerInfoResponse,
) -> server_info.ServerInfo:
    """Convert a server's description."""
    return server_info.ServerInfo(
        version=message.version,
        torch_version=message.torch_version,
        limits=same_names(server_info.Limits, message.limits),
        devices=tuple(same_names(server_info.DeviceInfo, d) for d in message.devices),
        builders=tuple(message.builders),
        capabilities=tuple(message.capabilities),
        datasets=tuple(message.datasets),
        activities=activities_from_proto(message.activities),
        workers=tuple(same_names(server_info.WorkerInfo, w) for w in message.workers),
        generation=message.generation,
        status=_status_from_proto(message),
    )


def _status_to_proto(
    status: server_info.ServerStatus | None,
) -> session_pb.ServerStatus | None:
    """Convert how a server fares; None stays None."""
    return None if status is None else session_pb.ServerStatus(**asdict(status))


def _status_from_proto(
    message: session_pb.GetServerInfoResponse,
) -> server_info.ServerStatus | None:
    """Read how a server fares; None: it does not say, as older ones."""
    if not message.HasField("status"):
        return None
    status = message.status
    told: dict[str, Any] = {
        f.name: getattr(status, f.name) for f in fields(server_info.ServerStatus)
    }
    return server_info.ServerStatus(**told | {name: dict(told[name]) for name in _MAPS})
