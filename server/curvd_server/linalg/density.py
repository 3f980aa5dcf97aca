"""Spectral densities by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curvd.contract import Distribution, SpectralDensityOptions, Stop
from curvd_server.linalg.base import Products, Progress, Query
from curvd_server.linalg.definition import Definition, Room
from curvd_server.linalg.intervals import uncertainty
from curvd_server.linalg.lanczos import Quadrature, quadratures


@dataclass(frozen=True, slots=True, kw_only=True)
class DensityResult:
    """A spectral density, and the quadratures it was made from."""

    grid: NDArray[np.float64]
    """[G] Eigenvalues; on a logarithmic grid, magnitudes of eigenvalues."""
    density: NDArray[np.float64]
    """[G] Per eigenvalue, or per decade of magnitude; integrates to one."""
    standard_error: NDArray[np.float64]
    """[G] Over the probes; infinite for a single one."""
    half_width: NDArray[np.float64]
    """[G] Half of the 95 % interval of the smoothed density."""
    nodes: NDArray[np.float64]
    """[S, m] Ritz values of each probe; NaN where a probe needed fewer steps."""
    weights: NDArray[np.float64]
    """[S, m] Their weights, sum one for each probe."""
    width: float
    """Standard deviation of the smoothing Gaussian, in the units of the grid's axis."""
    logarithmic: bool
    probes: int
    products: int
    stopped: Stop


def spectral_density(
    products: Products,
    *,
    samples: int = 8,
    steps: int = 64,
    points: int = 512,
    width: float | None = None,
    logarithmic: bool = False,
    floor: float | None = None,
    seed: int = 0,
    block: int = 1,
) -> Query[DensityResult]:
    """Estimate the density of eigenvalues of a symmetric map.

    Lanczos quadratures from random probes, smoothed by a Gaussian (Lin, Saad & Yang,
    SIAM Review 58, 2016; Papyan, arXiv:1811.07062; logarithmic axis: Papyan, JMLR 21,
    2020).

    Args:
        products: The map.
        samples: Probes, at least 1.
        steps: Lanczos steps per probe, each one product.
        points: G.
        width: The width of the Gaussian; None: 1 % of the axis.
        logarithmic: Whether the axis is ``log10 |λ|`` instead of λ.
        floor: Smallest magnitude on a logarithmic axis; None: 1e-7 of the largest.
        seed: The seed of the probes.
        block: Probes that take each step together; the memory is
            ``block * steps * P``.

    Yields:
        Smallest and largest Ritz value so far.

    Returns:
        The density from the probes that were completed.
    """
    found: list[Quadrature] = []
    stopped = Stop.CONVERGED
    while len(found) < samples:
        indices = range(len(found), min(samples, len(found) + block))
        W = products.space.probes(Distribution.NORMAL, seed, indices)
        more = yield from quadratures(products, W, steps, iteration=products.done)
        if more is None:
            stopped = products.refusal(len(indices)) or Stop.TIME
            break
        found += more
        yield Progress(
            iteration=len(found),
            products=products.done,
            estimates=(
                min(float(q.nodes[0]) for q in found),
                max(float(q.nodes[-1]) for q in found),
            ),
        )
    return smooth(
        found,
        points=points,
        width=width,
        logarithmic=logarithmic,
        floor=floor,
        products=products.done,
        stopped=stopped,
    )


def smooth(
    found: list[Quadrature],
    *,
    points: int,
    width: float | None,
    logarithmic: bool,
    floor: float | None,
    products: int,
    stopped: Stop,
) -> DensityResult:
    """Put quadratures on a grid.

    Args:
        found: One per probe; none gives an empty result.
        points: G.
        width: The width, as for `spectral_density`.
        logarithmic: As for `spectral_density`.
        floor: The floor, as for `spectral_density`.
        products: What they cost.
        stopped: Why there are not more.

    Returns:
        The density.
    """
    if not found:
        empty = np.empty(0)
        return DensityResult(
            grid=empty,
            density=empty,
            standard_error=empty,
            half_width=empty,
            nodes=np.empty((0, 0)),
            weights=np.empty((0, 0)),
            width=width or math.nan,
            logarithmic=logarithmic,
            probes=0,
            products=products,
            stopped=stopped,
        )
    longest = max(len(q.nodes) for q in found)
    nodes = np.full((len(found), longest), np.nan)
    weights = np.zeros((len(found), longest))
    for i, q in enumerate(found):
        nodes[i, : len(q.nodes)], weights[i, : len(q.nodes)] = q.nodes, q.weights
    places = nodes
    if logarithmic:
        lowest = floor or 1e-7 * max(float(np.nanmax(np.abs(nodes))), 1e-300)
        places = np.log10(np.maximum(np.abs(nodes), lowest))
    low, high = float(np.nanmin(places)), float(np.nanmax(places))
    span = (high - low) or max(abs(high), 1.0)
    sigma = width or 0.01 * span
    # Four standard deviations hold all of a Gaussian but 6e-5.
    axis = np.linspace(low - 4 * sigma, high + 4 * sigma, points)
    curves = np.stack([
        _gaussians(axis, p[~np.isnan(p)], w[~np.isnan(p)], sigma)
        for p, w in zip(places, weights, strict=True)
    ])
    error, half_width = uncertainty(curves)
    # Rounding of the quadratures: all that is left where every probe sees the same.
    least = 1e-12 * float(curves.max())
    error, half_width = np.maximum(error, least), np.maximum(half_width, least)
    return DensityResult(
        grid=10.0**axis if logarithmic else axis,
        density=curves.mean(axis=0),
        standard_error=error,
        half_width=half_width,
        nodes=nodes,
        weights=weights,
        width=sigma,
        logarithmic=logarithmic,
        probes=len(found),
        products=products,
        stopped=stopped,
    )


def _gaussians(
    axis: NDArray[np.float64],
    centres: NDArray[np.float64],
    weights: NDArray[np.float64],
    sigma: float,
) -> NDArray[np.float64]:
    scale = sigma * math.sqrt(2 * math.pi)
    with np.errstate(over="ignore"):  # nothing is left at an infinite distance
        distance = (axis[:, None] - centres) / sigma
        heights = np.exp(-0.5 * distance**2)
    curve: NDArray[np.float64] = heights @ weights / scale
    return curve


def _begin(
    products: Products, options: SpectralDensityOptions, room: Room
) -> Query[DensityResult]:
    steps = min(options.steps, products.size)
    return products.begin(
        spectral_density,
        samples=options.probes,
        steps=steps,
        points=options.points,
        width=options.width,
        logarithmic=options.logarithmic,
        floor=options.floor,
        seed=options.seed,
        block=room.krylov_block(steps, options.probes),
    )


def _vectors(options: SpectralDensityOptions, room: Room) -> int:
    steps = min(options.steps, room.size)
    return room.krylov_block(steps, options.probes) * (steps + 3)


DEFINITION = Definition(
    options=SpectralDensityOptions,
    vectors=_vectors,
    begin=_begin,
    tensors=lambda result: {
        "grid": result.grid,
        "density": result.density,
        "standard_error": result.standard_error,
        "half_width": result.half_width,
        "nodes": result.nodes,
        "weights": result.weights,
    },
)
