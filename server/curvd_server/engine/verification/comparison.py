"""How products are compared: made in steps of their own, errors relative to their rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from curvd.contract import OperatorSpec
from curvd_server.engine.objective import Batch, Problem
from curvd_server.engine.operators import MODES, Linearisation
from curvd_server.engine.program import Rows
from curvd_server.system import yield_point


def linearised(
    mode: str, problem: Problem, spec: OperatorSpec, batch: Batch
) -> Linearisation:
    """Linearise in a step of its own.

    Args:
        mode: Name in `MODES`.
        problem: The objective.
        spec: The operator.
        batch: The mini-batch.

    Returns:
        The linearisation.
    """
    yield_point()
    return MODES[mode](problem, spec, batch)


def product(
    linear: Linearisation, tangents: Sequence[Tensor], block: range, *, batched: bool
) -> Rows:
    """Multiply in a step of its own.

    Args:
        linear: The linearisation.
        tangents: One for each parameter of the block, [*shape]; [K, *shape] if batched.
        block: Which parameters.
        batched: Whether columns go together.

    Returns:
        The rows of the product; None: zero.
    """
    yield_point()
    return linear.product(tangents, block, batched=batched)


def relative(
    distances: Sequence[float], norms: Sequence[float], *, floor: float = 1e-6
) -> list[float]:
    """Divide errors by norms; rows far below the largest may be rounding.

    Args:
        distances: Norms of the errors.
        norms: Of the rows.
        floor: How far below all rows together one may lie.

    Returns:
        Relative errors.
    """
    least = floor * math.hypot(*norms) + 1e-300
    return [d / (n + least) for d, n in zip(distances, norms, strict=True)]
