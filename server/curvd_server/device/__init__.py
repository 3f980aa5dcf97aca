"""Who computes: what the server needs of a device, and the queue of products before it.

The protocols and the batcher know no torch; `curvd_server.device.torch_device` is the one
device there is, and is imported where it is made.
"""

from __future__ import annotations

from curvd_server.device.batcher import Batcher, BatcherStatistics
from curvd_server.device.paces import LONG_S
from curvd_server.device.protocols import Array, Counted, Device, Operator, Problem
from curvd_server.device.requests import Done, Ticket
from curvd_server.device.room import Reservation

__all__ = [
    "LONG_S",
    "Array",
    "Batcher",
    "BatcherStatistics",
    "Counted",
    "Device",
    "Done",
    "Operator",
    "Problem",
    "Reservation",
    "Ticket",
]
