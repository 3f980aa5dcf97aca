"""Objectives whose parameters are shards: each of several processes holds a slice of each.

A whole parameter is gathered where the model uses it, and freed behind it; graphs that are
kept gather it again. To gather and to scatter are each the other's derivative, so the
engine differentiates shards as it does parameters, twice as well.

All processes of a group run the same commands in the same order, each on mini-batches of
its own, as many as the others have; `Group` compares what they have sent to each other.
Imports the objective; knows no operator, and not how processes are started or found.
"""

from __future__ import annotations

from curvd_server.engine.sharding.collectives import (
    Gather,
    Scatter,
    Shards,
    gather,
    length_of,
    scatter,
)
from curvd_server.engine.sharding.group import Broken, Group
from curvd_server.engine.sharding.sharded import (
    Cutter,
    held_bytes,
    in_step,
    moved,
    sharded,
    used_names,
    whole_layout,
)

__all__ = [
    "Broken",
    "Cutter",
    "Gather",
    "Group",
    "Scatter",
    "Shards",
    "gather",
    "held_bytes",
    "in_step",
    "length_of",
    "moved",
    "scatter",
    "sharded",
    "used_names",
    "whole_layout",
]
