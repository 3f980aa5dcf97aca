"""What a server says about itself: what it offers, refuses, computes with and has done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from curvd.contract.progress import Activity


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server refuses to exceed."""

    upload_bytes: int
    operand_bytes: int
    header_bytes: int
    columns: int
    pending_columns: int
    sessions: int
    default_budget_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """A device that computes."""

    name: str
    description: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """A process that has a share of the data, where a server computes with several."""

    rank: int
    """From 0; consecutive ranks have consecutive shards."""
    device: str
    host: str
    """Name of the machine that it runs on; empty: it is being started."""
    pid: int
    """Its process there; 0: it is being started."""
    shards: int
    """How many of the shards it has, of data with mini-batches for all of them."""
    ready: bool
    """Whether it holds all that it should, and answers."""
    restarts: int
    """How often another one took its place."""
    lost: str
    """Why the latest one was lost; empty: none was."""
    parameter_bytes: int = 0
    """Of its slices of parameters, of all versions; 0: workers hold whole parameters."""
    whole_bytes: int = 0
    """Of whole parameters that it had gathered at once since it began, the most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """How a server fares: what it has done since it began, and what it holds now.

    The numbers are those of all callers together.
    """

    uptime_s: float
    """Seconds since it began."""
    calls: int
    """Calls that have ended."""
    failed_calls: int
    """Those of them that failed, or were cancelled."""
    calls_under_way: int
    products: int
    """Products of callers that ran; a MatMat is one for each of its blocks of columns."""
    columns: int
    """Columns of these."""
    query_columns: int
    """Columns that queries have multiplied."""
    queue_requests: int
    """Requests that wait for the device."""
    queue_columns: int
    """Columns of products under way."""
    queue_bytes: int
    """Memory of products under way."""
    ready_sessions: int
    """Sessions on the device."""
    cold_sessions: int
    """Sessions that warm up at their next use."""
    operators: Mapping[str, int]
    """Operators that are built, by tier: ``first``, ``final``, ``native`` for native code."""
    memory_bytes: Mapping[str, int]
    """Memory of the host that is held, by what for."""
    memory_limit_bytes: int
    """The limit of that."""
    connections: int
    """Connections that are open; 0 where grpcio has the port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server is and offers."""

    version: str
    torch_version: str
    limits: Limits
    devices: tuple[DeviceInfo, ...]
    builders: tuple[str, ...]
    capabilities: tuple[str, ...]
    datasets: tuple[str, ...] = ()
    """Names of the datasets that lie on the server."""
    activities: tuple[Activity, ...] = ()
    """What takes long and goes on right now, the oldest first."""
    workers: tuple[WorkerInfo, ...] = ()
    """The processes that compute, by rank; none: the server itself does."""
    generation: int = 0
    """How often a worker became ready; it grows when one is lost and comes back."""
    status: ServerStatus | None = None
    """How it fares; None: it does not say, as older ones."""

    def __repr__(self) -> str:
        devices = ", ".join(d.name for d in self.devices)
        return (
            f"<ServerInfo curvd {self.version}, torch {self.torch_version}, {devices}, "
            f"{len(self.builders)} builders, {len(self.datasets)} datasets>"
        )
