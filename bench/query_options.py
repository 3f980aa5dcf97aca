"""What each option of a query gains where its documentation says that it does.

Part of bench/queries.py: products with the option against products without it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from query_rows import Row
from torch import Tensor

from curvd.contract import Estimator, Solver, Which
from curvd_server.linalg import (
    Products,
    Target,
    diagonal,
    eigsh,
    solve,
    spectral_density,
    trace,
)
from curvd_server.linalg.base import drain

SEEDS = 3


def options(hessian: Tensor, flat: Tensor) -> list[Row]:
    """Compare every option with its absence."""
    return [
        *starts(hessian),
        bases(flat),
        *systems(hessian),
        indefinite(hessian),
        *estimators(hessian),
        diagonals(hessian),
        quadratures(hessian),
    ]


def starts(A: Tensor) -> list[Row]:
    """Track eigenpairs of a Hessian that has moved by 1e-3 of its norm."""
    moved = A + 1e-3 * drift(A)
    rows = []
    for k, tolerance in ((1, 1e-3), (5, 1e-3), (10, 1e-3)):

        def ask(
            seed: int, start: Tensor | None = None, k=k, tolerance=tolerance
        ) -> int:
            query = eigsh(
                products(moved), k, tolerance=tolerance, start=start, seed=seed
            )
            return drain(query).products

        def warm(seed: int, k=k, tolerance=tolerance, ask=ask) -> int:
            old = drain(eigsh(products(A), k, tolerance=tolerance, seed=seed)).vectors
            return ask(seed, old)

        rows.append(row(f"start=, k={k} {tolerance:.0e}", warm, ask))
    return rows


def bases(A: Tensor) -> Row:
    """Give a flat spectrum a larger basis."""

    def ask(seed: int, basis: int) -> int:
        query = eigsh(
            products(A), 10, which=Which.LARGEST, basis=basis, tolerance=1e-6, seed=seed
        )
        return drain(query).products

    return row(
        "basis_size=120 over 21, flat", lambda s: ask(s, 120), lambda s: ask(s, 21)
    )


def systems(A: Tensor) -> list[Row]:
    """Begin near the solution; and scale what is badly scaled."""
    square = A @ A
    moved = square + 1e-4 * drift(square)

    def ask(A: Tensor, seed: int, **given: Tensor | None) -> int:
        b = normal(seed, 1, len(A))
        query = solve(products(A), b, damping=1e-3, tolerance=1e-6, **given)
        return drain(query).products

    def near(seed: int) -> int:
        b = normal(seed, 1, len(A))
        before = drain(solve(products(square), b, damping=1e-3, tolerance=1e-6))
        return ask(moved, seed, start=before.solution)

    # Least squares with features of which each has a unit of its own.
    X = normal(7, 200, 60) * torch.logspace(-2, 1, 60, dtype=torch.float64)
    scaled = X.T @ X / 200
    diagonal = scaled.diagonal() + 1e-3
    return [
        row("x0=, system moved by 1e-4", near, lambda s: ask(moved, s)),
        row(
            "preconditioner=, features in units of their own",
            lambda s: ask(scaled, s, preconditioner=diagonal),
            lambda s: ask(scaled, s),
        ),
    ]


def indefinite(A: Tensor) -> Row:
    """Solve an indefinite system, or what CG can solve in its place: A^2 x = A b."""
    shifted = A + 0.01 * torch.eye(len(A), dtype=A.dtype)

    def minres(seed: int) -> int:
        b = normal(seed, 1, len(A))
        query = solve(products(shifted), b, solver=Solver.MINRES, tolerance=1e-3)
        return drain(query).products

    def squared(seed: int) -> int:
        # Two products a step. Its residual is A times that of the system, so that small
        # eigenvalues are asked for less.
        b = normal(seed, 1, len(A)) @ shifted
        query = solve(products(shifted @ shifted), b, tolerance=1e-3)
        return 2 * drain(query).products

    return row("solver=minres over CG on the square, indefinite", minres, squared)


def estimators(A: Tensor) -> list[Row]:
    """Find the trace of a decaying spectrum to a relative error of 1 %."""
    square = A @ A @ A @ A

    def ask(seed: int, estimator: Estimator) -> int:
        target = Target(relative=0.01, samples=20_000)
        query = trace(products(square), estimator=estimator, target=target, seed=seed)
        return drain(query).products

    exact = float(square.trace())

    def error(estimator: Estimator) -> float:
        found = [
            drain(
                trace(
                    products(square),
                    estimator=estimator,
                    target=Target(samples=120),
                    seed=seed,
                )
            ).value
            for seed in range(20)
        ]
        return float(np.sqrt(np.mean((np.array(found) / exact - 1) ** 2)))

    return [
        row(
            "estimator=exchangeable over hutchinson, decaying",
            lambda s: ask(s, Estimator.EXCHANGEABLE),
            lambda s: ask(s, Estimator.HUTCHINSON),
        ),
        # Hutch++ divides its samples in advance: it gains where their number is given.
        Row(
            "error at 120 products, hutch++ over hutchinson, decaying",
            error(Estimator.HUTCHPP),
            error(Estimator.HUTCHINSON),
        ),
    ]


def diagonals(A: Tensor) -> Row:
    """Find the diagonal of a decaying spectrum to 5 % of its norm."""
    square = A @ A @ A @ A

    def ask(seed: int, estimator: Estimator) -> int:
        target = Target(relative=0.05, samples=20_000)
        query = diagonal(
            products(square), estimator=estimator, target=target, seed=seed
        )
        return drain(query).products

    return row(
        "diagonal, exchangeable over hutchinson, decaying",
        lambda s: ask(s, Estimator.EXCHANGEABLE),
        lambda s: ask(s, Estimator.HUTCHINSON),
    )


def quadratures(A: Tensor) -> Row:
    """Compare densities at 512 products: many steps of few probes, or few of many."""
    exact = torch.linalg.eigvalsh(A).numpy()
    width = 0.01 * float(exact[-1] - exact[0])

    def distance(seed: int, steps: int) -> float:
        found = drain(
            spectral_density(
                products(A), samples=512 // steps, steps=steps, width=width, seed=seed
            )
        )
        far = (found.grid[:, None] - exact) / width
        true = np.exp(-0.5 * far**2).mean(1) / (width * np.sqrt(2 * np.pi))
        step = found.grid[1] - found.grid[0]
        return float(np.abs(found.density - true).sum() * step)

    means = [np.mean([distance(s, n) for s in range(SEEDS)]) for n in (64, 8)]
    return Row("L1 distance of densities, steps=64 over 8", *map(float, means))


def row(what: str, with_: Callable[[int], int], without: Callable[[int], int]) -> Row:
    """Compare means over seeds."""
    means = [sum(map(ask, range(SEEDS))) / SEEDS for ask in (with_, without)]
    return Row(f"products, {what}", *means)


def products(A: Tensor) -> Products:
    """Make a map of a matrix."""
    return Products(lambda V: V @ A, size=len(A), dtype=A.dtype, limit=20_000)


def drift(A: Tensor) -> Tensor:
    """Make a random symmetric matrix of the same norm."""
    noise = normal(1, *A.shape)
    noise = noise + noise.T
    return noise * (torch.linalg.matrix_norm(A, 2) / torch.linalg.matrix_norm(noise, 2))


def normal(seed: int, *shape: int) -> Tensor:
    """Make normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
