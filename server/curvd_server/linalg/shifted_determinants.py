"""Log-determinants of ``A + damping * I`` for many dampings, from products made once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from curvd.contract import Distribution, Stop
from curvd.errors import ScaleOutOfRange
from curvd_server.linalg.base import Products, Query
from curvd_server.linalg.lanczos import Quadrature, quadratures
from curvd_server.linalg.log_determinants import Logarithms
from curvd_server.linalg.whole import matrix

_DENSE = 4096
"""Largest P of which all eigenvalues are computed: P^3 operations, and two matrices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftedDeterminants:
    """Logarithms of determinants, damping by damping."""

    values: tuple[float, ...]
    """NaN where the damped map is not positive definite, or nothing was computed."""
    standard_errors: tuple[float, ...]
    """0 where all eigenvalues are known; infinite below two samples."""
    exact: bool
    """Whether all eigenvalues are known."""
    products: int
    stopped: Stop


def is_dense(size: int, samples: int, steps: int) -> bool:
    """Tell whether all eigenvalues cost no more products than an estimate.

    Args:
        size: P.
        samples: Probes of an estimate.
        steps: Lanczos steps per probe.

    Returns:
        Whether they do, and fit.
    """
    return size <= min(_DENSE, samples * steps)


def shifted_determinants(
    products: Products,
    dampings: Sequence[float],
    *,
    samples: int,
    steps: int,
    seed: int,
    block: int,
) -> Query[ShiftedDeterminants]:
    """Compute ``log det(A + damping * I)`` of a positive semi-definite map.

    A Krylov space does not change when its map is shifted, so one Lanczos run from each
    probe has the quadrature of every damping (Ubaru, Chen & Saad, SIAM J. Matrix Anal.
    Appl. 38, 2017); and small maps have all their eigenvalues computed.

    Args:
        products: The map A.
        dampings: Added to every eigenvalue, D of them.
        samples: Probes.
        steps: Lanczos steps per probe.
        seed: The seed of the probes.
        block: Columns that go together.

    Yields:
        Progress.

    Returns:
        The logarithms.
    """
    known = products.eigenvalues()
    if known is not None:
        return _of_eigenvalues(known.sort().values, dampings, products.done)

    def compute(
        map_: Products, dampings: Sequence[float]
    ) -> Query[ShiftedDeterminants]:
        return _compute(map_, dampings, samples, steps, seed, block)

    least = min(dampings, default=0.0)
    try:
        return (yield from compute(products, dampings))
    except ScaleOutOfRange:
        if not least > 0:
            raise
    # What is too small to be multiplied alone is not, beside the smallest damping.
    found = yield from compute(products.shifted(least), [d - least for d in dampings])
    return replace(found, products=products.done)


def _compute(
    products: Products,
    dampings: Sequence[float],
    samples: int,
    steps: int,
    seed: int,
    block: int,
) -> Query[ShiftedDeterminants]:
    """Compute them from products; see `shifted_determinants`."""
    size = products.size
    if is_dense(size, samples, steps) and products.allowed(size) == size:
        A = yield from matrix(products, block)
        if A is not None:
            A = products.space.joined(A).double()
            eigenvalues = torch.linalg.eigvalsh((A + A.T) / 2)
            return _of_eigenvalues(eigenvalues, dampings, products.done)
    found: list[Quadrature] = []
    stopped = Stop.CONVERGED
    while len(found) < samples:
        indices = range(len(found), min(samples, len(found) + block))
        W = products.space.probes(Distribution.RADEMACHER, seed, indices)
        some = yield from quadratures(products, W, steps, iteration=products.done)
        if some is None:
            stopped = products.refusal(len(indices)) or Stop.TIME
            break
        found += some
    return _of_quadratures(found, dampings, products, stopped)


def weighted_determinants(
    products: Products,
    weights: Tensor,
    damping: float,
    *,
    samples: int,
    steps: int,
    seed: int,
    block: int,
) -> Query[ShiftedDeterminants]:
    """Compute ``log det(D A D + damping * I)`` for several diagonal matrices D.

    Small maps are multiplied with every unit vector, once for all; of others every D has a
    Krylov space of its own.

    Args:
        products: The map A, positive semi-definite.
        weights: [n, own] The diagonals.
        damping: Added to every eigenvalue.
        samples: Probes for each.
        steps: Lanczos steps per probe.
        seed: The seed of the probes.
        block: Columns that go together.

    Yields:
        Progress.

    Returns:
        The logarithms.
    """
    size, space = products.size, products.space
    if is_dense(size, samples, steps) and products.allowed(size) == size:
        try:
            A = yield from matrix(products, block)
        except ScaleOutOfRange:
            A = None  # with the diagonals around it, it may be in range
        if A is not None:
            A = space.joined(A).double()
            whole = space.joined(weights).double()
            values = [_log_of_dense(A, w, damping) for w in whole]
            return ShiftedDeterminants(
                values=tuple(values),
                standard_errors=(0.0,) * len(values),
                exact=True,
                products=products.done,
                stopped=Stop.NEGATIVE_CURVATURE
                if any(map(math.isnan, values))
                else Stop.CONVERGED,
            )
    found = []
    for w in weights:
        one = yield from shifted_determinants(
            products.congruent(w),
            [damping],
            samples=samples,
            steps=steps,
            seed=seed,
            block=block,
        )
        found.append(one)
    severity = list(Stop)
    return ShiftedDeterminants(
        values=tuple(one.values[0] for one in found),
        standard_errors=tuple(one.standard_errors[0] for one in found),
        exact=all(one.exact for one in found),
        products=products.done,
        stopped=max((one.stopped for one in found), key=severity.index),
    )


def _log_of_dense(A: Tensor, weights: Tensor, damping: float) -> float:
    """Compute ``log det(D A D + damping * I)``; NaN if that is not positive definite."""
    M = weights[:, None] * (A + A.T) / 2 * weights
    M.diagonal().add_(damping)
    triangle, failed = torch.linalg.cholesky_ex(M)
    return math.nan if failed else 2 * float(triangle.diagonal().log().sum())


def _of_eigenvalues(
    eigenvalues: Tensor, dampings: Sequence[float], products: int
) -> ShiftedDeterminants:
    """Compute the logarithms of all eigenvalues, [P] in ascending order."""
    # Rounding alone makes eigenvalues of a semi-definite map negative.
    floor = -1e-6 * float(eigenvalues[-1].abs())
    definite = bool(eigenvalues[0] >= floor)
    eigenvalues = eigenvalues.clamp_min(0.0) if definite else eigenvalues
    values = [_log(eigenvalues.cpu().numpy(), damping) for damping in dampings]
    stopped = (
        Stop.NEGATIVE_CURVATURE if any(map(math.isnan, values)) else Stop.CONVERGED
    )
    return ShiftedDeterminants(
        values=tuple(values),
        standard_errors=(0.0,) * len(values),
        exact=True,
        products=products,
        stopped=stopped,
    )


def _log(
    eigenvalues: np.ndarray[tuple[int], np.dtype[np.float64]], damping: float
) -> float:
    shifted = eigenvalues + damping
    return float(np.log(shifted).sum()) if shifted.min() > 0 else math.nan


def _of_quadratures(
    found: Sequence[Quadrature],
    dampings: Sequence[float],
    products: Products,
    stopped: Stop,
) -> ShiftedDeterminants:
    values, errors = [], []
    for damping in dampings:
        smallest = min((float(q.nodes[0]) + damping for q in found), default=math.nan)
        if not smallest > 0:
            values.append(math.nan)
            errors.append(math.inf)
            stopped = Stop.NEGATIVE_CURVATURE if found else stopped
            continue
        logs = Logarithms(damping, torch.finfo(products.dtype).eps)
        logs.add(found)
        mean = logs.mean(products.size)
        values.append(mean.value)
        errors.append(mean.standard_error)
    return ShiftedDeterminants(
        values=tuple(values),
        standard_errors=tuple(errors),
        exact=False,
        products=products.done,
        stopped=stopped,
    )
