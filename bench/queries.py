"""Queries against SciPy and curvlinops: products in process, wall time over a wire.

    python bench/queries.py [--check] [--layers N]

Products: the same float64 operator for every contestant, and the same accuracy: the
residual of each eigenpair, the relative residual of a system, or, for estimators, the
root mean square error over seeds at equal products. Wall time: Eigsh(k=10) on a
float32 gpt against SciPy's eigsh over remote MatVec, on loopback and through a relay
that delays by 5 ms each way and passes 1 Gb/s. With --check the exit status is 1 if a
target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import curvlinops
import numpy as np
import torch
from curvlinops._torch_base import PyTorchLinearOperator
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

import curvd
from curvd.types import Estimator, Which
from curvd_server import builders
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig
from curvd_server.queries.base import Products, drain
from curvd_server.queries.diagonal import diagonal
from curvd_server.queries.eigsh import eigsh as our_eigsh
from curvd_server.queries.sampling import Target
from curvd_server.queries.solve import solve
from curvd_server.queries.trace import trace

TOLERANCE = 1e-3
PROBES, SEEDS = 60, 400


class Counted(PyTorchLinearOperator):
    """A dense matrix that counts its columns, for every contestant."""

    SELF_ADJOINT = True
    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, A: Tensor) -> None:
        super().__init__([(len(A),)], [(len(A),)])
        self.A, self.columns = A, 0

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        self.columns += X[0].shape[1]
        return [self.A @ X[0]]

    def to_rows(self, V: Tensor) -> Tensor:
        self.columns += len(V)
        return V @ self.A

    def to_vector(self, v: np.ndarray) -> np.ndarray:
        self.columns += 1
        return self.A.numpy() @ v

    def products(self) -> Products:
        return Products(self.to_rows, size=len(self.A), dtype=self.A.dtype)

    def count(self, work: Callable[[], object]) -> int:
        self.columns = 0
        work()
        return self.columns


def hessian() -> Tensor:
    """A dense Hessian of a small net on random data."""
    torch.manual_seed(0)
    net = builders.BUILDERS["mlp"]({"widths": [12, 16, 5], "activation": "tanh"})
    net = net.double()
    x = torch.randn(64, 12, dtype=torch.float64)
    y = torch.randint(5, (64,))
    names = [n for n, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]

    def loss(theta: Tensor) -> Tensor:
        parts = torch.split(theta, [s.numel() for s in shapes])
        values = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        out = torch.func.functional_call(net, values, (x,))
        return torch.nn.functional.cross_entropy(out, y)

    start = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    return torch.autograd.functional.hessian(loss, start)


def compare_products() -> list[tuple[str, float, float]]:
    """What, ours, theirs; less is better."""
    A = hessian()
    operator, rows = Counted(A), []
    P = len(A)
    scipy_view = LinearOperator((P, P), matvec=operator.to_vector, dtype=np.float64)
    v0 = np.random.default_rng(0).standard_normal(P)
    for k, ours, theirs in (
        (1, Which.LARGEST, "LA"),
        (10, Which.LARGEST, "LA"),
        (10, Which.LARGEST_MAGNITUDE, "LM"),
        (5, Which.SMALLEST, "SA"),
    ):
        for tolerance in (1e-3, 1e-6):
            query = our_eigsh(operator.products(), k, which=ours, tolerance=tolerance)
            mine = operator.count(lambda q=query: drain(q))
            peer = operator.count(
                lambda k=k, w=theirs, t=tolerance: eigsh(
                    scipy_view, k=k, which=w, tol=t, v0=v0
                )
            )
            rows.append((f"products, eigsh k={k} {theirs} {tolerance:.0e}", mine, peer))
    b = torch.ones(1, P, dtype=torch.float64)
    for damping in (1e-1, 1e-3):
        square = Counted(A @ A + damping * torch.eye(P, dtype=torch.float64))
        mine = square.count(
            lambda s=square: drain(solve(s.products(), b, tolerance=1e-6))
        )
        inverse = curvlinops.CGInverseLinearOperator(square, tolerance=1e-6, eps=1e-40)
        peer = square.count(lambda i=inverse: i @ b[0])
        rows.append((f"products, CG to 1e-6, damping {damping:.0e}", mine, peer))
    return rows + compare_estimators(operator, A)


def compare_estimators(operator: Counted, A: Tensor) -> list[tuple[str, float, float]]:
    """Root mean square errors at equal products."""
    rows, exact, target = [], float(A.trace()), Target(samples=PROBES)
    peers = {
        Estimator.HUTCHINSON: curvlinops.hutchinson_trace,
        Estimator.HUTCHPP: curvlinops.hutchpp_trace,
        Estimator.EXCHANGEABLE: curvlinops.xtrace,
    }
    for estimator, peer in peers.items():
        ours, theirs = [], []
        for seed in range(SEEDS):
            query = trace(
                operator.products(), estimator=estimator, target=target, seed=seed
            )
            ours.append(drain(query).value - exact)
            torch.manual_seed(seed)
            theirs.append(
                float(peer(operator, PROBES, distribution="rademacher")) - exact
            )
        rows.append((
            f"error of trace, {estimator}, {PROBES} products",
            rms(ours),
            rms(theirs),
        ))
    ours, theirs = [], []
    for seed in range(SEEDS):
        mine = drain(diagonal(operator.products(), target=target, seed=seed)).values
        torch.manual_seed(seed)
        peer_values = curvlinops.xdiag(operator, PROBES)
        ours.append(float((mine - A.diagonal()).norm()))
        theirs.append(float((peer_values - A.diagonal()).norm()))
    rows.append((
        f"error of diagonal, xdiag, {PROBES} products",
        rms(ours),
        rms(theirs),
    ))
    return rows


def rms(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


class Relay:
    """A TCP relay that delays what it passes, limits its rate and counts its bytes."""

    def __init__(self, target: str, *, delay_s: float, bytes_per_s: float) -> None:
        host, _, port = target.rpartition(":")
        self._address = (host, int(port))
        self._delay_s, self._bytes_per_s = delay_s, bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.bytes = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._address)
                for source, sink in ((near, far), (far, near)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    # Deep enough for the bytes in flight, so that TCP still pushes back.
                    line: queue.Queue[tuple[float, bytes]] = queue.Queue(64)
                    threading.Thread(
                        target=self._read, args=(source, line), daemon=True
                    ).start()
                    threading.Thread(
                        target=self._write, args=(sink, line), daemon=True
                    ).start()

    def _read(
        self, source: socket.socket, line: queue.Queue[tuple[float, bytes]]
    ) -> None:
        free_s = 0.0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                free_s = max(free_s, time.monotonic()) + len(data) / self._bytes_per_s
                self.bytes += len(data)
                line.put((free_s + self._delay_s, data))
        line.put((0.0, b""))

    def _write(
        self, sink: socket.socket, line: queue.Queue[tuple[float, bytes]]
    ) -> None:
        with contextlib.suppress(OSError):
            while True:
                due_s, data = line.get()
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                time.sleep(max(0.0, due_s - time.monotonic()))
                sink.sendall(data)


@contextlib.contextmanager
def gpt_session(layers: int) -> Iterator[tuple[str, str]]:
    """Target of a server, and a warm session on a gpt of about 10 M parameters."""
    config = {
        "vocabulary": 256,
        "context": 64,
        "layers": layers,
        "width": 256,
        "heads": 8,
    }
    torch.manual_seed(0)
    tokens = torch.randint(256, (4, 65))
    with tempfile.TemporaryDirectory() as folder:
        server = ServerConfig(listen="127.0.0.1:0", data_dir=Path(folder))
        with serve_in_thread(server) as target, curvd.connect(target) as client:
            state = builders.BUILDERS["gpt"](config).state_dict()
            model = client.register_model("gpt", config, state)
            dataset = client.register_dataset(
                {"x": tokens[:, :-1], "y": tokens[:, 1:]},
                inputs=["x"],
                target="y",
                batch_size=4,
            )
            with client.create_session(model, dataset, loss="cross_entropy") as session:
                print(f"gpt: {session.layout.size} parameters", flush=True)
                yield target, session.id


def race(relay: Relay, session_id: str) -> tuple[float, float, int, int]:
    """Seconds of ours and of SciPy's, and their bytes on the wire."""
    with curvd.connect(relay.target) as client:
        H = client.session(session_id).hessian()
        H @ np.zeros(H.shape[0], H.dtype)
        before, start = relay.bytes, time.monotonic()
        found = H.eigsh(10, tolerance=TOLERANCE)
        ours_s, ours_bytes = time.monotonic() - start, relay.bytes - before
        view = H.to_scipy()
        v0 = np.random.default_rng(0).standard_normal(H.shape[0])
        before, start = relay.bytes, time.monotonic()
        values = eigsh(view, k=10, which="LA", tol=TOLERANCE, v0=v0)[0]
        theirs_s, theirs_bytes = time.monotonic() - start, relay.bytes - before
    gap = np.abs(np.sort(found.values) - np.sort(values)).max() / values.max()
    print(f"  {found.products} products, eigenvalues agree to {gap:.0e}", flush=True)
    return ours_s, theirs_s, ours_bytes, theirs_bytes


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    missed = []
    for what, ours, theirs in compare_products():
        # Errors are themselves estimates, with 5 % noise over the seeds.
        limit = theirs * (1.15 if what.startswith("error") else 1.0)
        good = ours <= limit
        missed += [] if good else [what]
        print(
            f"{what:46} ours {ours:10.4g}  peer {theirs:10.4g}  {'ok' if good else 'MISSED'}"
        )
    with gpt_session(options.layers) as (target, session_id):
        links = {
            "loopback": (Relay(target, delay_s=0.0, bytes_per_s=1e12), 1.3),
            "1 Gb/s, 5 ms": (Relay(target, delay_s=0.005, bytes_per_s=125e6), 10.0),
        }
        for name, (relay, factor) in links.items():
            ours_s, theirs_s, ours_bytes, theirs_bytes = race(relay, session_id)
            relay.close()
            good = theirs_s >= factor * ours_s
            missed += [] if good else [name]
            print(
                f"eigsh k=10, {name:14} ours {ours_s:7.2f} s {ours_bytes / 1e6:9.1f} MB   "
                f"SciPy over MatVec {theirs_s:7.2f} s {theirs_bytes / 1e6:9.1f} MB   "
                f"{theirs_s / ours_s:5.1f}x (>= {factor})  {'ok' if good else 'MISSED'}"
            )
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
