"""One user multiplies; another does everything else that is long. Who waits for whom?

    python bench/neighbours.py [--check] [--models small medium] [--only TEXT]

A real server, a process that multiplies without a pause, and this process, which opens
sessions, registers, uploads, queries and deletes. The multiplier's products are timed
alone, beside, and alone again; what the device did between a product's arrival and its
start is counted inside the server: turns of long work, and the longest step of one.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from neighbours_activities import ACTIVITIES, OPTIONS
from neighbours_multiplier import WIDTHS, Multiplier
from neighbours_server import Server

import curvd

ALONE_S = 4.0
LEAST_S = 3.0
"""How long a product is timed beside something, however short that is."""
MOST_TURNS = 2


def beside(name: str, size: str) -> dict[str, object]:
    """Time products alone, beside an activity, and alone again."""
    prepare = ACTIVITIES[name]
    with tempfile.TemporaryDirectory() as folder:
        options = {"compile_after_s": 0.0} | OPTIONS.get(name, {})
        server = Server(Path(folder), **options)
        with curvd.connect(server.target) as client:
            wants_target = len(inspect.signature(prepare).parameters) > 1
            run = prepare(client, server.target) if wants_target else prepare(client)
            multiplier = Multiplier(server.target, size)
            alone: list[float] = []
            times: list[float] = []
            with multiplier.timed(alone):
                time.sleep(ALONE_S)
            with multiplier.timed(times):
                start_s = time.monotonic()
                run()
                took_s = time.monotonic() - start_s
                time.sleep(max(0.0, LEAST_S - took_s))
            with multiplier.timed(alone):
                time.sleep(ALONE_S)
            multiplier.stop()
        counted = server.stop()
    return {"took_s": took_s, "alone": alone, "beside": times, **counted}


def quantiles(times: list[float]) -> str:
    """The median, the 99th percentile and the longest, in ms."""
    return " / ".join(f"{1e3 * q:.1f}" for q in np.quantile(times, [0.5, 0.99, 1.0]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--models", nargs="*", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--only", default="", help="activities with this in their name")
    arguments = parser.parse_args()
    missed = []
    print("| activity | net | took s | alone | beside | turns | longest step ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in ACTIVITIES:
        for size in arguments.models:
            if arguments.only not in name:
                continue
            row = beside(name, size)
            print(
                f"| {name} | {size} | {row['took_s']:.1f} | {quantiles(row['alone'])} "
                f"| {quantiles(row['beside'])} | {row['turns']} | {row['step_ms']:.0f} |",
                flush=True,
            )
            if row["turns"] > MOST_TURNS:
                missed.append(f"{name}, {size}: {row['turns']} turns")
    for text in missed:
        print("MISSED", text)
    return int(arguments.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
