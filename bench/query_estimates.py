"""Errors of estimators beside curvlinops and hessian-eigenthings, at equal products.

Part of bench/queries.py: root mean square errors over seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log, sqrt

import curvlinops
import numpy as np
import torch
from hessian_eigenthings import algorithms as eigenthings
from query_rows import Counted, Row
from torch import Tensor

from curvd.contract import Estimator
from curvd_server.linalg import (
    Target,
    diagonal,
    frobenius_norm,
    spectral_density,
    trace,
)
from curvd_server.linalg.base import drain

PROBES, SEEDS = 60, 300


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
