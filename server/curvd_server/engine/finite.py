"""Products that are NaN or infinite: seen at once, and by which data points."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from curvd.contract import ParameterLayout
from curvd.errors import NotFinite
from curvd_server.engine.objective import Problem


def is_finite(rows: Tensor) -> bool:
    """Tell whether all numbers are finite; one pass where they are.

    Args:
        rows: Any shape.

    Returns:
        Whether they are. A sum of finite numbers that overflows is looked at again.
    """
    return math.isfinite(float(rows.sum())) or bool(rows.isfinite().all())


def not_finite(rows: Tensor, layout: ParameterLayout, because: str = "") -> NotFinite:
    """Say where a product is not finite.

    Args:
        rows: [K, P] The product.
        layout: Parameters of the operator.
        because: What `because_of` says, if that is known.

    Returns:
        The error to raise.
    """
    bad = (~rows.isfinite()).any(0)
    at = int(bad.nonzero()[0])
    kind = "NaN" if bool(rows[:, at].isnan().any()) else "infinite"
    name = next(p.name for p in layout.parameters if p.offset <= at < p.offset + p.size)
    msg = (
        f"the product is {kind} at {name} (index {at} of {rows.shape[1]}){because}: "
        "parameters and operand are finite, so a second derivative there is not defined "
        "(the norm of zero, a square root at 0), or overflows its type; leave such data "
        "points out, keep away from such places (eps), or make the session with dtype='F64'"
    )
    return NotFinite(msg, parameter=name, index=at)


def because_of(problem: Problem, multiply: Callable[[int], Tensor]) -> str:
    """Find the first mini-batch whose share of a product is not finite.

    Args:
        problem: The objective.
        multiply: Makes a mini-batch's share of the product, [K, P].

    Returns:
        Its data points, as a part of a message; empty if only the sum is not finite.
    """
    for index, batch in enumerate(problem.data):
        if not is_finite(multiply(index)):
            end = batch.start + len(batch.targets)
            return f", because of a data point in rows {batch.start} to {end - 1}"
    return ""
