"""Wall time of Eigsh on the server against SciPy's eigsh over remote MatVec.

Part of bench/queries.py (`--wall`): k = 10 on a float32 gpt of 10 M parameters, on
loopback and through a relay that delays by 5 ms each way and passes 1 Gb/s. Both may use
all cores, and both get native code, if it is made in time. The targets are checked where
one product is short, as on the devices that they are meant for: one sequence of data.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from relay import Relay
from scipy.sparse.linalg import LinearOperator, eigsh

import curvd
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig
from curvd_server.models import builders

GPT = {"vocabulary": 1024, "context": 64, "width": 320, "heads": 5}
K, TOLERANCE = 10, 1e-3


@dataclass(frozen=True)
class Link:
    """How client and server are connected, and how often faster ours has to be."""

    name: str
    delay_s: float
    bytes_per_s: float
    factor: float


LINKS = (
    Link("loopback", 0.0, 1e12, 1.3),
    Link("1 Gb/s, 5 ms", 0.005, 125e6, 10.0),
)


@dataclass(frozen=True)
class Lap:
    """What one contestant took."""

    wall_s: float
    cpu_s: float
    """Of this process, client and server together."""
    products: int
    wire_bytes: int
    compute_s: float
    """Products on the device."""
    algebra_s: float
    """Orthogonalisation and small matrices, where the loop runs."""
    values: np.ndarray
    """[k], largest first."""

    @property
    def wire_s(self) -> float:
        """What is left: the link, framing, and waiting for a thread."""
        return self.wall_s - self.compute_s - self.algebra_s

    @property
    def rest_s(self) -> float:
        """All but the products."""
        return self.wall_s - self.compute_s

    def __str__(self) -> str:
        return (
            f"{self.wall_s:7.2f} s wall: {self.compute_s:.2f} products, "
            f"{self.algebra_s:.2f} algebra, {self.wire_s:.2f} wire; "
            f"{self.cpu_s:7.2f} s CPU, {self.products:4} products, "
            f"{self.wire_bytes / 1e6:8.1f} MB"
        )


@contextlib.contextmanager
def gpt_session(
    config: Mapping[str, int], sequences: int, native_s: float
) -> Iterator[tuple[str, str]]:
    """Target of a server, and a warm session on a gpt with one mini-batch.

    Args:
        config: Of the builder.
        sequences: Of the mini-batch.
        native_s: How long to wait for native code; 0: it is not made.
    """
    torch.manual_seed(0)
    tokens = torch.randint(config["vocabulary"], (sequences, config["context"] + 1))
    with tempfile.TemporaryDirectory() as folder:
        server = ServerConfig(
            listen="127.0.0.1:0",
            data_dir=Path(folder),
            compile_after_s=1e-3 if native_s else 0.0,
        )
        with serve_in_thread(server) as target, curvd.connect(target) as client:
            state = builders.BUILDERS["gpt"](dict(config)).state_dict()
            model = client.register_model("gpt", dict(config), state)
            dataset = client.register_dataset(
                {"x": tokens[:, :-1], "y": tokens[:, 1:]},
                inputs=["x"],
                target="y",
                batch_size=sequences,
            )
            with client.create_session(model, dataset, loss="cross_entropy") as session:
                product_s, native = warm(session.hessian(), native_s)
                print(
                    f"\ngpt: {session.layout.size} parameters, one mini-batch of "
                    f"{sequences} x {config['context']} tokens, a product takes "
                    f"{product_s:.3f} s, native code: {native}, "
                    f"{torch.get_num_threads()} threads",
                    flush=True,
                )
                yield target, session.id


def warm(H: curvd.RemoteOperator, native_s: float) -> tuple[float, bool]:
    """Multiply until native code has taken over; say what a product takes, and whether."""
    until_s = time.monotonic() + native_s
    probe = curvd.Probe(distribution="rademacher", seed=0)
    while True:
        times = []
        for _ in range(5):
            H.multiply(probe, store="warm")
            assert H.last is not None and H.last.plan is not None
            times.append(H.last.compute_s)
        if H.last.plan.compiled or time.monotonic() > until_s:
            return min(times), H.last.plan.compiled
        time.sleep(2.0)  # leave the cores to the compiler


def ours(relay: Relay, session_id: str, vectors: bool) -> Lap:
    """Eigsh where the data is."""
    with curvd.connect(relay.target) as client:
        H = client.session(session_id).hessian()
        H @ np.zeros(H.shape[0], H.dtype)
        clock = _Clock(relay)
        found = H.eigsh(K, tolerance=TOLERANCE, vectors=vectors)
        lap = clock.lap(found.products, found.values)
        info = found.info
        assert found.converged
        return replace(
            lap,
            compute_s=info.compute_s,
            algebra_s=info.elapsed_s - info.queue_s - info.compute_s,
        )


def theirs(relay: Relay, session_id: str, vectors: bool) -> Lap:
    """SciPy's eigsh here, its products there."""
    with curvd.connect(relay.target) as client:
        H = client.session(session_id).hessian()
        compute_s, calls_s, products = 0.0, 0.0, 0

        def matvec(v: np.ndarray) -> np.ndarray:
            nonlocal compute_s, calls_s, products
            start_s = time.monotonic()
            result = H.matvec(v.ravel())
            calls_s += time.monotonic() - start_s
            assert H.last is not None
            compute_s += H.last.compute_s
            products += 1
            return result

        v0 = np.random.default_rng(0).standard_normal(H.shape[0]).astype(H.dtype)
        view = LinearOperator(H.shape, matvec=matvec, dtype=H.dtype)
        H @ v0
        clock = _Clock(relay)
        found = eigsh(
            view, k=K, which="LA", tol=TOLERANCE, v0=v0, return_eigenvectors=vectors
        )
        lap = clock.lap(products, np.sort(found[0] if vectors else found)[::-1])
        return replace(lap, compute_s=compute_s, algebra_s=lap.wall_s - calls_s)


class _Clock:
    def __init__(self, relay: Relay) -> None:
        self._relay, self._bytes = relay, relay.bytes
        self._wall_s, self._cpu_s = time.monotonic(), time.process_time()

    def lap(self, products: int, values: np.ndarray) -> Lap:
        return Lap(
            wall_s=time.monotonic() - self._wall_s,
            cpu_s=time.process_time() - self._cpu_s,
            products=products,
            wire_bytes=self._relay.bytes - self._bytes,
            compute_s=0.0,
            algebra_s=0.0,
            values=values,
        )


def race(layers: int, sequences: list[int], native_s: float) -> list[str]:
    """Run both on both links, print, and name what missed its target."""
    missed = []
    for count in sequences:
        with gpt_session(GPT | {"layers": layers}, count, native_s) as (target, name):
            for link in LINKS:
                # Vectors as well for the case that the targets are about.
                for vectors in (False, True) if count == sequences[0] else (False,):
                    aim = link.factor if count == sequences[0] and not vectors else None
                    missed += contest(target, name, link, vectors, aim)
    return missed


def contest(
    target: str, session_id: str, link: Link, vectors: bool, aim: float | None
) -> list[str]:
    """Race on one link, print, and name what missed its target."""
    what = f"{link.name}, {'vectors' if vectors else 'values'}"
    relay = Relay(target, delay_s=link.delay_s, bytes_per_s=link.bytes_per_s)
    mine = ours(relay, session_id, vectors)
    print(f"{what:21} Eigsh  {mine}", flush=True)
    peer = theirs(relay, session_id, vectors)
    print(f"{what:21} SciPy  {peer}", flush=True)
    relay.close()
    gap = np.abs(mine.values - peer.values).max() / peer.values[0]
    ratio = peer.wall_s / mine.wall_s
    wanted = "" if aim is None else f" (wanted {aim:g}x)"
    print(
        f"{what:21} {ratio:.1f}x{wanted}; {peer.wall_s / mine.compute_s:.1f}x with our "
        f"products alone, {peer.rest_s / mine.rest_s:.1f}x without any; "
        f"{break_even(mine, peer, link.factor)}; eigenvalues agree to {gap:.0e}",
        flush=True,
    )
    slow = aim is not None and ratio < aim
    return [
        *([f"wall time, {what}: {ratio:.1f}x, wanted {aim:g}x"] if slow else []),
        *([f"eigenvalues, {what}: differ by {gap:.0e}"] if gap > TOLERANCE else []),
    ]


def break_even(mine: Lap, peer: Lap, factor: float) -> str:
    """Say at which time of a product ours would be so many times faster.

    With r seconds beside n products of t seconds each, ``R + N t = f (r + n t)`` at
    ``t = (R - f r) / (f n - N)``.
    """
    room_s = peer.rest_s - factor * mine.rest_s
    more = factor * mine.products - peer.products
    if more <= 0:
        return f"{factor:g}x " + (
            "at any product" if room_s >= 0 else "at long products"
        )
    if room_s <= 0:
        return (
            f"{factor:g}x at no product: {mine.rest_s:.1f} s beside ours are too much"
        )
    return f"{factor:g}x up to {room_s / more * 1e3:.0f} ms per product"
