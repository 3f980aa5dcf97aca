"""Workers behind the device protocol: each holds shards of the data, and products are summed.

The front asks over connections of its own, in typed messages (`fleet`, `messages`), and starts
who is lost anew (`keeper`). What workers run is the engine, as it is. Imports devices, the
engine and storage by their doors; knows no session and no gRPC.
"""

from __future__ import annotations

from curvd_server.fleet.device import FleetDevice
from curvd_server.fleet.fleet import Fleet
from curvd_server.fleet.launcher import Invitation, Launcher, LocalLauncher
from curvd_server.fleet.ray_launcher import RayLauncher
from curvd_server.fleet.sharded_device import ShardedDevice

__all__ = [
    "Fleet",
    "FleetDevice",
    "Invitation",
    "Launcher",
    "LocalLauncher",
    "RayLauncher",
    "ShardedDevice",
]
