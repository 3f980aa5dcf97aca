"""Products whose operand is larger than 2 GiB, and vectors beyond 4 GiB on the wire.

    python bench/big.py [--layers 32] [--width 4100] [--gigabytes 4.4]

First a real model: an mlp with more than 2 GiB of float32 parameters is registered and
verified by the real service, and one remote MatVec is compared, row by row, with central
differences of a gradient that is written by hand, in float64, some rows at a time. It is
verified layer by layer; what each stage of that held at most is printed as a table. Then the
transport alone: a device that doubles in place, so that what is measured is the
server's memory beside one vector.

The server's peaks are given in float32 vectors of all parameters, beyond the parameters.
The first part needs 12 GiB of memory at its peak, the second 14 GiB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import wire
from numpy.typing import NDArray

import curvd
from curvd.contract import Stage
from curvd_server.device import torch_device
from curvd_server.engine.verification import size
from curvd_server.engine.verification.verify import HELD
from curvd_server.system import Ongoing

WANT_VECTORS = 3.0
WANT_VERIFIED = 1.2
"""Most that an opening may hold beyond the parameters while it checks and verifies."""
MOST_VECTORS, MOST_BESIDE_BYTES = 4, 1 << 30
"""What the server's data may take (RLIMIT_DATA): too little to verify entry by entry."""
WANT_ERROR = 1e-4
"""Relative error of a row; the float32 of eight layers gives up to 4e-5."""
STEP = 1e-7
POINTS, BATCH = 6, 4
"""Two mini-batches, the last one ragged."""
SLAB = 256
"""Rows of a weight that are in float64 at once."""
SIGNS = (1.0, -1.0)

Array = NDArray[np.float64]


class Twice(wire.Identity):
    """An operator that doubles, in the memory of the operand."""

    def apply(self, columns, *, counts=(), cancelled):
        columns *= 2
        return columns


class Doubling(wire.Echo):
    """A device whose sessions have one parameter and that operator."""

    def load(self, model, *rest):
        return Doubling(model.config["size"])

    def build(self, spec, *, budget_bytes, cancelled):
        return Twice()


@dataclass(frozen=True)
class Net:
    """Layers ``tanh(W a + b)``, the last without tanh; square, and made from seeds."""

    layers: int
    width: int

    @property
    def size(self) -> int:
        """P."""
        return self.layers * (self.width + 1) * self.width

    def layer(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Make one layer's weight and bias, always the same."""
        rng = np.random.default_rng([0, index])
        weight = rng.standard_normal((self.width, self.width), dtype=np.float32)
        weight /= np.sqrt(np.float32(self.width))
        return weight, rng.standard_normal(self.width, dtype=np.float32) / 10

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Name all of them as the builder does."""
        named = {}
        for index in range(self.layers):
            weight, bias = self.layer(index)
            named |= {f"{2 * index + 1}.weight": weight, f"{2 * index + 1}.bias": bias}
        return named

    def parts(self, vector, index: int):
        """View one layer's weight and bias in a vector of all parameters."""
        square = self.width**2
        start = index * (square + self.width)
        weight, bias = np.split(vector[start : start + square + self.width], [square])
        return weight.reshape(self.width, self.width), bias

    def data(self) -> dict[str, NDArray[np.float32]]:
        """Make the dataset."""
        rng = np.random.default_rng(1)
        return {
            n: rng.standard_normal((POINTS, self.width), dtype=np.float32) for n in "xy"
        }


def slabs(weight, direction) -> Iterator[tuple[slice, Array, Array]]:
    """Some rows of a weight at a time, and how far they move: both in float64."""
    for start in range(0, len(weight), SLAB):
        rows = slice(start, start + SLAB)
        yield rows, weight[rows].astype("f8"), STEP * direction[rows].astype("f8")


def activations(net: Net, vector) -> dict[float, list[Array]]:
    """Run the net forwards at ``θ + STEP v`` and ``θ - STEP v``.

    Returns:
        By sign, the input of each layer and the output of the last.
    """
    found = {sign: [net.data()["x"].astype("f8")] for sign in SIGNS}
    for index in range(net.layers):
        (weight, bias), (move, bias_move) = net.layer(index), net.parts(vector, index)
        made = {s: bias + s * STEP * bias_move.astype("f8") for s in SIGNS}
        made = {s: np.tile(b, (POINTS, 1)) for s, b in made.items()}
        for rows, here, away in slabs(weight, move):
            for sign in SIGNS:
                made[sign][:, rows] += found[sign][-1] @ (here + sign * away).T
        last = index == net.layers - 1
        for sign in SIGNS:
            found[sign].append(made[sign] if last else np.tanh(made[sign]))
    return found


def row_errors(net: Net, vector, result) -> Iterator[tuple[str, Array]]:
    """Compare a product with the central difference of the gradient of the mean square.

    The gradient of a weight is ``sum_n d_n a_n^T``, with ``d`` the derivative in what a
    layer adds up and ``a`` its input, so a few rows need nothing of the others.

    Args:
        net: The model.
        vector: ``v: [P]``.
        result: ``H v: [P]``.

    Yields:
        Name of a parameter, and the relative error of each of its rows (a bias is one).
    """
    inputs = activations(net, vector)
    target = net.data()["y"].astype("f8")
    outer = {s: 2 * (inputs[s].pop() - target) / target.size for s in SIGNS}
    for index in reversed(range(net.layers)):
        weight, (move, _) = net.layer(index)[0], net.parts(vector, index)
        got, got_bias = net.parts(result, index)
        below = {s: np.zeros((POINTS, net.width)) for s in SIGNS}
        errors, sizes = np.empty(net.width), np.empty(net.width)
        ahead, behind = (inputs[s].pop() for s in SIGNS)
        for rows, here, away in slabs(weight, move):
            up, down = (outer[s][:, rows] for s in SIGNS)
            want = (up.T @ ahead - down.T @ behind) / (2 * STEP)
            errors[rows] = np.linalg.norm(got[rows] - want, axis=1)
            sizes[rows] = np.linalg.norm(want, axis=1)
            for sign in SIGNS:
                below[sign] += outer[sign][:, rows] @ (here + sign * away)
        # Rows far below the typical one may be rounding.
        least = 1e-3 * np.sqrt(np.mean(sizes**2))
        yield f"{2 * index + 1}.weight", errors / (sizes + least)
        want = (outer[1.0] - outer[-1.0]).sum(0) / (2 * STEP)
        gap = np.linalg.norm(got_bias - want) / np.linalg.norm(want)
        yield f"{2 * index + 1}.bias", np.array([gap])
        outer = {
            s: below[s] * (1 - a**2)
            for s, a in zip(SIGNS, (ahead, behind), strict=True)
        }


class Stages:
    """What each stage of long work held at most, written down where it happens.

    Args:
        path: A line of JSON for each stage.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def watch(self) -> None:
        """Note, in this process, the peak of resident memory whenever a stage ends."""
        enter, leave = Ongoing.enter, Ongoing.__exit__

        def entered(work: Ongoing, *stage, **more) -> None:
            self._note(work)
            enter(work, *stage, **more)

        def left(work: Ongoing, *error) -> None:
            self._note(work)
            leave(work, *error)

        Ongoing.enter, Ongoing.__exit__ = entered, left

    def _note(self, work: Ongoing) -> None:
        latest = work._entered[-1]
        line = {
            "work": work.work,
            "stage": latest.stage,
            "detail": latest.detail,
            "seconds": time.monotonic() - latest.began_s,
            "peak": wire.peak_bytes("self"),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        wire.reset_peak("self")

    def table(self, idle: int, column_bytes: int) -> tuple[str, float]:
        """Read what was written.

        Args:
            idle: Resident bytes before a model was registered.
            column_bytes: Of a float32 vector of all parameters.

        Returns:
            The table, and the most that a stage held which checks or verifies, in vectors
            beyond the parameters, which are pages of a mapped file.
        """
        rows, most = [], 0.0
        for text in self._path.read_text().splitlines():
            line = json.loads(text)
            if line["stage"] == Stage.WAITING:
                continue
            vectors = (line["peak"] - idle) / column_bytes - 1
            name = f"{line['work']}: {line['stage']} {line['detail']}".strip()
            rows.append(f"  {name:48} {line['seconds']:8.1f} {vectors:8.2f}")
            if line["stage"] in (Stage.CHECKING, Stage.VERIFYING):
                most = max(most, vectors)
        head = f"  {'stage':48} {'seconds':>8} {'vectors':>8}"
        return "\n".join([head, *rows]), most


@contextlib.contextmanager
def serving(kind: str, *more: str) -> Iterator[tuple[int, curvd.Client]]:
    """Start a server; stop it so that it removes its files."""
    process, line = wire.start(__file__, "--serve", kind, *more)
    try:
        with wire.connected(line) as client:
            yield process.pid, client
    finally:
        process.communicate(timeout=60)


def timed_product(pid: int, operator, vector):
    """Multiply once; return the result, seconds, and the server's peak in vectors."""
    idle = wire.resident_bytes(pid)
    wire.reset_peak(pid)
    start = time.perf_counter()
    result = operator @ vector
    seconds = time.perf_counter() - start
    return result, seconds, (wire.peak_bytes(pid) - idle) / vector.nbytes


def of_a_model(net: Net) -> list[str]:
    """Multiply by a model's Hessian; return what was missed."""
    column_bytes = 4 * net.size
    most_bytes = MOST_VECTORS * column_bytes + MOST_BESIDE_BYTES
    config = {"widths": [net.width] * (net.layers + 1), "activation": "tanh"}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(
            "model", "--stages", f"{folder}/stages", "--most-bytes", str(most_bytes)
        ) as (pid, client),
    ):
        stages = Stages(Path(folder) / "stages")
        idle, start = wire.resident_bytes(pid), time.perf_counter()
        model = client.register_model("mlp", config, net.state())
        dataset = client.register_dataset(
            net.data(), inputs="x", target="y", batch_size=BATCH
        )
        registered_s = time.perf_counter() - start
        registering = (wire.peak_bytes(pid) - idle) / column_bytes
        wire.reset_peak(pid)
        session = client.create_session(model, dataset, loss="mse")
        opened_s = time.perf_counter() - start - registered_s
        # The parameters are pages of a mapped file, and resident by now.
        opening = (wire.peak_bytes(pid) - idle) / column_bytes - 1
        operator = session.hessian()
        vector = np.random.default_rng(2).standard_normal(net.size, dtype=np.float32)
        result, seconds, peak = timed_product(pid, operator, vector)
        plan = operator.last.plan
        table, verified = stages.table(idle, column_bytes)
    print(
        f"mlp, P = {net.size}, {column_bytes / 2**30:.2f} GiB: registered in "
        f"{registered_s:.0f} s (server's peak {registering:.2f} vectors), opened in "
        f"{opened_s:.0f} s ({opening:.2f} vectors), plan {plan.mode}, gap to central "
        f"differences {plan.difference_gap:.1e}, asymmetry {plan.symmetry_gap:.1e}"
    )
    print(table)
    print(
        f"checked and verified with {verified:.2f} vectors at most beyond the parameters "
        f"(want <= {WANT_VERIFIED}); entry by entry it takes {2 * HELD}, and the server's "
        f"data may take {most_bytes / column_bytes:.1f}"
    )
    start, worst, where, rows = time.perf_counter(), 0.0, "", 0
    for name, errors in row_errors(net, vector, result):
        rows += len(errors)
        if not errors.max() <= worst:
            worst, where = errors.max(), name
    print(
        f"MatVec in {seconds:.1f} s, server's peak {peak:.2f} vectors beyond the "
        f"parameters (want <= {WANT_VECTORS}); worst of {rows} rows off by {worst:.1e}, "
        f"in {where} (want <= {WANT_ERROR}; checked in {time.perf_counter() - start:.0f} s)"
    )
    return [
        *["model: memory"] * (not peak <= WANT_VECTORS),
        *["model: memory of verification"] * (not verified <= WANT_VERIFIED),
        *["model: result"] * (not worst <= WANT_ERROR),
    ]


def of_the_transport(gigabytes: float) -> list[str]:
    """Move a vector there and back; return what was missed."""
    size = int(gigabytes * 1e9 / 4)
    with serving("doubling") as (pid, client):
        wire.SIZES = {0: size}
        operator = wire.open_sessions(client)[size]
        vector = np.arange(size, dtype=np.float32)
        result, seconds, peak = timed_product(pid, operator, vector)
    vector *= 2
    right = np.array_equal(result, vector)
    print(
        f"{vector.nbytes / 2**30:.2f} GiB each way in {seconds:.1f} s, server's peak "
        f"{peak:.2f} vectors (want <= {WANT_VECTORS}), result "
        f"{'right' if right else 'WRONG'}"
    )
    return ["transport: memory"] * (not peak <= WANT_VECTORS) + [
        "transport: result"
    ] * (not right)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32, help="0: no model")
    parser.add_argument("--width", type=int, default=4100)
    parser.add_argument("--gigabytes", type=float, default=4.4, help="0: no transport")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--stages", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--most-bytes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        model = arguments.serve == "model"
        if model:
            size.SHARE = 0.0  # layer by layer on any machine
            most = arguments.most_bytes
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
            Stages(arguments.stages).watch()
        wire.serve("tcp", torch_device.TorchDevice({}, "cpu") if model else Doubling())
        return 0
    curvd.tune_allocator()
    missed: list[str] = []
    if arguments.layers:
        missed += of_a_model(Net(arguments.layers, arguments.width))
    if arguments.gigabytes:
        missed += of_the_transport(arguments.gigabytes)
    for text in missed:
        print("MISSED", text)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
