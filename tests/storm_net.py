"""Floods and hoards beside a client that multiplies: its p99, and what stays behind.

`make storm-net`: each attack against our own HTTP/2 and against grpcio at the port, by
one stranger and by twenty. Strangers have no token. Exits with 1 if the client's p99 is
more than three times its p99 alone, or worse than beside grpcio's server, if a call of
it fails, or if descriptors or memory do not come back.

Other work on the machine must decide nothing, so an attack comes in rounds: alone, beside
it, alone again, both servers in turn. Ratios are taken within a round, between
neighbours, and their median counts; a row that misses is measured once more, and then
counts. The rows `nobody` and `a busy core` attack no server: they show how far the
machine itself moves a p99.
"""

import argparse
import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import hostile
import numpy as np
import trustme

import curvd
from curvd.remote.operator import RemoteOperator

TOKEN = "storm"
WIDTHS = [16, 64, 64, 4]
MOST_TIMES = 3.0
NOISE = 1.25
"""What two runs of the same may differ by on a machine that does other things, too."""
MOST_MB = 48
"""Memory that may stay behind: allocators keep some."""
WAYS = ("direct", "grpcio")
THINK_S = 5e-3
"""Pause of the client between two calls: one that never sleeps soon has had its share of
a busy processor, and then waits for the scheduler, the sooner the faster its server is."""
BEGIN_S = 1.0
"""Time until an attack is in full swing."""


@contextlib.contextmanager
def serving(transport, folder, tls, listen="127.0.0.1:0"):
    """A server in a process of its own: its target, and its process."""
    (folder / "token").write_text(TOKEN)
    command = [
        sys.executable,
        "-c",
        "from curvd.cli.commands import main; main()",
        "serve",
    ]
    command += ["--listen", listen]
    command += ["--data-dir", folder / transport, "--token-file", folder / "token"]
    command += ["--transport", transport, "--log-level", "warning"]
    if tls:
        command += ["--tls-cert", folder / "cert", "--tls-key", folder / "key"]
    with open(folder / f"{transport}.log", "ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    try:
        yield process.stdout.readline().decode().split()[-1], process
    finally:
        process.terminate()
        process.wait(60)


def session_of(client):
    """A session of a small classifier."""
    from curvd_server.models import builders

    rng = np.random.default_rng(0)
    config = {"activation": "tanh", "widths": WIDTHS}
    state = builders.BUILDERS["mlp"](config).state_dict()
    points = {
        "x": rng.standard_normal((256, WIDTHS[0]), np.float32),
        "y": rng.integers(0, WIDTHS[-1], 256),
    }
    model = client.register_model("mlp", config, state)
    data = client.register_dataset(points, inputs=["x"], target="y", batch_size=256)
    return client.create_session(model, data, loss="cross_entropy", dtype="F32")


def held(process):
    """Descriptors and resident MB of a process."""
    descriptors = len(os.listdir(f"/proc/{process.pid}/fd"))
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return descriptors, pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@dataclass
class Side:
    """One server, a client that multiplies, and how long that took beside an attack."""

    target: str
    process: subprocess.Popen
    operator: RemoteOperator
    alone: list[float] = field(default_factory=list)
    """p99 in seconds, before the first round and after each."""
    beside: list[float] = field(default_factory=list)
    """p99 in seconds, in each round."""
    calls: int = 0
    failed: int = 0
    before: tuple[int, float] = (0, 0.0)

    def p99(self, seconds):
        """Multiply for so long."""
        vector = np.ones(self.operator.shape[1], np.float32)
        times, end_s = [], time.monotonic() + seconds
        while time.monotonic() < end_s:
            start_s = time.perf_counter()
            try:
                self.operator @ vector
            except curvd.CurvdError:
                self.failed += 1
            times.append(time.perf_counter() - start_s)
            time.sleep(THINK_S)
        self.calls += len(times)
        return float(np.quantile(times, 0.99))

    def begin(self, alone_s):
        """Forget earlier attacks."""
        self.beside, self.calls, self.failed = [], 0, 0
        self.before = held(self.process)
        self.alone = [self.p99(alone_s)]

    def round(self, name, strangers, beside_s, alone_s):
        """Multiply beside an attack, and alone."""
        command = [sys.executable, hostile.__file__, name, self.target, str(strangers)]
        attack = subprocess.Popen([*command, str(BEGIN_S + beside_s)])
        time.sleep(BEGIN_S)
        self.beside.append(self.p99(beside_s))
        attack.wait(60)
        self.alone.append(self.p99(alone_s))

    def left(self, patience_s=15.0):
        """Descriptors and MB more than before, as soon as it is little."""
        end_s = time.monotonic() + patience_s
        while held(self.process)[0] > self.before[0] and time.monotonic() < end_s:
            time.sleep(0.2)
        descriptors, megabytes = held(self.process)
        return descriptors - self.before[0], megabytes - self.before[1]

    @property
    def times_alone(self):
        """How often a round's p99 contains that before and after it; the median round."""
        around = [(a + b) / 2 for a, b in itertools.pairwise(self.alone)]
        return statistics.median(
            beside / alone for beside, alone in zip(self.beside, around, strict=True)
        )


def attacked(name, strangers, sides, options):
    """One attack on both servers: a row of the table, and what is missed."""
    hoards = name in hostile.HOARDS
    seconds = options.hoard_seconds if hoards else options.seconds
    for side in sides.values():
        side.begin(options.alone_s)
    for _ in range(options.rounds):
        for side in sides.values():
            side.round(name, strangers, seconds / options.rounds, options.alone_s)
    ours, theirs = (sides[way] for way in WAYS)
    over = statistics.median(
        a / b for a, b in zip(ours.beside, theirs.beside, strict=True)
    )
    descriptors, megabytes = ours.left()
    missed = []
    if ours.times_alone > MOST_TIMES:
        missed.append(f"p99 {ours.times_alone:.1f} x alone")
    if over > NOISE:
        missed.append(f"p99 {over:.2f} x grpcio's")
    if ours.failed:
        missed.append(f"{ours.failed} calls failed")
    if descriptors > 0:
        missed.append(f"{descriptors} descriptors stay")
    if megabytes > MOST_MB:
        missed.append(f"{megabytes:.0f} MB stay")
    alone_ms, beside_ms = (
        1e3 * statistics.median(p) for p in (ours.alone, ours.beside)
    )
    failed = f" ({theirs.failed} failed)" if theirs.failed else ""
    return missed, (
        f"| {name} | {strangers} | {alone_ms:.1f} | {beside_ms:.1f} | "
        f"{ours.times_alone:.2f} | {theirs.times_alone:.2f}{failed} | {over:.2f} | "
        f"{ours.calls} | {descriptors:+d} | {megabytes:+.0f} | "
        f"{', '.join(missed) or '-'} |"
    )


@contextlib.contextmanager
def both(folder, tls):
    """Both servers, and a client of each."""
    ca = curvd.TlsConfig(ca=folder / "ca") if tls else None
    with contextlib.ExitStack() as stack:
        sides = {}
        for way in WAYS:
            target, process = stack.enter_context(serving(way, folder, tls))
            connect_to = target.replace("127.0.0.1", "localhost") if tls else target
            config = curvd.ClientConfig(token=TOKEN, tls=ca, transport=way)
            client = stack.enter_context(curvd.connect(connect_to, config=config))
            operator = stack.enter_context(session_of(client)).hessian()
            sides[way] = Side(target, process, operator)
            sides[way].p99(1.0)  # warms
        yield sides


def certificates(folder):
    """Let a server have a name."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca")
    issued.private_key_pem.write_to_path(folder / "key")
    issued.cert_chain_pems[0].write_to_path(folder / "cert")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=21.0, help="of each flood")
    parser.add_argument(
        "--hoard-seconds",
        type=float,
        default=36.0,
        help="of each hoard; rounds end after the time for greetings",
    )
    parser.add_argument("--alone-s", type=float, default=3.0, help="seconds between")
    parser.add_argument("--strangers", type=int, nargs="*", default=[1, 20])
    parser.add_argument("--only", nargs="*", help="names of attacks")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers end with us
    plain = [*hostile.CONTROLS, *hostile.FLOODS, *hostile.HOARDS]
    wanted = options.only or [*plain, *hostile.TLS_FLOODS]
    print(
        "| attack | strangers | alone p99 ms | beside p99 ms | x alone | grpcio x alone "
        "| over grpcio's | calls | descriptors | MB | missed |\n" + "| --- " * 11 + "|",
        flush=True,
    )
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        certificates(Path(name))
        for names, tls in ((plain, False), (hostile.TLS_FLOODS, True)):
            names = [name for name in names if name in wanted]
            if not names:
                continue
            with both(Path(name), tls) as sides:
                for attack, count in itertools.product(names, options.strangers):
                    missed, row = attacked(attack, count, sides, options)
                    if missed:
                        missed, row = attacked(attack, count, sides, options)
                    bad += bool(missed) and attack not in hostile.CONTROLS
                    print(row, flush=True)
    print(f"{bad} missed")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
