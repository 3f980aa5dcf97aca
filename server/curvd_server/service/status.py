"""How a server fares: what knows its numbers, and these as callers see them."""

from __future__ import annotations

from dataclasses import dataclass

from curvd.contract import ServerStatus
from curvd_server.device import Batcher, Device
from curvd_server.sessions import SessionStore
from curvd_server.system import Activities, HostMemory
from curvd_server.transport import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What knows the numbers of a server."""

    version: str
    batcher: Batcher
    sessions: SessionStore
    memory: HostMemory
    device: Device
    activities: Activities
    tally: Tally


def status_of(sources: Sources) -> ServerStatus:
    """Read the numbers at one moment; on any thread, and without waiting for the device.

    Args:
        sources: What knows them.

    Returns:
        Those of all callers together, which tell nothing about any of them.
    """
    queue, sessions = sources.batcher.statistics(), sources.sessions.statistics()
    tally = sources.tally
    ended = dict(tally.ended)
    return ServerStatus(
        uptime_s=tally.age_s,
        calls=sum(ended.values()),
        failed_calls=sum(n for (_, code), n in ended.items() if code != "OK"),
        calls_under_way=tally.under_way,
        products=queue.products,
        columns=queue.columns,
        query_columns=queue.query_columns,
        queue_requests=queue.waiting,
        queue_columns=queue.reserved_columns,
        queue_bytes=queue.reserved_bytes,
        ready_sessions=sessions.ready,
        cold_sessions=sessions.cold,
        operators={str(tier): count for tier, count in sessions.tiers.items()},
        memory_bytes=sources.memory.held(),
        memory_limit_bytes=int(sources.memory.limit_bytes),
        connections=tally.connections().get("open", 0),
    )
