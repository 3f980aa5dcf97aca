"""What it costs to answer clients that are not ours, by who answers them.

    python bench/foreign.py [--rounds 7]

*port*: grpcio has the port. *copied*: the port passes bytes on through its memory, as the
server does. *spliced*: it passes them on through pipes in the kernel. *ours*: our own
HTTP/2 answers, one call at a time on each connection. Medians of CPU time, client and
server together; rounds are interleaved. Descriptors and memory are the server's, for each
of a hundred idle connections.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import socket
import statistics
import subprocess

import numpy as np
import wire

import curvd
from curvd.http2 import frames
from curvd_server.service import endpoint
from curvd_server.transport import greeting, listener
from curvd_server.transport.readiness import readable, writable

WAYS = ("port", "copied", "spliced", "ours")
PIPE_BYTES = 1 << 20
SIZE = 10_000_000
SMALL_CALLS = 200
IDLE = 100


def serve(way: str) -> None:
    """Run the service until killed."""
    if way == "port":
        endpoint._direct = endpoint._grpcio_alone
    elif way == "spliced":
        listener.relay = splice
    elif way == "ours":
        greeting.is_ours = lambda beginning, *, tls: True
    wire.serve("tcp")


async def splice(near: socket.socket, far: socket.socket, allowance) -> None:
    """Pass bytes on in both directions, by the kernel."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_pass(near, far))
            group.create_task(_pass(far, near))
    except* OSError:
        pass


async def _pass(source: socket.socket, sink: socket.socket) -> None:
    here, there = os.pipe2(os.O_NONBLOCK)
    try:
        fcntl.fcntl(there, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        while count := await _moved(source.fileno(), there, source, None):
            while count:
                count -= await _moved(here, sink.fileno(), None, sink, count)
    finally:
        os.close(here)
        os.close(there)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


async def _moved(source, sink, reads, writes, count=PIPE_BYTES) -> int:
    while True:
        try:
            return os.splice(source, sink, count, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            await (writable(writes) if reads is None else readable(reads))


def idle_cost(process: subprocess.Popen, target: str) -> tuple[float, float]:
    """Descriptors and kB of the server for each idle connection."""
    host, _, port = target.rpartition(":")
    hello = frames.PREFACE + frames.settings({})
    before = descriptors(process), wire.resident_bytes(process.pid)
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE):
            sock = stack.enter_context(socket.create_connection((host, int(port)), 30))
            sock.sendall(hello)
            sock.recv(1)
        count = descriptors(process) - before[0]
        return count / IDLE, (wire.resident_bytes(process.pid) - before[1]) / IDLE / 1e3


def descriptors(process: subprocess.Popen) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def cpu_ms(process: subprocess.Popen, work) -> float:
    """CPU time of both ends."""
    before_s = wire.cpu_s(process)
    work()
    return 1e3 * (wire.cpu_s(process) - before_s)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("serve", nargs="?")
    parser.add_argument("way", nargs="?", default="copied")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.serve:
        serve(options.way)
        return
    curvd.tune_allocator()
    wire.SIZES = {40.0: SIZE}
    vector = np.random.default_rng(0).standard_normal(SIZE, np.float32)
    large = {way: [] for way in WAYS}
    small = {way: [] for way in WAYS}
    idle = {}
    with contextlib.ExitStack() as stack:
        sides = {}
        for way in WAYS:
            process, line = wire.start(__file__, "serve", way)
            stack.callback(process.kill)
            client = stack.enter_context(wire.connected(line, transport="grpcio"))
            operator = wire.open_sessions(client)[SIZE]
            operator @ vector
            sides[way] = (process, client, operator)
            idle[way] = idle_cost(process, json.loads(line)["target"])
        for _ in range(options.rounds):
            for way, (process, client, operator) in sides.items():
                large[way].append(cpu_ms(process, lambda o=operator: o @ vector))

                def ask(client=client):
                    for _ in range(SMALL_CALLS):
                        client.server_info()

                small[way].append(cpu_ms(process, ask) / SMALL_CALLS)
    print(
        "| who answers | 40 MB each way, CPU ms | small call, CPU ms | descriptors | kB |\n"
        "| --- | --- | --- | --- | --- |"
    )
    for way in WAYS:
        print(
            f"| {way} | {statistics.median(large[way]):.0f} | "
            f"{statistics.median(small[way]):.2f} | {idle[way][0]:.1f} | "
            f"{idle[way][1]:.0f} |"
        )


if __name__ == "__main__":
    main()
