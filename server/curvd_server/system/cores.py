"""How many cores this process may use: fewer than the machine has, in a container."""

from __future__ import annotations

import math
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Of cgroup v2: microseconds of CPU time in each period, and the period; or ``max``."""


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
