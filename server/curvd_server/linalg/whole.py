"""Small maps, multiplied with every unit vector: what an estimate would cost is exact."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvd.contract import Stop
from curvd_server.linalg.base import Products, Progress, Query
from curvd_server.linalg.sampling import LEAST_SAMPLES, Estimate, Target
from curvd_server.linalg.scales import Range


def is_small(products: Products, target: Target) -> bool:
    """Say whether all P columns cost no more than an estimate would.

    Args:
        products: The map.
        target: The target of the estimate.

    Returns:
        Whether they do, and are allowed.
    """
    size = products.size
    least = min(target.samples, 2 * LEAST_SAMPLES)
    return size <= least and products.allowed(size) == size


def number_of(
    products: Products, block: int, function: Callable[[Tensor], Tensor]
) -> Query[Estimate]:
    """Compute a number from all columns.

    Args:
        products: The map.
        block: Columns multiplied together.
        function: Maps A: [P, P] to a scalar of the size of its columns at most.

    Yields:
        Progress.

    Returns:
        The number, with what rounding may do to it; NaN if time ran out.
    """
    A = yield from matrix(products, block)
    if A is None:
        return Estimate(
            value=torch.nan,
            standard_error=torch.inf,
            half_width=torch.inf,
            samples=0,
            products=products.done,
            stopped=products.refusal() or Stop.TIME,
        )
    rounding = float(rounding_of(products, A).sum())
    return Estimate(
        value=float(function(products.space.joined(A).double())),
        standard_error=rounding,
        half_width=rounding,
        samples=products.size,
        products=products.done,
        stopped=Stop.CONVERGED,
    )


def known_or(
    products: Products,
    function: Callable[[Tensor], Tensor],
    estimate: Callable[[], Query[Estimate]],
) -> Query[Estimate]:
    """Sum a function of the eigenvalues if all of them are known, or estimate.

    Args:
        products: The map.
        function: Maps eigenvalues, [P], to terms of the number.
        estimate: Begins what estimates it from products.

    Returns:
        The number, with what rounding may do to it; or the estimate.
    """
    eigenvalues = products.eigenvalues()
    if eigenvalues is None:
        return (yield from estimate())
    value, rounding = summed(products, function(eigenvalues))
    return Estimate(
        value=value,
        standard_error=rounding,
        half_width=rounding,
        samples=0,
        products=products.done,
        stopped=Stop.CONVERGED,
    )


def summed(products: Products, terms: Tensor) -> tuple[float, float]:
    """Add up terms of known eigenvalues.

    Args:
        products: The map, in whose precision they are known.
        terms: [P].

    Returns:
        The sum, and what rounding may do to it.
    """
    return float(terms.sum()), products.rounding * float(terms.abs().sum())


def matrix(products: Products, block: int) -> Query[Tensor | None]:
    """Multiply with every unit vector.

    Args:
        products: The map.
        block: Columns multiplied together.

    Yields:
        Progress.

    Returns:
        [P, own]; None if time ran out.

    Raises:
        ScaleOutOfRange: If it is too small to compute with.
    """
    rows = []
    for start in range(0, products.size, block):
        part = range(start, min(start + block, products.size))
        if products.refusal(len(part)) is not None:
            return None
        rows.append(products(products.space.units(part)))
        yield Progress(iteration=products.done, products=products.done)
    A = torch.cat(rows)
    if not products.scale_free:
        Range(products.dtype, products.size).check_peak(products.space.peak(A))
    return A


def rounding_of(products: Products, A: Tensor) -> Tensor:
    """Bound what rounding did to an element of each column: [P]."""
    return products.rounding * products.space.norms(A)
