"""Echo through the real service, beside raw TCP and Arrow Flight.

    pip install pyarrow
    python bench/wire.py [--check] [--rounds 7]

The server is the real one, queues, checks and framing included, on a device whose only
operator is the identity. All peers store the whole vector before they answer. Rounds are
interleaved; the table shows medians of wall time and of CPU time (client and server).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import peers

import curvd
from curvd.types import DeviceInfo, ParameterLayout, PlanReport, TensorInfo
from curvd_server.registration import Architecture

SIZES = {0.4: 100_000, 4.0: 1_000_000, 40.0: 10_000_000, 400.0: 100_000_000}
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
    "MALLOC_ARENA_MAX": "1",
}
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Identity:
    """An operator that answers with what it was given."""

    report = PlanReport(
        mode="identity",
        columns_at_once=1,
        batches=1,
        kept_batches=1,
        kept_bytes=0,
        compiled=False,
        symmetry_gap=0.0,
        difference_gap=0.0,
        seconds_per_product=0.0,
        peak_bytes=0,
    )

    def apply(self, columns, *, cancelled):
        return columns

    def close(self):
        pass


class Echo:
    """A device whose sessions have one parameter and the identity."""

    name, builders, torch_version, batches = "echo", ("vector",), "none", 1

    def __init__(self, size=0):
        self.layout = ParameterLayout.of({"v": (size,)})

    def describe(self):
        return DeviceInfo(name="echo", description="", total_bytes=1, free_bytes=1)

    def architecture(self, spec):
        size = spec.config["size"]
        return Architecture({"v": TensorInfo("v", "F32", (size,))}, {})

    def load(self, model, *rest):
        return Echo(model.config["size"])

    def build(self, spec, *, budget_bytes, cancelled):
        return Identity()

    def with_parameters(self, values):
        return self

    def move(self, operator):
        return operator


def serve() -> None:
    """Run the service until killed."""
    curvd.tune_allocator()
    from curvd_server.app import serve_in_thread
    from curvd_server.config import ServerConfig

    with tempfile.TemporaryDirectory() as folder:
        config = ServerConfig(listen="127.0.0.1:0", data_dir=Path(folder))
        with serve_in_thread(config, device=Echo()) as target:
            print(target, flush=True)
            sys.stdin.read()


def start(*command: str, **environment: str) -> tuple[subprocess.Popen, str]:
    """Start a peer; return it and the line that says where it listens."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    return process, process.stdout.readline().strip()


def open_sessions(client: curvd.Client) -> dict[int, object]:
    """One session per size, and its operator."""
    dataset = client.register_dataset(
        {"x": np.ones((1, 1), "f4"), "y": np.ones((1, 1), "f4")},
        inputs=["x"],
        target="y",
        batch_size=1,
    )
    operators = {}
    for size in SIZES.values():
        state = {"v": np.zeros(size, "f4")}
        model = client.register_model("vector", {"size": size}, state)
        session = client.create_session(model, dataset, loss="mse", dtype="F32")
        operators[size] = session.hessian()
    return operators


def cpu_s(process: subprocess.Popen) -> float:
    """CPU time of a peer and of this process."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) * TICK_S


def peak_bytes(pid: int | str) -> int:
    """Largest resident size since the last reset."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(process, echo, source) -> tuple[float, float]:
    """One trip: wall and CPU seconds."""
    cpu, wall = cpu_s(process), time.perf_counter()
    result = echo(source)
    wall, cpu = time.perf_counter() - wall, cpu_s(process) - cpu
    assert np.array_equal(
        result[:: max(1, len(result) // 1000)], source[:: max(1, len(source) // 1000)]
    )
    return wall, cpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="exit non-zero below a target"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return 0
    curvd.tune_allocator()
    here = Path(__file__)
    ours, target = start(str(here), "--serve")
    script = str(here.with_name("peers.py"))
    raw, raw_port = start(script, "raw")
    flight, flight_port = start(script, "flight")
    tuned, tuned_port = start(script, "flight", **TUNED)
    missed = []
    try:
        clients = {
            "raw TCP": (raw, peers.RawClient(int(raw_port))),
            "flight": (flight, peers.FlightClient(int(flight_port))),
            "flight tuned": (tuned, peers.FlightClient(int(tuned_port))),
        }
        with curvd.connect(target) as client:
            operators = open_sessions(client)
            print(
                f"{'MB':>6} {'peer':14} {'wall ms':>9} {'CPU ms':>8} {'x raw':>6} {'CPU':>6}"
            )
            for megabytes, size in SIZES.items():
                missed += contest(
                    megabytes, size, clients, ours, operators[size], arguments.rounds
                )
    finally:
        for process in (ours, raw, flight, tuned):
            process.kill()
    for line in missed:
        print("MISSED", line)
    return int(arguments.check and bool(missed))


def contest(megabytes, size, clients, ours, operator, rounds) -> list[str]:
    """Measure all peers at one size; return the targets that were missed."""
    source = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    target = np.zeros_like(source)

    def through(client):
        def echo(v):
            client.echo(v, target)
            return target

        return echo

    racers = {name: (process, through(c)) for name, (process, c) in clients.items()}
    racers["curvd"] = (ours, lambda v: operator @ v)
    times = {name: [] for name in racers}
    for turn in range(rounds + 1):
        for name, (process, echo) in racers.items():
            trip = measure(process, echo, source)
            if turn:  # the first warms buffers
                times[name].append(trip)
    wall = {n: statistics.median(w for w, _ in t) for n, t in times.items()}
    cpu = {
        n: max(TICK_S / 10, statistics.median(c for _, c in t))
        for n, t in times.items()
    }
    for name in racers:
        print(
            f"{megabytes:6.1f} {name:14} {wall[name] * 1e3:9.2f} {cpu[name] * 1e3:8.1f} "
            f"{wall['raw TCP'] / wall[name]:6.2f} {cpu['raw TCP'] / cpu[name]:6.2f}"
        )
    if megabytes < 40:
        return []
    targets = {
        "of raw TCP, wall (stretch 0.9)": (wall["raw TCP"] / wall["curvd"], 0.42),
        "of raw TCP, CPU": (cpu["raw TCP"] / cpu["curvd"], 0.35),
        "of Flight, default malloc": (wall["flight"] / wall["curvd"], 1.2),
        "of Flight, tuned malloc": (wall["flight tuned"] / wall["curvd"], 0.8),
    }
    if megabytes == 400:
        print(f"peak of the server: {peak_bytes(ours.pid) / 4e8:.2f} vectors")
    return [
        f"{megabytes:g} MB: {ratio:.2f} {what}, want >= {want}"
        for what, (ratio, want) in targets.items()
        if ratio < want
    ]


if __name__ == "__main__":
    sys.exit(main())
