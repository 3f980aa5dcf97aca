"""Whether what a process holds stays the same: samples, slopes, and their intervals."""

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from scipy import stats

CONFIDENCE = 0.95
MB = 1e6
HOUR_S = 3600.0


@dataclass(frozen=True)
class Slope:
    """How much something grows in an hour, with the ends of its interval."""

    value: float
    low: float
    high: float


def slope(at_s, values, every_s):
    """How fast the least of each period grows.

    What is free goes back to the system now and then, and work under way comes on top, so
    the least of a period is what is really held. The slope is Theil's and Sen's, the median
    of those of all pairs of periods: single outliers do not move it. Its interval holds
    for errors that are independent from period to period.

    Args:
        at_s: When, in seconds.
        values: What was held then.
        every_s: The length of a period.

    Returns:
        By the hour. None if there are fewer than five periods.
    """
    at_s, values = np.asarray(at_s), np.asarray(values)
    if len(at_s) == 0:
        return None
    periods = ((at_s - at_s[0]) // every_s).astype(int)
    least = [values[periods == number].min() for number in np.unique(periods)]
    if len(least) < 5:
        return None
    found = stats.theilslopes(least, np.unique(periods) * every_s, CONFIDENCE)
    middle, _, low, high = (float(number) * HOUR_S for number in found)
    return Slope(middle, low, high)


def folder_bytes(folder):
    """Bytes of the files in a folder and below."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue  # between the listing and the look
    return total


def held(process, folder):
    """What a server holds now, and we who ask it."""
    server = psutil.Process(process)
    children, resident = server.children(recursive=True), 0
    for child in children:
        try:
            resident += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue  # children that try models come and go
    return {
        "server, MB": server.memory_info().rss / MB,
        "its children, MB": resident / MB,
        "descriptors": server.num_fds(),
        "threads": server.num_threads(),
        "children": len(children),
        "data directory, MB": folder_bytes(folder) / MB,
        "clients, MB": psutil.Process().memory_info().rss / MB,
    }


@dataclass
class Watch:
    """Looks at a server again and again, in a thread of its own.

    Args:
        process: Its number.
        folder: Its data directory.
        every_s: Seconds between two looks.
    """

    process: int
    folder: Path
    every_s: float = 2.0
    at_s: list = field(default_factory=list)
    seen: dict = field(default_factory=dict)

    def __enter__(self):
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _look(self):
        begin_s = time.monotonic()
        while not self._over.wait(self.every_s):
            now_s = time.monotonic() - begin_s
            for what, value in held(self.process, self.folder).items():
                self.seen.setdefault(what, []).append(value)
            self.at_s.append(now_s)

    def table(self, warm_s, every_s, limits):
        """Lines of a table, and what grew faster than it may.

        Args:
            warm_s: Seconds that are not looked at: caches fill.
            every_s: The period of which the least counts.
            limits: How much each may grow in an hour.

        Returns:
            The lines, and the names of what has no slope, or one above its limit.
        """
        at_s = np.asarray(self.at_s)
        warm = at_s >= warm_s
        lines = [
            "| what | warm, least | most | by the hour | 95 % | limit |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        missed = []
        for what, limit in limits.items():
            values = np.asarray(self.seen.get(what, []))[warm[: len(self.at_s)]]
            found = slope(at_s[warm], values, every_s)
            if found is None:
                lines.append(f"| {what} | | | too short | | {limit:g} |")
                missed.append(what)
                continue
            lines.append(
                f"| {what} | {values.min():.1f} | {values.max():.1f} | "
                f"{found.value:+.1f} | {found.low:+.1f} to {found.high:+.1f} | "
                f"{limit:g} |"
            )
            if found.value > limit:
                missed.append(what)
        return lines, missed
