"""What the process has of its machine, what goes on in it, and who calls it.

Memory, disk errors, logs, turns between threads, how far long work is, callers. At the bottom
of the server: imports nothing of it, and knows neither torch nor grpc.
"""

from __future__ import annotations

from curvd_server.system.activities import (
    Activities,
    Ongoing,
    advance,
    enter_stage,
)
from curvd_server.system.cooperative import (
    LongWork,
    Poll,
    Threads,
    alone,
    given_up,
    is_shared,
    undivided,
    yield_point,
)
from curvd_server.system.cores import is_quiet, usable_cores, waited_s
from curvd_server.system.ending import end_within, uninterrupted
from curvd_server.system.faults import FREE_SOME, is_out_of_memory, released, told
from curvd_server.system.garbage import (
    collect_if_due,
    look_at_all,
    look_before_refusing,
    none_while_building,
)
from curvd_server.system.host_memory import (
    CALLS,
    RESULTS,
    SNAPSHOTS,
    VECTORS,
    HostMemory,
    default_bytes,
)
from curvd_server.system.identity import (
    CALLING,
    EVERYBODY,
    GROUP_MARK,
    OPERATOR,
    ROLES,
    USER,
    Identity,
    calling,
    check_share,
)
from curvd_server.system.logs import logger
from curvd_server.system.quotas import COLUMNS, Quota, Quotas
from curvd_server.system.traced import TRACED, Traces, together

__all__ = [
    "CALLING",
    "CALLS",
    "COLUMNS",
    "EVERYBODY",
    "FREE_SOME",
    "GROUP_MARK",
    "OPERATOR",
    "RESULTS",
    "ROLES",
    "SNAPSHOTS",
    "TRACED",
    "USER",
    "VECTORS",
    "Activities",
    "HostMemory",
    "Identity",
    "LongWork",
    "Ongoing",
    "Poll",
    "Quota",
    "Quotas",
    "Threads",
    "Traces",
    "advance",
    "alone",
    "calling",
    "check_share",
    "collect_if_due",
    "default_bytes",
    "end_within",
    "enter_stage",
    "given_up",
    "is_out_of_memory",
    "is_quiet",
    "is_shared",
    "logger",
    "look_at_all",
    "look_before_refusing",
    "none_while_building",
    "released",
    "together",
    "told",
    "undivided",
    "uninterrupted",
    "usable_cores",
    "waited_s",
    "yield_point",
]
