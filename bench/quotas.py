"""One caller at his quotas: what does another notice?

    python bench/quotas.py [--check] [--only QUOTA] [--rounds N]

A real server, a process that multiplies small vectors as one caller, and this process, which
is another caller at one of his quotas: he holds all of it and asks for more without a pause.
Periods with and without him alternate, and medians are compared in pairs of neighbours, so
that a machine that others use disturbs both alike. Exits with 1 if a product failed, or, with
--check, if one takes more than 1.5 times as long.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from neighbours_multiplier import WIDTHS, opened, points_of, registered

import curvd
from curvd_server.transport import token_file

MOST_RATIO = 1.5
PERIOD_S = 1.0
TABLE = """
[callers.ben]
sessions = 2
vector_bytes = 1_000_000
disk_bytes = 2_000_000
uploads = 1
columns = 8
calls = 4
"""
ONCE = curvd.ClientConfig(retry=curvd.RetryConfig(give_up_s=0))


def multiply(target: str, token: str) -> None:
    """Multiply one second for each line of the input; print the median and failures."""
    with curvd.connect(target, config=ONCE, token=token) as client:
        session = opened(client, WIDTHS["small"], plan="final")
        H, v = session.hessian(), np.ones(session.layout.size, np.float32)
        for _ in range(200):
            H @ v
        print("ready", flush=True)
        while sys.stdin.readline():
            times, failures = [], 0
            end_s = time.perf_counter() + PERIOD_S
            while (start_s := time.perf_counter()) < end_s:
                try:
                    H @ v
                except curvd.CurvdError:
                    failures += 1
                times.append(time.perf_counter() - start_s)
            found = {"median_s": statistics.median(times), "failures": failures}
            print(json.dumps(found | {"p99_s": sorted(times)[-len(times) // 100 - 1]}))
            sys.stdout.flush()


def more_sessions(client: curvd.Client) -> Callable[[], object]:
    """He has all his sessions, and asks for another."""
    model, data = registered(client, WIDTHS["small"])
    make = lambda: client.create_session(  # noqa: E731
        model, data, loss="cross_entropy", operators=None
    )
    make()
    return make


def more_vectors(client: curvd.Client) -> Callable[[], object]:
    """He stores all he may, and puts another vector."""
    session = client.session(client.sessions()[0].id)
    columns = np.ones((session.layout.size, 4), np.float32)
    for n in range(1000):
        try:
            session.put(f"v{n}", columns)
        except curvd.LimitExceeded:
            break
    return lambda: session.put("more", columns)


def more_disk(client: curvd.Client) -> Callable[[], object]:
    """He registers a dataset that is larger than what he may have."""
    points = points_of([64, 4], 20_000)
    return lambda: client.register_dataset(
        points, inputs="x", target="y", batch_size=128
    )


def more_columns(client: curvd.Client) -> Callable[[], object]:
    """He multiplies as many columns as he may, from four threads."""
    session = client.session(client.sessions()[0].id)
    H, V = session.hessian(), np.ones((session.layout.size, 4), np.float32)
    return lambda: H @ V


QUOTAS: dict[str, tuple[Callable[[curvd.Client], Callable[[], object]], int]] = {
    "sessions": (more_sessions, 1),
    "vector_bytes": (more_vectors, 1),
    "disk_bytes": (more_disk, 1),
    "columns": (more_columns, 4),
    "calls": (more_columns, 8),
}
"""What he does, and from how many threads, by the quota that stops him."""


class Ben:
    """The caller at his quota."""

    def __init__(self, act: Callable[[], object], threads: int) -> None:
        self._act, self._threads = act, threads
        self.done = self.refused = 0

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Have him ask meanwhile."""
        stopped = threading.Event()

        def ask() -> None:
            while not stopped.is_set():
                try:
                    self._act()
                    self.done += 1
                except curvd.ResourceExhausted:
                    self.refused += 1

        threads = [threading.Thread(target=ask) for _ in range(self._threads)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stopped.set()
            for thread in threads:
                thread.join()


@contextlib.contextmanager
def serving(folder: Path, tokens: dict[str, str]) -> Iterator[str]:
    """A server with both callers."""
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
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait(60)


def measured(ann: subprocess.Popen[str], ben: Ben, rounds: int) -> list[dict]:
    """Pairs of periods, without him and beside him."""

    def period() -> dict:
        ann.stdin.write("\n")
        ann.stdin.flush()
        return json.loads(ann.stdout.readline())

    pairs = []
    for _ in range(rounds):
        quiet = period()
        with ben.asking():
            pairs.append({"quiet": quiet, "beside": period()})
    return pairs


def main() -> int:
    """Measure each quota."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", choices=QUOTAS)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    tokens = {name: token_file.new_token() for name in ("ann", "ben")}
    bad = False
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), tokens) as target,
    ):
        command = [sys.executable, __file__, target, tokens["ann"]]
        ann = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert ann.stdout.readline() == "ready\n"
        with curvd.connect(target, config=ONCE, token=tokens["ben"]) as client:
            opened(client, WIDTHS["small"], plan="final")
            print("| quota | alone ms | beside ms | ratio | p99 | refused | failed |")
            print("| --- | --- | --- | --- | --- | --- | --- |")
            for name in [given.only] if given.only else QUOTAS:
                prepare, threads = QUOTAS[name]
                ben = Ben(prepare(client), threads)
                pairs = measured(ann, ben, given.rounds)
                of = lambda side, key, pairs=pairs: [p[side][key] for p in pairs]  # noqa: E731
                ratio = statistics.median(
                    b / q
                    for b, q in zip(
                        of("beside", "median_s"), of("quiet", "median_s"), strict=True
                    )
                )
                failed = sum(of("beside", "failures"))
                bad = bad or failed or (given.check and ratio > MOST_RATIO)
                quiet, beside = (
                    1e3 * statistics.median(of(side, "median_s"))
                    for side in ("quiet", "beside")
                )
                p99 = 1e3 * statistics.median(of("beside", "p99_s"))
                print(
                    f"| {name} | {quiet:.2f} | {beside:.2f} | {ratio:.2f} | {p99:.1f} ms "
                    f"| {ben.refused} of {ben.refused + ben.done} | {failed} |",
                    flush=True,
                )
        ann.stdin.close()
        ann.wait(60)
    return int(bool(bad))


if __name__ == "__main__":
    if len(sys.argv) == 3 and not sys.argv[1].startswith("-"):
        multiply(*sys.argv[1:])
    else:
        raise SystemExit(main())
