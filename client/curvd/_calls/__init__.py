"""Every call of the contract as parts to send and parts to receive, without I/O.

The blocking and the asyncio client share it, and tests run it without a server. Imports
values and tensors; knows no connection and never waits.
"""

from __future__ import annotations

from curvd._calls.base import Call
from curvd._calls.opening import ObserveOpening
from curvd._calls.query import Observe, QueryCall
from curvd._calls.query_answer import Answer
from curvd._calls.query_requests import Queries
from curvd._calls.tensor_stream import OWN_TYPE, TensorStream
from curvd._calls.upload import Progress, Tensors

__all__ = [
    "OWN_TYPE",
    "Answer",
    "Call",
    "Observe",
    "ObserveOpening",
    "Progress",
    "Queries",
    "QueryCall",
    "TensorStream",
    "Tensors",
]
