"""The Frobenius norm."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from curvd.contract import FrobeniusNormOptions
from curvd_server.linalg.base import Products, Query
from curvd_server.linalg.definition import Definition, Room
from curvd_server.linalg.sampling import Estimate, Target, sample_mean
from curvd_server.linalg.whole import is_small, number_of


def frobenius_norm(
    products: Products, *, target: Target, seed: int = 0, block: int = 8
) -> Query[Estimate]:
    """Estimate the Frobenius norm of a symmetric map.

    ``|A|^2 = tr(A'A)`` is the mean of ``|Aw|^2`` (Hutchinson's estimator on ``A'A``,
    one product per sample). The error of the root follows to first order, so the
    targets for the square are twice the relative ones for the norm.

    Args:
        products: The map A.
        target: When to stop.
        seed: The seed of the probes.
        block: Probes multiplied together.

    Returns:
        The norm.
    """
    if is_small(products, target):
        return number_of(products, block, torch.linalg.matrix_norm)
    return _sampled(products, target, seed, block)


def _sampled(
    products: Products, target: Target, seed: int, block: int
) -> Query[Estimate]:
    """Estimate it from random probes."""
    query = sample_mean(
        products,
        lambda _, AW: (products.space.norms(AW) ** 2).tolist(),
        target=replace(target, relative=2 * target.relative, absolute=0.0),
        seed=seed,
        block=block,
    )
    while True:
        try:
            square = next(query)
        except StopIteration as end:
            found: Estimate = end.value
            break
        root = math.sqrt(square.estimates[0])
        error = _halved(square.residuals[0], root)
        yield replace(square, estimates=(root,), residuals=(error,))
        if 0 < error <= target.absolute and square.iteration > 1:
            break
    root = math.sqrt(found.value)
    return replace(
        found,
        value=root,
        standard_error=_halved(found.standard_error, root),
        # The longer side of the interval of the square, taken to the root.
        half_width=root - math.sqrt(max(0.0, found.value - found.half_width)),
    )


def _halved(error: float, root: float) -> float:
    return error / (2 * root) if root else error


def _begin(
    products: Products, options: FrobeniusNormOptions, room: Room
) -> Query[Estimate]:
    return products.begin(
        frobenius_norm,
        target=Target.of(options, options.samples),
        seed=options.seed,
        block=room.block,
    )


DEFINITION = Definition(
    options=FrobeniusNormOptions,
    vectors=lambda options, room: 2 * room.block,
    begin=_begin,
)
