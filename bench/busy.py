"""What a product of a small net costs beside busy processes.

    python bench/busy.py [--check] [--busy 10] [--rounds 5]

A server in a process of its own, with as many threads as it finds good, multiplies by the
Hessian of a net of 503 parameters: alone, and while ten other processes compute. CPU time
of the server and the client for each product, medians of interleaved rounds; the wall time
stands beside that of a plain gradient in torch with its usual threads, in the same rounds.

Two rows say what the machine asks of anybody. *Idle, now and then* has a pause before each
product, as long as a busy machine makes one wait: processors that did something else, or
nothing, have forgotten code and data. *Behind a pipe* is a product by torch's double
backward in a process that reads vectors from a pipe, without any service.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from first_answer import server, tree_s
from machine import busy
from torch import nn

import curvd

PRODUCTS = 100
PAUSE_S = 0.02
FACTOR = 1.5
"""Of the CPU time of the idle machine."""


def net() -> nn.Module:
    """503 parameters."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 11), nn.Tanh(), nn.Linear(11, 1)
    )


def gradient_s(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Wall seconds of one gradient."""
    start = time.perf_counter()
    for _ in range(20):
        torch.autograd.grad(
            nn.functional.mse_loss(module(x), y), list(module.parameters())
        )
    return (time.perf_counter() - start) / 20


def product(
    multiply: Callable[[], Any], process: psutil.Process, pause_s: float = 0.0
) -> tuple[float, float]:
    """CPU and wall seconds of one product, both processes together."""
    cpu_s, wall_s = time.process_time() + tree_s(process), time.perf_counter()
    for _ in range(PRODUCTS):
        time.sleep(pause_s)
        multiply()
    wall_s = time.perf_counter() - wall_s
    cpu_s = time.process_time() + tree_s(process) - cpu_s
    return cpu_s / PRODUCTS, wall_s / PRODUCTS - pause_s


def serve_by_pipe(end: Connection, x: torch.Tensor, y: torch.Tensor) -> None:
    """Multiply vectors by the Hessian with torch alone, until the pipe is closed."""
    torch.set_num_threads(1)
    module = net()
    parameters = list(module.parameters())
    sizes = [p.numel() for p in parameters]
    with contextlib.suppress(EOFError):
        while True:
            parts = torch.from_numpy(end.recv()).split(sizes)
            vectors = [v.view_as(p) for v, p in zip(parts, parameters, strict=True)]
            total = nn.functional.mse_loss(module(x), y)
            gradient = torch.autograd.grad(total, parameters, create_graph=True)
            rows = torch.autograd.grad(gradient, parameters, vectors)
            end.send(nn.utils.parameters_to_vector(rows).numpy())


@contextlib.contextmanager
def behind_a_pipe(
    x: torch.Tensor, y: torch.Tensor, vector: torch.Tensor
) -> Iterator[tuple[Callable[[], torch.Tensor], psutil.Process]]:
    """Start a process of `serve_by_pipe`; yield a product by it, and the process."""
    mine, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    server = context.Process(target=serve_by_pipe, args=(theirs, x, y), daemon=True)
    server.start()

    def multiply() -> torch.Tensor:
        mine.send(vector.numpy())
        return torch.from_numpy(mine.recv())

    try:
        yield multiply, psutil.Process(server.pid)
    finally:
        server.kill()
        server.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit non-zero on a miss")
    parser.add_argument("--busy", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    module = net()
    x, y = torch.randn(256, 12), torch.randn(256, 1)
    vector = torch.randn(sum(p.numel() for p in module.parameters()))
    rows: dict[str, tuple[int, float]] = {
        "idle": (0, 0.0),
        "idle, now and then": (0, PAUSE_S),
        "busy": (options.busy, 0.0),
    }
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in rows}
    with (
        server() as (target, pid),
        curvd.connect(target) as client,
        behind_a_pipe(x, y, vector) as (piped, plain),
    ):
        session = client.session_for(module, nn.MSELoss(), (x, y), batch_size=128)
        operator = session.hessian()
        gap = torch.as_tensor(operator @ vector) - piped()
        assert float(gap.norm()) <= 1e-4 * float(piped().norm())
        while session.refresh().operators[0][1].tier is not curvd.Tier.FINAL:
            time.sleep(0.02)
        process = psutil.Process(pid)
        product(lambda: operator @ vector, process)
        for _ in range(options.rounds):
            for name, (count, pause_s) in rows.items():
                with busy(count):
                    ours = product(lambda: operator @ vector, process, pause_s)
                    pipe = product(piped, plain, pause_s)
                    found[name].append((*ours, gradient_s(module, x, y), *pipe))
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in found.items()
    }
    print(
        f"{vector.numel()} parameters, {torch.get_num_threads()} threads of a client\n\n"
        "| machine | CPU of a product, ms | wall, ms | wall of a gradient in torch, ms "
        "| behind a pipe, CPU, ms | wall, ms |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, row in medians.items():
        print(f"| {name} | " + " | ".join(f"{1e3 * s:.2f}" for s in row) + " |")
    print(
        "\nCPU time of a busy machine's product, of that now and then: "
        f"{medians['busy'][0] / medians['idle, now and then'][0]:.2f}x; behind a pipe, of "
        f"the idle machine's: {medians['busy'][3] / medians['idle'][3]:.2f}x"
    )
    ratio = medians["busy"][0] / medians["idle"][0]
    met = ratio <= FACTOR
    print(f"CPU time {ratio:.2f}x, wanted {FACTOR}x: {'met' if met else '**missed**'}")
    return int(options.check and not met)


if __name__ == "__main__":
    sys.exit(main())
