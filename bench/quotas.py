"""One caller at his quotas: what does another notice?

    python bench/quotas.py [--check] [--only QUOTA ...] [--rounds N]

A real server, a process that multiplies small vectors as Ann, and one that is Ben, who is at
one of his quotas: he holds all of it and asks for more without a pause. Three kinds of
periods take turns: Ann alone; Ann beside Ben; and, as a control, Ann beside a process that
knows nothing of curvd and computes as much as Ben's process did a moment before, for on two
cores that alone costs her something, which no server can help. Ratios are taken within a
round, between neighbours, and their medians are shown. What counts is the one beside Ben over
that beside the control, if that is more than 1: two cores are simply shared out. Seconds of
a processor stand beside: what the server and Ben each took in a second; and how many more
descriptors the server had beside Ben.

Exits with 1 if a product of Ann's failed, if Ben was never refused for the quota, or there
was no storm; with --check also if the ratio that counts is more than 1.5.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import quotas_callers

from curvd_server.transport import token_file

MOST_RATIO = 1.5
PERIOD_S = 1.0
STORM_S = 6.0
"""Of a period beside a thousand connections: long enough that refusals are put off."""
SETTLED_S = 0.1
"""Between two periods: what was asked for in one is answered."""
GONE_S = 20.0
"""Until the server has noticed that a thousand connections are gone."""
FEW = 8
"""Descriptors that a server may have more or less of for reasons of its own."""
MOST_OPEN = 0.9
"""How much of the storm must be there: connections without a call make room for others."""
TABLE = """
[callers.ben]
sessions = 2
vector_bytes = 1_000_000
disk_bytes = 8_000_000
uploads = 1
columns = 8
calls = 4
connections = 16
"""
COLUMNS = (
    *("quota", "alone ms", "beside ms", "ratio", "control ratio", "counts", "p99 ms"),
    *("CPU server alone", "beside", "CPU Ben", "refused", "failed"),
    "connections",
)


class Caller:
    """A process of quotas_callers.py."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, quotas_callers.__file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def say(self, line: object) -> None:
        """Tell it something."""
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Wait for its answer."""
        line = self.process.stdout.readline()
        assert line, f"{self.process.args} has ended"
        return json.loads(line)

    def ask(self, line: object) -> dict[str, Any]:
        """Tell it something, and wait for its answer."""
        self.say(line)
        return self.hear()

    def close(self) -> None:
        """End it."""
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


@dataclass
class Row:
    """What the rounds of one quota found."""

    alone: list[dict] = field(default_factory=list)
    beside: list[dict] = field(default_factory=list)
    control: list[dict] = field(default_factory=list)
    bens: list[dict] = field(default_factory=list)
    opened: list[int] = field(default_factory=list)
    """Descriptors that the server had more of at the end of a period beside him."""

    def ratio(self, side: str) -> float:
        """How many times as long a product takes; the median round."""
        return statistics.median(
            with_["median_s"] / without["median_s"]
            for with_, without in zip(getattr(self, side), self.alone, strict=True)
        )

    @property
    def counts(self) -> float:
        """The ratio beside Ben, to that of the control where the control costs her."""
        return self.ratio("beside") / max(1.0, self.ratio("control"))

    def middle(self, side: str, key: str, scale: float = 1.0) -> float:
        """The median of a figure."""
        return scale * statistics.median(p[key] for p in getattr(self, side))

    @property
    def failures(self) -> Counter[str]:
        """Products of Ann's that failed, by error."""
        found = Counter()
        for period in (*self.alone, *self.beside, *self.control):
            found.update(period["failures"])
        return found

    @property
    def asked(self) -> Counter[str]:
        """What became of what Ben asked for."""
        found = Counter()
        for period in self.bens:
            found.update({k: n for k, n in period.items() if k != "cpu_s"})
        return found

    def line(self, name: str) -> str:
        """The row of the table."""
        asked, done = self.asked, self.asked["done"]
        cells = (
            name,
            f"{self.middle('alone', 'median_s', 1e3):.2f}",
            f"{self.middle('beside', 'median_s', 1e3):.2f}",
            f"{self.ratio('beside'):.2f}",
            f"{self.ratio('control'):.2f}",
            f"{self.counts:.2f}",
            f"{self.middle('beside', 'p99_s', 1e3):.1f}",
            f"{self.middle('alone', 'server_s'):.2f}",
            f"{self.middle('beside', 'server_s'):.2f}",
            f"{self.middle('bens', 'cpu_s'):.2f}",
            f"{asked[f'of {name}']} of {asked['refused'] + done}",
            f"{self.failures.total()}",
            f"{statistics.median(self.opened):.0f}",
        )
        return f"| {' | '.join(cells)} |"


@contextlib.contextmanager
def serving(folder: Path, tokens: dict[str, str]) -> Iterator[tuple[str, int]]:
    """A server with both callers: its target and its process."""
    for name, token in tokens.items():
        token_file.append(folder / "tokens", token_file.line_of(name, token))
    (folder / "quotas.toml").write_text(TABLE)
    command = [
        *(sys.executable, "-m", "curvd.cli", "serve", "--listen", "127.0.0.1:0"),
        *("--tokens", str(folder / "tokens"), "--quotas", str(folder / "quotas.toml")),
        *("--data-dir", str(folder / "data"), "--log-level", "error"),
        *("--compile-after-s", "0", "--drain-s", "0"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().split()[-1], process.pid
    finally:
        process.terminate()
        process.wait(60)


class Bench:
    """Periods of Ann's.

    Args:
        ann: Who multiplies.
        burner: The control.
        server: The server's process.
    """

    def __init__(self, ann: Caller, burner: Caller, server: int) -> None:
        self._ann, self._burner = ann, burner
        self._server, self._period_s = psutil.Process(server), PERIOD_S

    def period(self) -> dict:
        """Let Ann multiply, and see what the server takes for it."""
        before_s = sum(self._server.cpu_times()[:2])
        found = self._ann.ask(self._period_s)
        after_s = sum(self._server.cpu_times()[:2])
        return found | {"server_s": (after_s - before_s) / self._period_s}

    def round(self, ben: Caller, row: Row) -> None:
        """Ann alone, beside Ben, and beside somebody who only computes."""
        row.alone.append(self.period())
        before = self._server.num_fds()
        ben.ask("go")
        row.beside.append(self.period())
        row.opened.append(self._server.num_fds() - before)
        row.bens.append(ben.ask("stop"))
        self._settle(before)
        row.bens[-1]["cpu_s"] /= self._period_s
        share = min(1.0, row.bens[-1]["cpu_s"])
        self._burner.say(f"{self._period_s} {share}")
        row.control.append(self.period())
        self._burner.hear()

    def _settle(self, before: int) -> None:
        """Wait until nothing of Ben's is under way."""
        time.sleep(SETTLED_S)
        end_s = time.monotonic() + GONE_S
        while self._server.num_fds() > before + FEW and time.monotonic() < end_s:
            time.sleep(SETTLED_S)

    def quota(self, name: str, ben: Caller, rounds: int) -> Row:
        """Measure one quota."""
        ben.ask(name)
        row = Row()
        self._period_s = STORM_S if name == "connections" else PERIOD_S
        for _ in range(rounds):
            self.round(ben, row)
        ben.say("end")
        return row


def main() -> int:
    """Measure each quota."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit non-zero on a miss")
    parser.add_argument("--only", nargs="*", choices=list(quotas_callers.QUOTAS))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    tokens = {name: token_file.new_token() for name in ("ann", "ben")}
    missed = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        target, server = stack.enter_context(serving(folder, tokens))
        burner = Caller("burner")
        ann, ben = (Caller(name, target, tokens[name]) for name in ("ann", "ben"))
        for caller in (burner, ann, ben):
            stack.callback(caller.close)
        for caller in (ann, ben):
            caller.hear()
        bench = Bench(ann, burner, server)
        print(f"load {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} cores\n")
        print(f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|", flush=True)
        for name in given.only or quotas_callers.QUOTAS:
            row = bench.quota(name, ben, given.rounds)
            print(row.line(name), flush=True)
            if row.failures:
                missed.append(f"{name}: {dict(row.failures)} failed")
            if not row.asked[f"of {name}"]:
                missed.append(f"{name}: nothing was refused: {dict(row.asked)}")
            least = MOST_OPEN * quotas_callers.STORM
            if name == "connections" and min(row.opened) < least:
                missed.append(f"{name}: no storm, {row.opened} were open")
            if given.check and row.counts > MOST_RATIO:
                missed.append(f"{name}: {row.counts:.2f} > {MOST_RATIO}")
    for text in missed:
        print("MISSED", text)
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
