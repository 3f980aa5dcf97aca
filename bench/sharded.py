"""A transformer whose parameters two workers share, through a server: memory and rightness.

    PYTHONPATH=client:server:tests python bench/sharded.py [--layers 8] [--width 384]

A float64 GPT on sequences of 64 tokens. Prints what the workers say that they hold of its
parameters, what a product takes there and by eager torch in one process, and how far the
two are apart; exits with 1 where that is above 1e-10, or a worker held more than 0.6 of the
parameters.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from support import sharded_server

import curvd

MOST_HELD, MOST_WRONG = 0.6, 1e-10
CONTEXT, POINTS, BATCH = 64, 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=384)
    given = parser.parse_args()
    config = {"vocabulary": 256, "context": CONTEXT, "layers": given.layers}
    config |= {"width": given.width, "heads": 6}
    module = sharded_server.net(config=config)
    rng = np.random.default_rng(1)
    whole = rng.integers(0, 256, (POINTS, CONTEXT + 1))
    data = {"x": whole[:, :-1], "y": whole[:, 1:]}
    truth = sharded_server.Truth(module, data)
    v = rng.standard_normal(truth.size)
    print(f"{truth.size:,} parameters, load {os.getloadavg()[0]:.0f}")
    fails = False
    with (
        tempfile.TemporaryDirectory() as folder,
        sharded_server.serving(Path(folder)) as (target, _),
        curvd.connect(target) as client,
    ):
        model = client.register_model("gpt", config, module.state_dict())
        dataset = client.register_dataset(
            data, inputs=["x"], target="y", batch_size=BATCH
        )
        start_s = time.monotonic()
        with client.create_session(
            model, dataset, loss="cross_entropy", dtype="F64"
        ) as session:
            print(f"checked in {time.monotonic() - start_s:.1f} s")
            for kind in ("hessian", "ggn"):
                operator, times = getattr(session, kind)(), []
                for _ in range(3):
                    start_s = time.monotonic()
                    row = operator @ v
                    times.append(f"{time.monotonic() - start_s:.1f}")
                start_s = time.monotonic()
                want = getattr(truth, kind)(v)
                eager_s = time.monotonic() - start_s
                gap = np.linalg.norm(row - want) / np.linalg.norm(want)
                fails |= not gap <= MOST_WRONG
                print(
                    f"{kind}: {', '.join(times)} s; eager torch {eager_s:.1f} s; "
                    f"apart by {gap:.1e}; load {os.getloadavg()[0]:.0f}"
                )
            time.sleep(2.0)  # workers say what they hold twice a second
            for worker in client.server_info().workers:
                idle = worker.parameter_bytes / 8 / truth.size
                most = idle + worker.whole_bytes / 8 / truth.size
                fails |= not most <= MOST_HELD
                print(
                    f"worker {worker.rank} held {idle:.3f} P between products, and "
                    f"{most:.3f} P at most"
                )
    sys.exit(fails)


if __name__ == "__main__":
    main()
