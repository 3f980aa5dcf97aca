"""Queries against SciPy, curvlinops and hessian-eigenthings.

    python bench/queries.py [--check] [--wall] [--layers N] [--sequences N ...]

Products: the same float64 operator for every contestant, and the same accuracy: the
residual of each eigenpair, the relative residual of a system, or, for estimators, the
root mean square error over seeds at equal products (see query_estimates.py). What the
search for copies of eigenvalues adds, and what options gain (see query_options.py), is
compared with our own products without them. A peer that
lets its user guess the number of Lanczos steps is granted the best guess. `--wall` adds
the wall time of Eigsh(k=10) on a gpt (see query_wall.py). With --check the exit status is
1 if a target is missed.
"""

from __future__ import annotations

import argparse
import sys

import curvlinops
import numpy as np
import torch
from hessian_eigenthings import algorithms as eigenthings
from query_estimates import densities, estimators
from query_options import options
from query_rows import Counted, Row
from query_wall import race
from scipy.sparse.linalg import eigsh
from torch import Tensor

from curvd.contract import Which
from curvd_server.linalg import eigsh as our_eigsh
from curvd_server.linalg import solve
from curvd_server.linalg.base import drain
from curvd_server.models import builders


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


def searches(name: str, A: Tensor) -> list[Row]:
    """What the search for copies adds to products, on a simple spectrum: 15 % at most."""
    rows = []
    for k, which in (
        (1, Which.LARGEST),
        (10, Which.LARGEST),
        (10, Which.LARGEST_MAGNITUDE),
        (5, Which.SMALLEST),
    ):
        for tolerance in (1e-3, 1e-6):
            counts = [
                sum(
                    drain(
                        our_eigsh(
                            Counted(A).products(),
                            k,
                            which=which,
                            tolerance=tolerance,
                            seed=seed,
                            copies=copies,
                        )
                    ).products
                    for seed in range(3)
                )
                / 3
                for copies in (True, False)
            ]
            case = f"{name}, eigsh k={k} {which} {tolerance:.0e}"
            rows.append(Row(f"{case} / 1.15 x no search", counts[0], 1.15 * counts[1]))
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
            copies=False,  # no peer looks for them
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
    given = parser.parse_args()
    missed = []
    curvature = hessian()
    print(f"{'':58} {'ours':>9} {'peer':>9}")
    for stage in (
        lambda: eigenpairs("Hessian", curvature),
        lambda: eigenpairs("flat", flat()),
        lambda: searches("Hessian", curvature),
        lambda: searches("flat", flat()),
        lambda: options(curvature, flat()),
        lambda: systems(curvature),
        lambda: estimators(curvature),
        lambda: densities(curvature),
    ):
        for row in stage():
            print(row, flush=True)
            missed += [] if row.good else [row.what]
    if given.wall:
        missed += race(given.layers, given.sequences, given.native_s)
    print(f"{len(missed)} missed" + "".join(f"\n  {what}" for what in missed))
    return 1 if given.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
