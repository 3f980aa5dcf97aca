"""Each algorithm in its variants, on one map: its eigenvalues decay, and three are equal."""

import torch

from curvd.contract.enums import Estimator, Solver, Which
from curvd_server.linalg import ALGORITHMS, LowRank, Products, Target
from curvd_server.linalg.base import drain

P = 101


def symmetric(dtype=torch.float64):
    """Its eigenvalues decay."""
    Q = torch.linalg.qr(normal(P, P, seed=1))[0]
    values = torch.logspace(0, -4, P, dtype=torch.float64)
    values[1:4] = values[1]  # three of them equal
    A = (Q * values) @ Q.T
    return ((A + A.T) / 2).to(dtype)


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


A = symmetric()
B = normal(3, P, seed=2)
KNOWN = LowRank(
    torch.linalg.eigh(A)[1][:, -5:].T.flip(0).contiguous(),
    torch.linalg.eigvalsh(A)[-5:].flip(0).numpy(),
)
WEIGHTS = 1 + normal(2, P, seed=7).square()
LOOSE = Target(relative=0.2, samples=24)
QUERIES = {
    "eigsh": ("eigsh", {"k": 6, "tolerance": 1e-8}),
    "eigsh by magnitude, restarted": (
        "eigsh",
        {"k": 5, "which": Which.LARGEST_MAGNITUDE, "basis": 12, "tolerance": 1e-5},
    ),
    "eigsh from vectors": ("eigsh", {"k": 2, "start": normal(3, P, seed=5)}),
    "cg, together": ("solve", {"B": B, "tolerance": 1e-7, "damping": 1e-2}),
    "cg, alone": ("solve", {"B": B, "tolerance": 1e-7, "damping": 1e-2, "block": 1}),
    "minres": (
        "solve",
        {"B": B, "tolerance": 1e-7, "solver": Solver.MINRES, "damping": 1e-2},
    ),
    "cg from a guess, by a diagonal": (
        "solve",
        {
            "B": B,
            "tolerance": 1e-7,
            "damping": 1e-2,
            "start": normal(3, P, seed=6),
            "preconditioner": A.diagonal() + 1e-2,
        },
    ),
    "cg by eigenvectors": (
        "solve",
        {"B": B, "tolerance": 1e-7, "damping": 1e-2, "preconditioner": KNOWN},
    ),
    "several dampings": ("solve_dampings", {"B": B, "dampings": (1e-2, 1e-1)}),
    "sketch": ("nystrom", {"rank": 40, "damping": 1e-3}),
    "trace": ("trace", {"target": LOOSE}),
    "trace by hutch++": ("trace", {"target": LOOSE, "estimator": Estimator.HUTCHPP}),
    "trace by hutchinson": (
        "trace",
        {"target": LOOSE, "estimator": Estimator.HUTCHINSON},
    ),
    "diagonal": ("diagonal", {"target": LOOSE}),
    "diagonal by hutchinson": (
        "diagonal",
        {"target": LOOSE, "estimator": Estimator.HUTCHINSON},
    ),
    "density": ("spectral_density", {"samples": 3, "steps": 20, "block": 2}),
    "log-determinant": (
        "logdet",
        {"target": LOOSE, "steps": 12, "damping": 0.1, "known": KNOWN, "block": 3},
    ),
    "norm": ("frobenius_norm", {"target": LOOSE}),
    "determinants": (
        "shifted_determinants",
        {"dampings": (0.1, 1.0), "samples": 4, "steps": 9, "seed": 0, "block": 2},
    ),
    "determinants of a small map": (
        "shifted_determinants",
        {"dampings": (0.1, 1.0), "samples": 64, "steps": 9, "seed": 0, "block": 64},
    ),
    "determinants of weights": (
        "weighted_determinants",
        {
            "weights": WEIGHTS,
            "damping": 0.1,
            "samples": 4,
            "steps": 9,
            "seed": 0,
            "block": 2,
        },
    ),
    "determinants of weights of a small map": (
        "weighted_determinants",
        {
            "weights": WEIGHTS,
            "damping": 0.1,
            "samples": 64,
            "steps": 9,
            "seed": 0,
            "block": 64,
        },
    ),
    "trace of a small map": ("trace", {"target": Target(samples=2000)}),
    "diagonal of a small map": ("diagonal", {"target": Target(samples=2000)}),
}
SMALL = 12
"""P of maps that are multiplied as a whole, unless they say otherwise."""


def size_of(name):
    return SMALL if name in {"trace of a small map", "diagonal of a small map"} else P


def map_of(matrix, runner=None, **options):
    return Products(
        lambda V: V @ matrix,
        size=len(matrix),
        dtype=matrix.dtype,
        runner=runner,
        **options,
    )


def ask(name, runner=None, **options):
    """What a query finds, and what it took."""
    algorithm, arguments = QUERIES[name]
    size = size_of(name)
    products = map_of(A[:size, :size], runner, **options)
    found = drain(products.begin(ALGORITHMS[algorithm], **arguments))
    return found, products.done
