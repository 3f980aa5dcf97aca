"""How many cores this process may use, and whether others want them, too.

They are fewer than the machine has, in a container.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Of cgroup v2: microseconds of CPU time in each period, and the period; or ``max``."""


_SCHEDULED = Path("/proc/thread-self/schedstat")
"""Of Linux: nanoseconds that a thread ran, and that it waited for a core."""
_PROBE_S = 0.02
"""Seconds of computing that show whether others want the core: several time slices."""
_QUIET = 0.05
"""Waiting per second of computing on a quiet machine, at most."""


def waited_s(scheduled: Path = _SCHEDULED) -> float:
    """Say how long this thread has waited for a core while it could have computed.

    Args:
        scheduled: Where the system tells.

    Returns:
        Seconds; 0 where it does not tell.
    """
    try:
        return int(scheduled.read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def is_quiet(
    clock: Callable[[], float] = time.thread_time,
    waited: Callable[[], float] = waited_s,
) -> bool:
    """Find out whether a thread that computes has a core for itself.

    Args:
        clock: Seconds that this thread has computed.
        waited: Seconds that it has waited for a core.

    Returns:
        Whether it hardly waited.
    """
    start_s, before_s = clock(), waited()
    while clock() - start_s < _PROBE_S:
        pass
    return waited() - before_s <= _QUIET * _PROBE_S


def usable_cores(quota: Path = _QUOTA) -> int:
    """Count the cores that a process may use.

    Args:
        quota: File with the quota of its control group.

    Returns:
        Those of its affinity, or fewer if its quota of CPU time is less; at least one.
    """
    return max(1, min(len(os.sched_getaffinity(0)), _cores_of(quota)))


def _cores_of(quota: Path) -> int:
    """Read a quota as cores; what is no quota limits nothing."""
    try:
        spent_us, period_us = quota.read_text().split()
        return math.ceil(int(spent_us) / int(period_us))
    except (OSError, ValueError, ZeroDivisionError):
        return os.cpu_count() or 1
