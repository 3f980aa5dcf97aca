"""What a training pays for being watched: CPU time of the thread that trains.

    python bench/watch.py [--check] [--pairs 5]

Nets are trained in turns: alone, and with `curvd.watch` every 20 steps, which asks a server
in a process of its own for the sharpness and the trace. Time is that of the thread that
trains (`time.thread_time`): its steps, the hook after each, the copies, and what sharing the
interpreter's lock, caches and memory costs. `beside` is the same ratio without a watch, while
another process asks that server for the same: what a busy neighbour costs on this machine.
Ratios are medians over pairs. With --check the exit status is 1 if a ratio is above 1.1, or
if nothing was read.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import curvd

MOST = 1.1
NEIGHBOUR = """
import sys, curvd
H = curvd.connect(sys.argv[1]).session(sys.argv[2]).hessian()
while True:
    H.eigsh(1, tolerance=1e-3, warm_start=True, vectors=False)
    H.trace(samples=30)
    print(flush=True)
"""
EVERY, STEPS, BATCH = 20, 500, 128


@dataclass(frozen=True)
class Net:
    """A training: what, and on how many features."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


NETS = (
    Net("mlp", lambda: mlp(128, 256, 10), (128,)),
    Net("wide mlp", lambda: mlp(256, 512, 10), (256,)),
    Net("cnn", lambda: cnn(), (1, 8, 8)),
)


def mlp(inputs: int, width: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, outputs),
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


@dataclass(frozen=True)
class Run:
    """One training."""

    seconds: float
    readings: int
    skipped: int


def train(net: Net, client: curvd.Client | None, steps: int) -> Run:
    """Train a net, watched if there is a client."""
    torch.manual_seed(0)
    module = net.make()
    x, y = torch.randn(1024, *net.shape), torch.randint(10, (1024,))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    loss = nn.CrossEntropyLoss()
    watch = None
    if client is not None:
        session = client.session_for(module, loss, (x[:256], y[:256]), batch_size=256)
        watch = curvd.watch(session, module, every=EVERY)
    gc.collect()  # what opening a session left is not what watching costs
    begun = time.thread_time()
    for step in range(steps):
        part = slice((step * BATCH) % 1024, (step * BATCH) % 1024 + BATCH)
        optimizer.zero_grad()
        loss(module(x[part]), y[part]).backward()
        optimizer.step()
    seconds = time.thread_time() - begun
    if watch is None:
        return Run(seconds, 0, 0)
    watch.close(wait_s=60.0)
    if watch.errors:
        raise SystemExit(f"{net.name}: {watch.last_error}")
    session.delete()
    return Run(seconds, len(watch.readings), watch.skipped)


@contextmanager
def serving() -> Iterator[str]:
    """A server in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        target = f"unix:{folder}/socket"
        command = [sys.executable, "-m", "curvd.cli", "serve", "--listen", target]
        server = subprocess.Popen(
            [*command, "--data-dir", folder], stderr=subprocess.DEVNULL
        )
        try:
            with curvd.connect(target) as client:
                client.server_info()  # waits until it listens
            yield target
        finally:
            server.terminate()
            server.wait()


@contextmanager
def neighbour(net: Net, client: curvd.Client, target: str) -> Iterator[None]:
    """Another process that asks the server about such a net, all the time."""
    loss = nn.CrossEntropyLoss()
    data = torch.randn(256, *net.shape), torch.randint(10, (256,))
    with client.session_for(net.make(), loss, data, batch_size=256) as session:
        command = [sys.executable, "-c", NEIGHBOUR, target, session.id]
        asks = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert asks.stdout is not None
        try:
            asks.stdout.readline()
            yield
        finally:
            asks.kill()
            asks.communicate()


def compared(net: Net, client: curvd.Client, target: str, options: Any) -> bool:
    """Print a row."""
    train(net, client, 20)
    ratios, beside, alone, last = [], [], [], Run(0.0, 0, 0)
    for _ in range(options.pairs):
        first = train(net, None, options.steps).seconds
        last = train(net, client, options.steps)
        second = train(net, None, options.steps).seconds
        with neighbour(net, client, target):
            busy = train(net, None, options.steps).seconds
        alone += [first, second]
        ratios.append(2 * last.seconds / (first + second))
        beside.append(2 * busy / (first + second))
    ratio = statistics.median(ratios)
    is_good = ratio <= MOST and last.readings > 0
    size = sum(p.numel() for p in net.make().parameters())
    step_us = statistics.median(alone) / options.steps * 1e6
    verdict = "ok" if is_good else "MISSED"
    print(
        f"{net.name:10} {size:8} {step_us:8.0f} {ratio:8.3f} "
        f"{statistics.median(beside):8.3f} {last.readings:9} {last.skipped:8}  {verdict}",
        flush=True,
    )
    return is_good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit by the targets")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.steps} steps, a snapshot every {EVERY}; target: ratio <= {MOST}")
    print("net              P us/step    ratio   beside  readings  skipped")
    with serving() as target, curvd.connect(target) as client:
        rows = [compared(net, client, target, options) for net in NETS]
    return 0 if all(rows) or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
