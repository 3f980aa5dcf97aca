"""What the service costs beside the same product in this process.

    python bench/service.py [--check] [--rounds 12] [--models mlp gpt]

Two comparisons, interleaved, one thread for the computation:

- a remote MatVec beside the product of a warm operator in this process and the echo of
  the same bytes through the same service (an identity operator), five trips a round;
- 16 clients at once, each with one vector after the other, beside a MatMat of 16
  columns, one before and one after. Several vectors, because throughput is meant.

The machine's speed drifts by more than what is looked for, so ratios are taken between
neighbours, and their median counts. Both processes compute by one plan: this one
measures, and the server remembers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import wire

import curvd
from curvd.contract import (
    DatasetSpec,
    Dtype,
    LossName,
    LossSpec,
    Mode,
    ModelSpec,
    OperatorSpec,
)
from curvd_server.device import torch_device
from curvd_server.models import builders

CLIENTS = 16
VECTORS = {"mlp": 8, "gpt": 2}
"""Products that each client asks for in a row."""
TRIPS = 5
"""In each round, of what takes only one product."""
ROUNDS = {"mlp": 12, "gpt": 6}
BUDGET_BYTES = 4 << 30
MODELS = {
    "mlp": {"widths": [784, 1024, 1024, 10], "activation": "gelu"},
    "gpt": {"vocabulary": 1024, "context": 64, "layers": 8, "width": 320, "heads": 5},
}


def data(name: str) -> dict[str, np.ndarray]:
    """A few mini-batches."""
    rng = np.random.default_rng(0)
    if name == "mlp":
        return {
            "x": rng.standard_normal((512, 784), dtype="f4"),
            "y": rng.integers(0, 10, 512),
        }
    return {
        "x": rng.integers(0, 1024, (8, 64)),
        "y": rng.integers(0, 1024, (8, 64)),
    }


def batch_size(name: str) -> int:
    """Data points per mini-batch."""
    return 128 if name == "mlp" else 2


class Plans:
    """Plans by structure, in a file that both processes read."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def get(self, key: str, default: str, /) -> str:
        known = json.loads(self._path.read_text() or "{}")
        return known.get(key, default)

    def __setitem__(self, key: str, value: str) -> None:
        known = json.loads(self._path.read_text() or "{}")
        self._path.write_text(json.dumps({**known, key: value}))


def serve(plans: str) -> None:
    """Run the real service until killed."""
    torch.set_num_threads(1)
    wire.serve("tcp", device=torch_device.TorchDevice({}, "cpu", Plans(plans)))


def local_operator(name: str, state: dict[str, np.ndarray], plans: str):
    """The same operator, built in this process."""
    device = torch_device.TorchDevice({}, "cpu", Plans(plans))
    problem = device.load(
        ModelSpec(builder=name, config=MODELS[name]),
        state,
        data(name),
        DatasetSpec(inputs=("x",), target="y", batch_size=batch_size(name)),
        LossSpec(name=LossName.CROSS_ENTROPY),
        Mode.EVAL,
        Dtype.FLOAT32,
    )
    return problem.build(
        OperatorSpec(), budget_bytes=BUDGET_BYTES, cancelled=lambda: False
    )


def compare(
    name: str, client: curvd.Client, echo: curvd.Client, rounds: int, plans: str
):
    """Measure one model; return the targets that were missed."""
    torch.manual_seed(0)
    module = builders.BUILDERS[name](MODELS[name])
    state = {n: t.detach().numpy().copy() for n, t in module.state_dict().items()}
    local = local_operator(name, state, plans)
    model = client.register_model(name, MODELS[name], state)
    dataset = client.register_dataset(
        data(name), inputs="x", target="y", batch_size=batch_size(name)
    )
    session = client.create_session(
        model, dataset, loss="cross_entropy", budget_bytes=BUDGET_BYTES
    )
    H = session.hessian()
    size = session.layout.size
    wire.SIZES = {0: size}
    identity = wire.open_sessions(echo)[size]
    v = np.random.default_rng(1).standard_normal(size, dtype=np.float32)
    V = np.random.default_rng(2).standard_normal((CLIENTS, size), dtype=np.float32)
    remote_v, local_v = H @ v, local.apply(v[None], cancelled=lambda: False)[0]
    gap = np.linalg.norm(remote_v - local_v) / np.linalg.norm(local_v)
    plans = H.last.plan.mode, local.report.mode
    singly = {
        "in process": lambda: local.apply(v[None], cancelled=lambda: False),
        "echo": lambda: identity @ v,
        "remote": lambda: H @ v,
    }
    trips: list[dict[str, float]] = []
    matrices, crowds = [seconds(lambda: V @ H)], []
    for number in range(rounds + 1):
        new = [{who: seconds(run) for who, run in singly.items()} for _ in range(TRIPS)]
        trips += new if number else []  # the first round warms
        crowd = seconds(lambda: at_once(client, session.id, V, VECTORS[name]))
        crowds.append(crowd / VECTORS[name])
        matrices.append(seconds(lambda: V @ H))
    ratio = statistics.median(
        t["remote"] / (t["in process"] + t["echo"]) for t in trips
    )
    around = [(a + b) / 2 for a, b in itertools.pairwise(matrices)]
    together = statistics.median(
        m / c for m, c in list(zip(around, crowds, strict=True))[1:]
    )
    print(f"{name}, P = {size}, plans {plans}, remote and local differ by {gap:.1e}")
    times = {who: [t[who] for t in trips] for who in singly}
    for who, took in (times | {"one MatMat": around, "16 clients": crowds}).items():
        print(f"  {who:12} {statistics.median(took) * 1e3:9.1f} ms")
    print(f"  remote over in process plus echo {ratio:.3f} (want <= 1.05)")
    print(f"  throughput of 16 clients over one MatMat {together:.3f} (want >= 1)")
    session.delete()
    return [
        text
        for text, late in (
            (f"{name}: remote MatVec {ratio:.3f}, want <= 1.05", ratio > 1.05),
            (f"{name}: 16 clients {together:.3f}, want >= 1", together < 1),
            (f"{name}: remote and local differ by {gap:.1e}", gap > 1e-4),
            (f"{name}: other plans, nothing is shown: {plans}", len(set(plans)) > 1),
        )
        if late
    ]


def seconds(run: Callable[[], object]) -> float:
    """Time one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


_barrier = threading.Barrier(CLIENTS)


def at_once(client: curvd.Client, session_id: str, V: np.ndarray, vectors: int) -> None:
    """Ask for products from each of 16 threads."""

    def one(v: np.ndarray) -> None:
        H = client.session(session_id).hessian()
        _barrier.wait()
        for _ in range(vectors):
            H @ v

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(one, V))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="exit non-zero below a target"
    )
    parser.add_argument("--rounds", type=int, help="12 of the mlp, 6 of the gpt")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.serve:
        serve(arguments.serve)
        return 0
    curvd.tune_allocator()
    here = Path(__file__)
    plans = tempfile.NamedTemporaryFile(suffix=".json")
    server, line = wire.start(str(here), "--serve", plans.name, OMP_NUM_THREADS="1")
    other, echo_line = wire.start(str(here.with_name("wire.py")), "--serve", "tcp")
    missed = []
    try:
        with wire.connected(line) as client, wire.connected(echo_line) as echo:
            for name in arguments.models:
                rounds = arguments.rounds or ROUNDS[name]
                missed += compare(name, client, echo, rounds, plans.name)
    finally:
        server.kill()
        other.kill()
    for text in missed:
        print("MISSED", text)
    return int(arguments.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
