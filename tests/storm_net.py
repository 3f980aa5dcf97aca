"""Floods and hoards beside a client that multiplies: its p99, and what stays behind.

`make storm-net`: each attack against our own HTTP/2 and against grpcio at the port, by
one stranger and by twenty. Strangers have no token. Exits with 1 if the client's p99 is
more than three times its p99 alone, or worse than beside grpcio's server, if a call of
it fails, or if descriptors or memory do not come back.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hostile
import numpy as np
import trustme

import curvd

TOKEN = "storm"
WIDTHS = [16, 64, 64, 4]
MOST_TIMES = 3.0
NOISE = 1.25
"""What two runs of the same may differ by on a machine that does other things, too."""
MOST_MB = 48
"""Memory that may stay behind: allocators keep some."""


@contextlib.contextmanager
def serving(transport, folder, tls, listen="127.0.0.1:0"):
    """A server in a process of its own: its target, and its process."""
    (folder / "token").write_text(TOKEN)
    command = [sys.executable, "-c", "from curvd.cli import main; main()", "serve"]
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
    from curvd_server import builders

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


def measured(operator, vector, seconds):
    """Multiply for so long: seconds of each product, and how many failed."""
    times, failed, end_s = [], 0, time.monotonic() + seconds
    while time.monotonic() < end_s:
        start_s = time.perf_counter()
        try:
            operator @ vector
        except curvd.CurvdError:
            failed += 1
        times.append(time.perf_counter() - start_s)
    return np.array(times), failed


def held(process):
    """Descriptors and resident MB of a process."""
    descriptors = len(os.listdir(f"/proc/{process.pid}/fd"))
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return descriptors, pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def settled(process, descriptors, patience_s=15.0):
    """What a process holds, as soon as it is little, or at the end of patience."""
    end_s = time.monotonic() + patience_s
    while held(process)[0] > descriptors and time.monotonic() < end_s:
        time.sleep(0.2)
    return held(process)


def beside(name, strangers, target, process, operator, vector, seconds):
    """Multiply alone, beside an attack, and alone again; look at what stays behind."""
    before = held(process)
    alone, _ = measured(operator, vector, seconds / 2)
    command = [sys.executable, hostile.__file__, name, target, str(strangers)]
    attack = subprocess.Popen([*command, str(seconds + 1.0)])
    time.sleep(1.0)
    times, failed = measured(operator, vector, seconds)
    attack.wait(60)
    descriptors, megabytes = settled(process, before[0])
    again, _ = measured(operator, vector, seconds / 2)
    return {
        "alone": 1e3 * np.quantile(np.concatenate([alone, again]), 0.99),
        "p50": 1e3 * np.quantile(times, 0.5),
        "p99": 1e3 * np.quantile(times, 0.99),
        "calls": len(times),
        "failed": failed,
        "descriptors": descriptors - before[0],
        "MB": megabytes - before[1],
    }


def faults(row, other):
    """What a row of ours misses."""
    found = []
    if row["p99"] > MOST_TIMES * row["alone"]:
        found.append(f"p99 {row['p99'] / row['alone']:.1f} x alone")
    if row["p99"] > NOISE * other["p99"]:
        found.append("p99 worse than grpcio's")
    if row["failed"]:
        found.append(f"{row['failed']} calls failed")
    if row["descriptors"] > 0:
        found.append(f"{row['descriptors']} descriptors stay")
    if row["MB"] > MOST_MB:
        found.append(f"{row['MB']:.0f} MB stay")
    return found


def storm(names, crowds, seconds, folder, tls):
    """All attacks on one pair of servers; yields rows and their faults."""
    ca = curvd.TlsConfig(ca=folder / "ca") if tls else None
    ways = ("direct", "grpcio")
    with contextlib.ExitStack() as stack:
        sides = {}
        for way in ways:
            target, process = stack.enter_context(serving(way, folder, tls))
            connect_to = target.replace("127.0.0.1", "localhost") if tls else target
            config = curvd.ClientConfig(token=TOKEN, tls=ca, transport=way)
            client = stack.enter_context(curvd.connect(connect_to, config=config))
            operator = stack.enter_context(session_of(client)).hessian()
            vector = np.ones(operator.shape[1], np.float32)
            measured(operator, vector, 1.0)
            sides[way] = (target, process, operator, vector)
        for name in names:
            for strangers in crowds:
                rows = {
                    way: beside(name, strangers, *side, seconds)
                    for way, side in sides.items()
                }
                missed = faults(rows["direct"], rows["grpcio"])
                yield name, strangers, rows, missed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--strangers", type=int, nargs="*", default=[1, 20])
    parser.add_argument("--only", nargs="*", help="names of attacks")
    options = parser.parse_args()
    plain = [*hostile.FLOODS, *hostile.HOARDS]
    wanted = options.only or [*plain, *hostile.TLS_FLOODS]
    print(
        "| attack | strangers | alone p99 ms | ours p50 | ours p99 | grpcio p99 | "
        "calls | descriptors | MB | missed |\n" + "| --- " * 10 + "|",
        flush=True,
    )
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        authority = trustme.CA()
        issued = authority.issue_cert("localhost", "127.0.0.1")
        authority.cert_pem.write_to_path(folder / "ca")
        issued.private_key_pem.write_to_path(folder / "key")
        issued.cert_chain_pems[0].write_to_path(folder / "cert")
        for names, tls in ((plain, False), (hostile.TLS_FLOODS, True)):
            names = [name for name in names if name in wanted]
            if not names:
                continue
            rows = storm(names, options.strangers, options.seconds, folder, tls)
            for attack, strangers, sides, missed in rows:
                ours, theirs = sides["direct"], sides["grpcio"]
                bad += bool(missed)
                failed = f" ({theirs['failed']} failed)" if theirs["failed"] else ""
                print(
                    f"| {attack} | {strangers} | {ours['alone']:.1f} | "
                    f"{ours['p50']:.1f} | {ours['p99']:.1f} | {theirs['p99']:.1f}{failed}"
                    f" | {ours['calls']} | {ours['descriptors']:+d} | {ours['MB']:+.0f} | "
                    f"{', '.join(missed) or '-'} |",
                    flush=True,
                )
    print(f"{bad} missed")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
