"""How often intervals of 95 % hold the truth, on spectra that are hard for estimates.

    python bench/query_intervals.py [--check] [--seeds N]

Low rank, few touched coordinates, zero rows, rank 0 to all, P from 1 to 10,000: traces,
diagonals, norms, log-determinants and densities, with the median of the half widths. A
diagonal counts element by element, a density where it is above a hundredth of its peak.
With --check the exit status is 1 if any share is below 92 %.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvd.contract import Estimator
from curvd_server.linalg import (
    Products,
    Target,
    diagonal,
    frobenius_norm,
    logdet,
    spectral_density,
    trace,
)
from curvd_server.linalg.base import drain

LEAST = 0.92
TWO_SIDED = (Estimator.HUTCHINSON, Estimator.EXCHANGEABLE)


@dataclass(frozen=True)
class Map:
    """``F diag(values) F'``, with F: [P, r] in any basis."""

    factor: Tensor
    values: Tensor

    @property
    def size(self) -> int:
        """P."""
        return len(self.factor)

    def products(self) -> Products:
        """Make the map that estimates see."""
        return Products(
            lambda V: ((V @ self.factor) * self.values) @ self.factor.T,
            size=self.size,
            dtype=torch.float64,
        )

    @property
    def diagonal(self) -> Tensor:
        """The diagonal: [P]."""
        return (self.factor**2 * self.values).sum(1)

    @property
    def norm(self) -> float:
        """The Frobenius norm."""
        gram = self.factor.T @ self.factor
        inner = gram * self.values
        return math.sqrt(max(0.0, float((inner * inner.T).sum())))

    def dense(self) -> Tensor:
        """The matrix: [P, P]."""
        return (self.factor * self.values) @ self.factor.T


def of_matrix(A: np.ndarray) -> Map:
    """Take a symmetric matrix apart."""
    values, vectors = np.linalg.eigh(A)
    return Map(torch.from_numpy(vectors), torch.from_numpy(values))


def in_random_basis(size: int, values: np.ndarray) -> Map:
    """Give some of P eigenvalues, the others being zero, random eigenvectors."""
    normal = RANDOM.standard_normal((size, len(values)))
    return Map(torch.from_numpy(np.linalg.qr(normal)[0]), torch.from_numpy(values))


def touching(size: int, coordinates: int) -> Map:
    """Make a random symmetric map of so many coordinates."""
    A = np.zeros((size, size))
    B = RANDOM.standard_normal((coordinates, coordinates))
    A[:coordinates, :coordinates] = B + B.T
    return of_matrix(A)


def of_least_squares(dead: int) -> Map:
    """Make the Hessian of least squares whose first features are always zero."""
    X = RANDOM.standard_normal((60, 80))
    X[:, :dead] = 0
    X = np.c_[X, np.ones(60)]
    return of_matrix(2 * X.T @ X / 60)


def pair(shift: float) -> Map:
    """Make one large pair off the diagonal."""
    A = shift * np.eye(50)
    A[3, 7] = A[7, 3] = 100.0
    return of_matrix(A)


RANDOM = np.random.default_rng(0)
MAPS = {
    "zero": of_matrix(np.zeros((60, 60))),
    "rank 1 of 60": in_random_basis(60, np.array([3.0])),
    "rank 3 of 81": in_random_basis(81, np.array([3.0, 2, 1])),
    "rank 6 of 200": in_random_basis(200, np.arange(6.0, 0, -1)),
    "rank 30 of 200": in_random_basis(200, np.arange(30.0, 0, -1)),
    "1 coordinate of 81": touching(81, 1),
    "2 coordinates of 81": touching(81, 2),
    "3 coordinates of 81": touching(81, 3),
    "15 coordinates of 81": touching(81, 15),
    "a pair off the diagonal": pair(0.0),
    "the pair and identity": pair(1.0),
    "40 dead features of 80": of_least_squares(40),
    "75 dead features of 80": of_least_squares(75),
    "P = 1": touching(1, 1),
    "P = 2": touching(2, 2),
    "P = 7": touching(7, 7),
    "P = 25": touching(25, 25),
    "decaying": in_random_basis(100, 1 / np.arange(1, 101.0) ** 2),
    "identity": of_matrix(np.eye(40)),
    "dense": touching(100, 100),
    "rank 1 of 10,000": in_random_basis(10_000, np.array([3.0])),
    "rank 20 of 10,000": in_random_basis(10_000, np.arange(20.0, 0, -1)),
}


def numbers(case: Map, seeds: int) -> Iterator[tuple[str, float, float]]:
    """Count for each estimate of a number: its name, the share inside, the half width."""
    total, norm = float(case.values @ (case.factor**2).sum(0)), case.norm
    kinds = [
        (
            f"trace, {estimator}, {samples}",
            total,
            trace,
            {"estimator": estimator},
            samples,
        )
        for estimator in Estimator
        for samples in (40, 100)
    ]
    kinds += [(f"norm, {n}", norm, frobenius_norm, {}, n) for n in (16, 50)]
    for name, truth, query, options, samples in kinds:
        found = [
            drain(
                query(
                    case.products(), target=Target(samples=samples), seed=s, **options
                )
            )
            for s in range(seeds)
        ]
        yield (
            name,
            float(np.mean([abs(f.value - truth) <= f.half_width for f in found])),
            float(np.median([f.half_width for f in found])),
        )


def diagonals(case: Map, seeds: int) -> Iterator[tuple[str, float, float]]:
    """Count for each estimate of the diagonal."""
    truth = case.diagonal
    for estimator in TWO_SIDED:
        inside, reach = [], []
        for seed in range(seeds):
            target = Target(samples=40)
            found = drain(
                diagonal(case.products(), estimator=estimator, target=target, seed=seed)
            )
            width = found.quantile * found.standard_errors
            inside.append(
                float(((found.values - truth).abs() <= width).double().mean())
            )
            reach.append(float(width.norm()))
        yield (
            f"diagonal, {estimator}, 40",
            float(np.mean(inside)),
            float(np.median(reach)),
        )


def quadratures(case: Map, seeds: int) -> Iterator[tuple[str, float, float]]:
    """Count for the log-determinant of A^2 / |A| + 0.1, and for the density."""
    A = case.dense()
    square = A @ A / max(case.norm, 1.0) + 0.1 * torch.eye(len(A), dtype=A.dtype)
    truth = float(torch.logdet(square))
    products = [
        Products(lambda V, B=B: V @ B, size=len(A), dtype=A.dtype) for B in (square, A)
    ]
    found = [
        drain(logdet(products[0], target=Target(samples=20), seed=s, block=20))
        for s in range(seeds)
    ]
    yield (
        "log-determinant, 20",
        float(np.mean([abs(f.value - truth) <= f.half_width for f in found])),
        float(np.median([f.half_width for f in found])),
    )
    values = torch.linalg.eigvalsh(A).numpy()
    width = 0.1 * (values[-1] - values[0]) or 1.0
    inside, reach = [], []
    for seed in range(seeds):
        density = drain(
            spectral_density(
                products[1], samples=8, steps=30, width=width, seed=seed, block=8
            )
        )
        exact = np.exp(-0.5 * ((density.grid[:, None] - values) / width) ** 2).mean(1)
        exact /= width * math.sqrt(2 * math.pi)
        seen = exact > 1e-2 * exact.max()
        near = np.abs(density.density - exact) <= density.half_width
        inside.append(float(near[seen].mean()))
        reach.append(float(density.half_width[seen].mean()))
    yield "density, 8", float(np.mean(inside)), float(np.median(reach))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--maps", nargs="*", choices=list(MAPS), default=list(MAPS))
    options = parser.parse_args()
    missed = []
    for what in options.maps:
        case, seeds = MAPS[what], options.seeds
        rows = [*numbers(case, seeds), *diagonals(case, seeds)]
        if case.size < 1000:
            rows += quadratures(case, seeds)
        for name, inside, width in rows:
            verdict = "ok" if inside >= LEAST else "MISSED"
            print(
                f"{what:24} {name:28} {inside:7.1%} {width:9.2g}  {verdict}", flush=True
            )
            missed += [] if inside >= LEAST else [f"{what}: {name} {inside:.1%}"]
    print(f"{len(missed)} missed" + "".join(f"\n  {line}" for line in missed))
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
