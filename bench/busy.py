"""What a product of a small net costs beside busy processes.

    python bench/busy.py [--check] [--busy 10] [--rounds 5]

A server in a process of its own, with as many threads as it finds good, multiplies by the
Hessian of a net of 503 parameters: alone, and while ten other processes compute. CPU time
of the server and the client for each product, medians of interleaved rounds; the wall time
stands beside that of a plain gradient in torch with its usual threads, in the same rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import psutil
import torch
from first_answer import server, tree_s
from machine import busy
from torch import nn

import curvd

PRODUCTS = 100
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


def product(operator, vector, process: psutil.Process) -> tuple[float, float]:
    """CPU and wall seconds of one product, client and server together."""
    cpu_s, wall_s = time.process_time() + tree_s(process), time.perf_counter()
    for _ in range(PRODUCTS):
        operator @ vector
    wall_s = time.perf_counter() - wall_s
    cpu_s = time.process_time() + tree_s(process) - cpu_s
    return cpu_s / PRODUCTS, wall_s / PRODUCTS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit non-zero on a miss")
    parser.add_argument("--busy", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    module = net()
    x, y = torch.randn(256, 12), torch.randn(256, 1)
    vector = torch.randn(sum(p.numel() for p in module.parameters()))
    found: dict[str, list[tuple[float, float, float]]] = {"idle": [], "busy": []}
    with server() as (target, pid), curvd.connect(target) as client:
        session = client.session_for(module, nn.MSELoss(), (x, y), batch_size=128)
        operator = session.hessian()
        operator @ vector
        while session.refresh().operators[0][1].tier is not curvd.Tier.FINAL:
            time.sleep(0.02)
        process = psutil.Process(pid)
        product(operator, vector, process)
        for _ in range(options.rounds):
            for name, count in (("idle", 0), ("busy", options.busy)):
                with busy(count):
                    costs = product(operator, vector, process)
                    found[name].append((*costs, gradient_s(module, x, y)))
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in found.items()
    }
    print(
        f"{vector.numel()} parameters, {torch.get_num_threads()} threads of a client\n\n"
        "| machine | CPU of a product, ms | wall, ms | wall of a gradient in torch, ms |\n"
        "| --- | --- | --- | --- |"
    )
    for name, row in medians.items():
        print(f"| {name} | " + " | ".join(f"{1e3 * s:.2f}" for s in row) + " |")
    ratio = medians["busy"][0] / medians["idle"][0]
    met = ratio <= FACTOR
    print(
        f"\nCPU time {ratio:.2f}x, wanted {FACTOR}x: {'met' if met else '**missed**'}"
    )
    return int(options.check and not met)


if __name__ == "__main__":
    sys.exit(main())
