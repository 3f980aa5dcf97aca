"""Eigenpairs with multiplicities against dense algebra: no wrong answer has converged.

    python bench/query_spectra.py [--check] [--seeds N] [--dtype float32] [--only NAME]

Matrices with planted multiplicities, clusters and null spaces in a random basis, and
Gauss-Newton matrices of small nets at random parameters; every end of the spectrum, with
bases, tolerances and numbers of pairs in turn. With --check the exit status is 1 if an
answer was wrong and said that it had converged.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from curvd.contract import Stop, Which
from curvd_server.linalg import EigshResult, Products, eigsh
from curvd_server.linalg.base import drain
from curvd_server.linalg.ritz import select

P, LIMIT = 120, 600
WAYS = ((None, 1e-6), (20, 1e-3), (40, 1e-6))
"""Bases and tolerances."""
SPECTRA = {
    "simple": np.linspace(-1, 1, P),
    "triples": np.repeat(1 / np.arange(1, P // 3 + 1.0), 3),
    "copies of the last but one": np.r_[
        np.linspace(-1, 1, P - 7), 2, 1.9, 1.8, 1.15, 1.15, 1.15, 1.12
    ],
    "a pair near the bulk": np.r_[
        np.linspace(-1, 1, P - 6), 2, 1.9, 1.8, 1.7, 1.1, 1.1
    ],
    "both ends": np.r_[
        np.linspace(-0.5, 0.5, P - 8), [1, 1, -1, -1, 0.8, 0.8, -0.8, -0.8]
    ],
    "clusters": np.r_[
        np.linspace(-1, 1, P - 6), 1.5 + 1e-8 * np.arange(3), 1.2 + 1e-4 * np.arange(3)
    ],
    "null space": np.r_[1 / np.arange(1, 31.0) ** 2, np.zeros(P - 30)],
    "null space and triples": np.r_[
        np.repeat(np.logspace(0, -4, 20), 3), np.zeros(P - 60)
    ],
    "identity": np.ones(P),
    "zero": np.zeros(P),
}


def planted(values: np.ndarray) -> Callable[[int], Tensor]:
    """Make a family of matrices with these eigenvalues, one for each seed."""

    def of(seed: int) -> Tensor:
        normal = np.random.default_rng(seed).standard_normal((len(values),) * 2)
        basis = torch.from_numpy(np.linalg.qr(normal)[0])
        return (basis * torch.from_numpy(values)) @ basis.T

    return of


def ggn(net: Callable[[], nn.Module], outputs: int, points: int, cross: bool):
    """Make a family of dense Gauss-Newton matrices, one for each seed."""

    def of(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = net().double()
        x = torch.randn(points, 5, dtype=torch.float64)
        state = dict(model.named_parameters())
        rows = torch.func.jacrev(lambda s: torch.func.functional_call(model, s, (x,)))({
            n: p.detach() for n, p in state.items()
        })
        J = torch.cat([r.reshape(points, outputs, -1) for r in rows.values()], dim=-1)
        if cross:
            prob = model(x).detach().softmax(-1)
            metric = torch.diag_embed(prob) - prob[:, :, None] * prob[:, None]
        else:
            metric = (
                2 / outputs * torch.eye(outputs, dtype=J.dtype).expand(points, -1, -1)
            )
        return torch.einsum("nop,noq,nqr->pr", J, metric, J) / points

    return of


FAMILIES = {name: planted(values) for name, values in SPECTRA.items()} | {
    "GGN of a linear map, mse": ggn(lambda: nn.Linear(5, 12), 12, 40, cross=False),
    "GGN of an mlp, few points": ggn(
        lambda: nn.Sequential(nn.Linear(5, 10), nn.Tanh(), nn.Linear(10, 4)),
        4,
        8,
        cross=True,
    ),
    "GGN of a relu net": ggn(
        lambda: nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)),
        3,
        50,
        cross=True,
    ),
}


def is_right(
    found: EigshResult, A: Tensor, k: int, which: Which, tolerance: float
) -> bool:
    """Compare values with the dense ones, and the pairs with what they say of themselves."""
    exact = np.linalg.eigvalsh(A.double().numpy())
    wanted = np.sort(exact[select(exact, k, which)])[::-1]
    got = np.array(found.values)
    if which is Which.LARGEST_MAGNITUDE:  # of equal ones the sign is free
        got, wanted = -np.sort(-np.abs(got)), -np.sort(-np.abs(wanted))
    scale = max(np.abs(exact).max(), 1e-300)
    eps = torch.finfo(A.dtype).eps
    X, values = found.vectors.double(), torch.tensor(found.values, dtype=torch.float64)
    rest = X @ A.double() - values[:, None] * X
    residuals = torch.linalg.vector_norm(rest, dim=1).numpy()
    floor = max(1e-9, 16 * eps) * scale
    return (
        np.allclose(got, wanted, rtol=2 * tolerance, atol=floor)
        and np.allclose(X @ X.T, np.eye(k), atol=max(1e-10, 40 * eps))
        # Recomputed residuals round differently, by 1e-14 of the scale in float64.
        and np.allclose(
            residuals, found.residuals, rtol=1e-2, atol=max(1e-12, 40 * eps) * scale
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--only", nargs="*", choices=list(FAMILIES), default=FAMILIES)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print(
        f"{'':32} {'end':18} {'right':>6} {'wrong':>6} {'not converged':>14} {'products':>9}"
    )
    wrongs = 0
    for name, which in itertools.product(options.only, Which):
        right = wrong = products = 0
        for seed in range(options.seeds):
            A, (basis, tolerance) = (
                FAMILIES[name](seed).to(dtype),
                WAYS[seed % len(WAYS)],
            )
            k = (2, 4, 6, 10)[seed // len(WAYS) % 4]
            counted = Products(
                lambda V, A=A: V @ A, size=len(A), dtype=A.dtype, limit=LIMIT
            )
            found = drain(
                eigsh(
                    counted, k, which=which, basis=basis, tolerance=tolerance, seed=seed
                )
            )
            products += found.products
            if found.stopped is Stop.CONVERGED:
                good = is_right(found, A, k, which, tolerance)
                right, wrong = right + good, wrong + (not good)
        wrongs += wrong
        rest = options.seeds - right - wrong
        mean = products / options.seeds
        print(
            f"{name:32} {which:18} {right:6} {wrong:6} {rest:14} {mean:9.1f}",
            flush=True,
        )
    print(f"{wrongs} wrong")
    return 1 if options.check and wrongs else 0


if __name__ == "__main__":
    sys.exit(main())
