"""16 clients at once on one session: every answer right, and products shared.

    python bench/smoke.py --check

Each client has a connection of its own and asks for several products of a warm Hessian
over loopback. Every answer is compared with central differences of the gradient in
float64. A run of the device that served c columns counts 1/c for each of its columns, so
the counts add up to the number of device products.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

import curvd
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig
from curvd_server.models import builders

CLIENTS, PRODUCTS = 16, 8
CONFIG = {"widths": [64, 256, 256, 10], "activation": "tanh"}
TOLERANCE = 1e-6


def problem() -> tuple[nn.Module, np.ndarray, np.ndarray]:
    """A small net with data, float64."""
    torch.manual_seed(0)
    module = builders.BUILDERS["mlp"](CONFIG).double()
    rng = np.random.default_rng(0)
    return module, rng.standard_normal((1000, 64)), rng.integers(0, 10, 1000)


def reference(module: nn.Module, inputs: np.ndarray, labels: np.ndarray, v: np.ndarray):
    """Hv by central differences of the gradient."""
    parameters = list(module.parameters())
    start = nn.utils.parameters_to_vector(parameters).detach()
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    step = 1e-6 / np.linalg.norm(v)

    def gradient(theta: torch.Tensor) -> torch.Tensor:
        nn.utils.vector_to_parameters(theta, parameters)
        loss = nn.functional.cross_entropy(module(x), y)
        return nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters))

    direction = torch.from_numpy(v)
    difference = gradient(start + step * direction) - gradient(start - step * direction)
    nn.utils.vector_to_parameters(start, parameters)
    return (difference / (2 * step)).numpy()


def one_client(
    target: str, session_id: str, vectors: np.ndarray, start: threading.Barrier
):
    """Ask for one product after the other; return results and run sizes."""
    with curvd.connect(target) as client:
        hessian = client.session(session_id).hessian()
        start.wait()
        answers = []
        for v in vectors:
            product = hessian @ v
            answers.append((product, hessian.last.run_columns))
        return answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="exit non-zero on a failure"
    )
    arguments = parser.parse_args()
    module, inputs, labels = problem()
    with (
        tempfile.TemporaryDirectory() as data_dir,
        serve_in_thread(
            ServerConfig(listen="127.0.0.1:0", data_dir=Path(data_dir))
        ) as target,
        curvd.connect(target) as client,
    ):
        session = client.create_session(
            model=client.register_model("mlp", CONFIG, module.state_dict()),
            dataset=client.register_dataset(
                {"x": inputs, "y": labels}, inputs=["x"], target="y", batch_size=128
            ),
            loss="cross_entropy",
            dtype="F64",
        )
        size = session.info.layout.size
        vectors = np.random.default_rng(1).standard_normal((CLIENTS, PRODUCTS, size))
        barrier = threading.Barrier(CLIENTS)
        began = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = list(
                pool.map(
                    lambda mine: one_client(target, session.info.id, mine, barrier),
                    vectors,
                )
            )
        seconds = time.perf_counter() - began

    runs = sum(1 / columns for mine in answers for _, columns in mine)
    worst = 0.0
    for asked, answered in zip(vectors, answers, strict=True):
        for v, (product, _) in zip(asked, answered, strict=True):
            exact = reference(module, inputs, labels, v)
            worst = max(worst, np.linalg.norm(product - exact) / np.linalg.norm(exact))
    requests = CLIENTS * PRODUCTS
    passed = worst <= TOLERANCE and round(runs) < requests
    print(
        f"{'clients':>8} {'requests':>9} {'device runs':>12} {'worst error':>12} {'seconds':>8}"
    )
    print(f"{CLIENTS:8d} {requests:9d} {round(runs):12d} {worst:12.1e} {seconds:8.2f}")
    print("passed" if passed else "FAILED")
    return int(arguments.check and not passed)


if __name__ == "__main__":
    sys.exit(main())
