"""One user who multiplies without a pause, for bench/neighbours.py; and nets to open."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np

import curvd

WIDTHS = {"small": [16, 64, 64, 4], "medium": [256, 512, 512, 10]}
"""Of the multiplier's nets: a product of one takes 1 ms, of the other 100 ms."""
POINTS = 512


def state_of(widths: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters of the builder mlp."""
    rng, state = np.random.default_rng(seed), {}
    for at, (inner, outer) in enumerate(itertools.pairwise(widths)):
        scale = inner**-0.5
        weight = rng.standard_normal((outer, inner), np.float32) * np.float32(scale)
        state[f"{2 * at + 1}.weight"] = weight
        state[f"{2 * at + 1}.bias"] = np.zeros(outer, np.float32)
    return state


def points_of(widths: list[int], count: int = POINTS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((count, widths[0]), np.float32)
    return {"x": x, "y": rng.integers(0, widths[-1], count)}


def registered(client: curvd.Client, widths: list[int], seed: int = 0):
    config = {"widths": widths, "activation": "tanh"}
    model = client.register_model("mlp", config, state_of(widths, seed))
    data = client.register_dataset(
        points_of(widths), inputs="x", target="y", batch_size=128
    )
    return model, data


def opened(client: curvd.Client, widths: list[int], **options):
    model, data = registered(client, widths)
    return client.create_session(model, data, loss="cross_entropy", **options)


def multiply(target: str, size: str) -> None:
    """Open a session, then multiply from each line of the input to the next."""
    stopped = threading.Event()
    with curvd.connect(target) as client:
        session = opened(client, WIDTHS[size])
        H, v = session.hessian(), np.ones(session.layout.size, np.float32)
        for _ in range(20):
            H @ v
        print("ready", flush=True)
        times: list[float] = []

        def work() -> None:
            while not stopped.is_set():
                start_s = time.perf_counter()
                H @ v
                times.append(time.perf_counter() - start_s)

        while sys.stdin.readline():
            times.clear()
            stopped.clear()
            thread = threading.Thread(target=work)
            thread.start()
            sys.stdin.readline()
            stopped.set()
            thread.join()
            print(json.dumps(times), flush=True)


class Multiplier:
    """Someone who multiplies, in a process of his own."""

    def __init__(self, target: str, size: str) -> None:
        command = [sys.executable, __file__, target, size]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout.readline() == "ready\n"

    def _say(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    @contextlib.contextmanager
    def timed(self, times: list[float]) -> Iterator[None]:
        """Have products timed meanwhile."""
        self._say()
        yield
        self._say()
        times.extend(json.loads(self._process.stdout.readline()))

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)


if __name__ == "__main__":
    multiply(*sys.argv[1:])
