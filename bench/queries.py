"""Queries against SciPy, curvlinops and hessian-eigenthings.

    python bench/queries.py [--check] [--wall] [--layers N] [--sequences N ...]

Products: the same float64 operator for every contestant, and the same accuracy: the
residual of each eigenpair, the relative residual of a system, or, for estimators, the
root mean square error over seeds at equal products. A peer that lets its user guess the
number of Lanczos steps is granted the best guess. `--wall` adds the wall time of
Eigsh(k=10) on a gpt (see query_wall.py). With --check the exit status is 1 if a target
is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import log, sqrt

import curvlinops
import numpy as np
import torch
from curvlinops._torch_base import PyTorchLinearOperator
from hessian_eigenthings import algorithms as eigenthings
from hessian_eigenthings.operators.base import LambdaOperator
from query_wall import race
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from curvd.types import Estimator, Which
from curvd_server import builders
from curvd_server.queries.base import Products, drain
from curvd_server.queries.density import spectral_density
from curvd_server.queries.diagonal import diagonal
from curvd_server.queries.eigsh import eigsh as our_eigsh
from curvd_server.queries.norm import frobenius_norm
from curvd_server.queries.sampling import Target
from curvd_server.queries.solve import solve
from curvd_server.queries.trace import trace

PROBES, SEEDS = 60, 300


@dataclass(frozen=True)
class Row:
    """A comparison; less is better."""

    what: str
    ours: float
    peer: float
    noise: float = 0.0
    """Standard error of the logarithm of ours over the peer's."""

    @property
    def good(self) -> bool:
        """Whether ours is no more, as far as the noise can tell."""
        return self.ours <= self.peer * np.exp(2 * self.noise)

    def __str__(self) -> str:
        noise = f" +- {self.noise:4.0%}" if self.noise else " " * 8
        verdict = "ok" if self.good else "MISSED"
        return f"{self.what:58} {self.ours:9.4g} {self.peer:9.4g}{noise}  {verdict}"


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

    def to_eigenthings(self) -> LambdaOperator:
        def multiply(v: Tensor) -> Tensor:
            self.columns += 1
            return self.A @ v

        return LambdaOperator(multiply, len(self.A), dtype=self.A.dtype)

    def to_scipy(self) -> LinearOperator:
        return LinearOperator(self.A.shape, matvec=self.to_vector, dtype=np.float64)

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


def flat() -> Tensor:
    """A dense matrix with a flat spectrum: a hard end for every Krylov method."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(400, 400, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(normal)[0]
    return (basis * torch.linspace(-1, 1, 400, dtype=torch.float64)) @ basis.T


def eigenpairs(name: str, A: Tensor) -> list[Row]:
    """Products of three seeds, each with the same start vector for all."""
    rows = []
    for k, which, letters in (
        (1, Which.LARGEST, "LA"),
        (10, Which.LARGEST, "LA"),
        (10, Which.LARGEST_MAGNITUDE, "LM"),
        (5, Which.SMALLEST, "SA"),
    ):
        for tolerance in (1e-3, 1e-6):
            counts = sum(
                eigenpair_products(A, k, which, letters, tolerance, seed)
                for seed in range(3)
            )
            for peer, (ours, theirs) in zip(PEERS, counts / 3, strict=True):
                case = f"{name}, eigsh k={k} {letters} {tolerance:.0e}"
                rows.append(Row(f"{case} / {peer}", ours, theirs))
    return rows


PEERS = ("SciPy, its basis", "SciPy, our basis", "eigenthings")


def eigenpair_products(
    A: Tensor, k: int, which: Which, letters: str, tolerance: float, seed: int
) -> np.ndarray:
    """Products of ours and of each peer: [3, 2]; all start from one vector."""
    operator = Counted(A)
    # The start of hessian-eigenthings, which takes a seed only.
    generator = torch.Generator().manual_seed(seed)
    v0 = torch.randn(len(A), generator=generator, dtype=A.dtype)

    def ours(basis: int | None) -> int:
        query = our_eigsh(
            operator.products(),
            k,
            which=which,
            tolerance=tolerance,
            basis=basis,
            start=v0[None],
        )
        return operator.count(lambda: drain(query))

    scipy = operator.count(
        lambda: eigsh(
            operator.to_scipy(), k=k, which=letters, tol=tolerance, v0=v0.numpy()
        )
    )
    guess = steps_of_eigenthings(operator, k, letters, tolerance, seed)
    return np.array([
        [ours(max(2 * k + 1, 20)), scipy],
        [ours(None), scipy],
        [ours(guess), guess],
    ])


def steps_of_eigenthings(
    operator: Counted, k: int, which: str, tolerance: float, seed: int
) -> int:
    """Find the fewest steps after which all its residuals are small enough."""
    # Beyond 50 steps it does not reorthogonalise by itself, and finds copies.
    view = operator.to_eigenthings()

    def enough(steps: int) -> bool:
        found = eigenthings.lanczos(
            view,
            k=k,
            max_iter=steps,
            tol=tolerance,
            which=which,
            seed=seed,
            reorthogonalize=True,
        )
        return bool(found.converged.all())

    low, high = k, len(operator.A)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def systems(A: Tensor) -> list[Row]:
    """Products of CG for the same relative residual."""
    rows = []
    P = len(A)
    b = torch.ones(1, P, dtype=torch.float64)
    for damping in (1e-1, 1e-3):
        square = Counted(A @ A + damping * torch.eye(P, dtype=torch.float64))
        query = solve(square.products(), b, tolerance=1e-6)
        mine = square.count(lambda q=query: drain(q))
        inverse = curvlinops.CGInverseLinearOperator(square, tolerance=1e-6, eps=1e-40)
        peer = square.count(lambda i=inverse: i @ b[0])
        rows.append(Row(f"CG to 1e-6, damping {damping:.0e} / curvlinops", mine, peer))
    return rows


def estimators(A: Tensor) -> list[Row]:
    """Root mean square errors at equal products."""
    operator, target = Counted(A), Target(samples=PROBES)
    view = operator.to_eigenthings()
    exact, elements = float(A.trace()), A.diagonal()

    def ours(estimator: Estimator) -> Callable[[int], float]:
        return lambda seed: (
            drain(
                trace(
                    operator.products(), estimator=estimator, target=target, seed=seed
                )
            ).value
            - exact
        )

    def eigenthing(method: str) -> Callable[[int], float]:
        return lambda seed: (
            eigenthings.trace(
                view, num_matvecs=PROBES, method=method, seed=seed
            ).estimate
            - exact
        )

    def linop(function: Callable[..., Tensor], truth: Tensor) -> Callable[[int], float]:
        return lambda seed: float((function(operator, PROBES) - truth).norm())

    def our_diagonal(estimator: Estimator) -> Callable[[int], float]:
        return lambda seed: float(
            (
                drain(
                    diagonal(
                        operator.products(),
                        estimator=estimator,
                        target=target,
                        seed=seed,
                    )
                ).values
                - elements
            ).norm()
        )

    def our_norm(seed: int) -> float:
        found = drain(frobenius_norm(operator.products(), target=target, seed=seed))
        return found.value**2 - float((A**2).sum())

    total, square = torch.tensor(exact), (A**2).sum()
    hutch, hutchpp, exchangeable = (
        ours(e)
        for e in (Estimator.HUTCHINSON, Estimator.HUTCHPP, Estimator.EXCHANGEABLE)
    )
    contests = (
        (
            "trace, Hutchinson / curvlinops",
            hutch,
            linop(curvlinops.hutchinson_trace, total),
        ),
        ("trace, Hutchinson / eigenthings", hutch, eigenthing("hutchinson")),
        (
            "trace, Hutch++ / curvlinops",
            hutchpp,
            linop(curvlinops.hutchpp_trace, total),
        ),
        ("trace, Hutch++ / eigenthings", hutchpp, eigenthing("hutch++")),
        ("trace, XTrace / curvlinops", exchangeable, linop(curvlinops.xtrace, total)),
        (
            "diagonal, Hutchinson / curvlinops",
            our_diagonal(Estimator.HUTCHINSON),
            linop(curvlinops.hutchinson_diag, elements),
        ),
        (
            "diagonal, XDiag / curvlinops",
            our_diagonal(Estimator.EXCHANGEABLE),
            linop(curvlinops.xdiag, elements),
        ),
        (
            "|A|^2, Hutchinson / curvlinops",
            our_norm,
            linop(curvlinops.hutchinson_squared_fro, square),
        ),
    )
    return [compare(f"error of {what}", a, b) for what, a, b in contests]


def densities(A: Tensor) -> list[Row]:
    """Errors of smoothed spectral densities, all with the peer's width and products."""
    operator, repeats, steps = Counted(A), 4, 32
    values = torch.linalg.eigvalsh(A).numpy()
    low, high = values[0], values[-1]
    axis = np.linspace(low - 0.2 * (high - low), high + 0.2 * (high - low), 2000)

    def error(grid: np.ndarray, density: np.ndarray, width: float) -> float:
        """L1 distance from the exact spectrum, smoothed alike."""
        exact = np.exp(-0.5 * ((axis[:, None] - values) / width) ** 2).mean(1)
        exact /= width * sqrt(2 * np.pi)
        found = np.interp(axis, grid, density, left=0.0, right=0.0)
        return float(np.trapezoid(np.abs(found - exact), axis))

    def ours(width: float) -> Callable[[int], float]:
        def once(seed: int) -> float:
            found = drain(
                spectral_density(
                    operator.products(),
                    samples=repeats,
                    steps=steps,
                    width=width,
                    points=2000,
                    seed=seed,
                    block=repeats,
                )
            )
            return error(found.grid, found.density, width)

        return once

    # Its width is fixed: 1 / kappa of the height at the distance of two nodes.
    margin = 0.05
    normalised = 2 / (steps - 1) / sqrt(8 * log(3.0))
    linop_width = normalised * (high - low) * (1 + 2 * margin) / 2
    thing_width = (high - low) / steps

    def linop(seed: int) -> float:
        grid, density = curvlinops.lanczos_approximate_spectrum(
            operator,
            steps,
            num_points=2000,
            num_repeats=repeats,
            boundaries=(low, high),
            margin=margin,
        )
        return error(grid.numpy(), density.numpy(), linop_width)

    def eigenthing(seed: int) -> float:
        found = eigenthings.spectral_density(
            operator.to_eigenthings(),
            num_runs=repeats,
            lanczos_steps=steps,
            num_grid_points=2000,
            sigma=thing_width,
            grid_padding=0.2,
            seed=1000 * seed,
        )
        return error(found.grid.numpy(), found.density.numpy(), thing_width)

    return [
        compare("error of density / curvlinops", ours(linop_width), linop, 100),
        compare("error of density / eigenthings", ours(thing_width), eigenthing, 100),
    ]


def compare(
    what: str,
    ours: Callable[[int], float],
    peer: Callable[[int], float],
    seeds: int = SEEDS,
) -> Row:
    """Root mean square errors over seeds, and the noise of their ratio."""
    squares = []
    for contestant in (ours, peer):
        errors = []
        for seed in range(seeds):
            torch.manual_seed(seed)  # for peers without a seed of their own
            errors.append(contestant(seed))
        squares.append(np.square(errors))
    means = [float(s.mean()) for s in squares]
    # Of the logarithm of each mean square; half of it for its root.
    spreads = [
        s.std(ddof=1) / sqrt(seeds) / m for s, m in zip(squares, means, strict=True)
    ]
    return Row(what, sqrt(means[0]), sqrt(means[1]), float(np.hypot(*spreads)) / 2)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--wall", action="store_true", help="race on a gpt, too")
    parser.add_argument("--layers", type=int, default=8, help="of the gpt")
    parser.add_argument(
        "--sequences",
        type=int,
        nargs="+",
        default=[1, 2],
        help="of the gpt's mini-batch; the first row has the targets",
    )
    parser.add_argument(
        "--native-s", type=float, default=300.0, help="wait so long for native code"
    )
    options = parser.parse_args()
    missed = []
    curvature = hessian()
    print(f"{'':58} {'ours':>9} {'peer':>9}")
    for stage in (
        lambda: eigenpairs("Hessian", curvature),
        lambda: eigenpairs("flat", flat()),
        lambda: systems(curvature),
        lambda: estimators(curvature),
        lambda: densities(curvature),
    ):
        for row in stage():
            print(row, flush=True)
            missed += [] if row.good else [row.what]
    if options.wall:
        missed += race(options.layers, options.sequences, options.native_s)
    print(f"{len(missed)} missed" + "".join(f"\n  {what}" for what in missed))
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
