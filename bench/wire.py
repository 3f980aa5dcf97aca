"""Echo through the real service, beside raw TCP, Arrow Flight and a bare unary call.

    python bench/wire.py [--check] [--rounds 7] [--busy [N]] [--ways]

The server is the real one, queues, checks and framing included, on a device whose only
operator is the identity. All peers store the whole vector before they answer. Rounds are
interleaved; the table shows medians of wall time and of CPU time (client and server).
*curvd, grpcio* is the same service by a client that uses grpcio's channel.
`--busy` measures beside two processes that compute all the time, or beside N.
`--ways` compares TCP, Unix sockets, TLS, mutual TLS and a token instead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import numpy as np
import peers

import curvd
from curvd.contract import DeviceInfo, ParameterLayout, PlanReport, TensorInfo
from curvd_server.storage import Architecture

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

    shares = False
    is_remote = False

    def apply(self, columns, *, counts=(), cancelled):
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

    async def try_model(self, spec):
        return None  # ask `architecture`

    async def try_graphs(self, model, loss, *, rows):
        pass

    def load(self, model, *rest):
        return Echo(model.config["size"])

    def build(self, spec, *, budget_bytes, cancelled, tier=None):
        return Identity()

    def with_parameters(self, values):
        return self

    def move(self, operator):
        return operator


def serve(way: str, device=None) -> None:
    """Run the service until killed; print where it is, and what a client needs."""
    curvd.tune_allocator()
    from curvd_server.app import serve_in_thread
    from curvd_server.config import ServerConfig

    with tempfile.TemporaryDirectory() as folder:
        options, needed = {"listen": "127.0.0.1:0"}, {}
        if way == "unix":
            options["listen"] = f"unix:{folder}/socket"
        if way == "token":
            options["token"] = needed["token"] = "a-token-of-some-length"
        if way in ("tls", "mtls"):
            options["tls"], needed["tls"] = certificates(Path(folder), way == "mtls")
        # A compiler in the background would take the cores of what is measured.
        config = ServerConfig(
            data_dir=Path(folder) / "data", compile_after_s=0, **options
        )
        with serve_in_thread(config, device=device or Echo()) as target:
            print(json.dumps({"target": target, **needed}), flush=True)
            sys.stdin.read()


def certificates(folder: Path, mutual: bool):
    """Make a certificate authority; return both ends' settings."""
    import trustme

    from curvd_server.config import TlsConfig

    authority = trustme.CA()
    ours, theirs = authority.issue_cert("127.0.0.1"), authority.issue_cert("client")
    paths = {name: folder / f"{name}.pem" for name in ("ca", "cert", "key", "c", "k")}
    authority.cert_pem.write_to_path(paths["ca"])
    ours.cert_chain_pems[0].write_to_path(paths["cert"])
    ours.private_key_pem.write_to_path(paths["key"])
    theirs.cert_chain_pems[0].write_to_path(paths["c"])
    theirs.private_key_pem.write_to_path(paths["k"])
    server = TlsConfig(
        cert=paths["cert"],
        key=paths["key"],
        client_ca=paths["ca"] if mutual else None,
    )
    client = {"ca": str(paths["ca"])}
    if mutual:
        client |= {"cert": str(paths["c"]), "key": str(paths["k"])}
    return server, client


def connected(line: str, **config) -> curvd.Client:
    """Connect as the server's first line says."""
    said = json.loads(line)
    tls = said.pop("tls", None)
    return curvd.connect(
        said.pop("target"),
        tls=None if tls is None else curvd.TlsConfig(**tls),
        config=curvd.ClientConfig(**config),
        **said,
    )


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


def resident_bytes(pid: int | str) -> int:
    """Resident size now."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def reset_peak(pid: int | str) -> None:
    """Let `peak_bytes` begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def ways(here: Path, rounds: int) -> int:
    """Compare the ways in, interleaved."""
    names = ("tcp", "unix", "token", "tls", "mtls")
    servers = {name: start(str(here), "--serve", name) for name in names}
    try:
        clients = {name: connected(line) for name, (_, line) in servers.items()}
        operators = {name: open_sessions(client) for name, client in clients.items()}
        print(
            f"{'MB':>6} {'way':6} {'wall ms':>9} {'CPU ms':>8} {'x tcp':>6} {'CPU':>6}"
        )
        for megabytes, size in SIZES.items():
            if megabytes > 40:
                continue
            source = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
            times = {name: [] for name in names}
            for turn in range((rounds if megabytes > 1 else 20 * rounds) + 1):
                for name in names:
                    operator = operators[name][size]
                    trip = measure(servers[name][0], operator.__matmul__, source)
                    if turn:
                        times[name].append(trip)
            wall = {n: statistics.median(w for w, _ in t) for n, t in times.items()}
            cpu = {n: statistics.mean(c for _, c in t) for n, t in times.items()}
            for name in names:
                print(
                    f"{megabytes:6.1f} {name:6} {wall[name] * 1e3:9.2f} "
                    f"{cpu[name] * 1e3:8.1f} {wall[name] / wall['tcp']:6.2f} "
                    f"{cpu[name] / cpu['tcp']:6.2f}"
                )
    finally:
        for process, _ in servers.values():
            process.kill()
    return 0


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
    parser.add_argument("--ways", action="store_true", help="compare the ways in")
    parser.add_argument("--busy", type=int, nargs="?", const=2, default=0, metavar="N")
    parser.add_argument("--sizes", type=float, nargs="*", default=list(SIZES))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return 0
    curvd.tune_allocator()
    here = Path(__file__)
    if arguments.ways:
        return ways(here, arguments.rounds)
    ours, line = start(str(here), "--serve", "tcp")
    script = str(here.with_name("peers.py"))
    raw, raw_port = start(script, "raw")
    flight, flight_port = start(script, "flight")
    tuned, tuned_port = start(script, "flight", **TUNED)
    unary, unary_port = start(script, "unary")
    missed = []
    print(machine.memory())
    try:
        clients = {
            "raw TCP": (raw, peers.RawClient(int(raw_port))),
            "flight": (flight, peers.FlightClient(int(flight_port))),
            "flight tuned": (tuned, peers.FlightClient(int(tuned_port))),
        }
        with (
            connected(line) as client,
            connected(line, transport="grpcio") as other,
            machine.busy(arguments.busy),
        ):
            operators = open_sessions(client)
            theirs = open_sessions(other)
            print(
                f"{'MB':>6} {'peer':14} {'wall ms':>9} {'CPU ms':>8} {'x raw':>6} {'CPU':>6}"
            )
            for megabytes in arguments.sizes:
                size, few = SIZES[megabytes], dict(clients)
                if megabytes < 1:
                    few["bare unary"] = (unary, peers.UnaryClient(int(unary_port)))
                pair = {"curvd": operators[size], "curvd, grpcio": theirs[size]}
                missed += contest(megabytes, size, few, ours, pair, arguments.rounds)
    finally:
        for process in (ours, raw, flight, tuned, unary):
            process.kill()
    for line in missed:
        print("MISSED", line)
    return int(arguments.check and bool(missed))


def memory(pid: int, echo, source) -> tuple[float, float]:
    """Peaks above idle of server and client, in vectors, without the client's result."""
    idle = resident_bytes(pid), resident_bytes("self")
    reset_peak(pid)
    reset_peak("self")
    for _ in range(2):
        echo(source)
    server, client = (
        (peak_bytes(p) - i) / source.nbytes
        for p, i in zip((pid, "self"), idle, strict=True)
    )
    return server, client - 1


def contest(megabytes, size, clients, ours, operators, rounds) -> list[str]:
    """Measure all peers at one size; return the targets that were missed."""
    source = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    target = np.ones_like(source)

    def through(client):
        def echo(v):
            client.echo(v, target)
            return target

        return echo

    racers = {name: (process, through(c)) for name, (process, c) in clients.items()}
    for name, operator in operators.items():
        racers[name] = (ours, operator.__matmul__)
    times = {name: [] for name in racers}
    if megabytes < 4:
        rounds *= 20  # short trips scatter more, and cost nothing
    server, client = memory(ours.pid, racers["curvd"][1], source)
    for turn in range(rounds + 1):
        for name, (process, echo) in racers.items():
            trip = measure(process, echo, source)
            if turn:  # the first warms buffers
                times[name].append(trip)
    wall = {n: statistics.median(w for w, _ in t) for n, t in times.items()}
    # The clock of another process ticks every 10 ms: only a mean tells.
    cpu = {n: statistics.mean(c for _, c in t) for n, t in times.items()}
    for name in racers:
        print(
            f"{megabytes:6.1f} {name:14} {wall[name] * 1e3:9.2f} {cpu[name] * 1e3:8.1f} "
            f"{wall['raw TCP'] / wall[name]:6.2f} {cpu['raw TCP'] / cpu[name]:6.2f}"
        )
    if megabytes < 1:
        ratio = wall["curvd"] / wall["bare unary"]
        print(f"of a bare unary call: {ratio:.2f}x the time")
        return [f"0.4 MB: {ratio:.2f} bare unary calls, want <= 1.2"] * (ratio > 1.2)
    if megabytes < 40:
        return []
    targets = {
        "of raw TCP, wall (stretch 0.9)": (wall["raw TCP"] / wall["curvd"], 0.42),
        "of raw TCP, CPU": (cpu["raw TCP"] / cpu["curvd"], 0.35),
        "of Flight, default malloc": (wall["flight"] / wall["curvd"], 1.2),
        "of Flight, tuned malloc": (wall["flight tuned"] / wall["curvd"], 1.0),
    }
    late = []
    if megabytes == 400:
        print(f"peak above idle, in vectors: server {server:.2f}, client {client:.2f}")
        if server > 1.15:
            late.append(f"{server:.2f} vectors in the server, want <= 1.15")
        if client > 0.1:
            late.append(f"{client:.2f} vectors more in the client, want <= 0.1")
    return late + [
        f"{megabytes:g} MB: {ratio:.2f} {what}, want >= {want}"
        for what, (ratio, want) in targets.items()
        if ratio < want
    ]


if __name__ == "__main__":
    sys.exit(main())
