"""What is NaN or infinite: seen at once, by which data points, and by which buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvd.contract import ParameterLayout
from curvd.errors import NotFinite
from curvd_server.engine.objective import Batch, Problem, never


def is_finite(rows: Tensor) -> bool:
    """Tell whether all numbers are finite; one pass where they are.

    Args:
        rows: Any shape.

    Returns:
        Whether they are. A sum of finite numbers that overflows is looked at again.
    """
    return math.isfinite(float(rows.sum())) or bool(rows.isfinite().all())


def are_finite(parts: Sequence[Tensor]) -> bool:
    """Tell whether all numbers of some tensors are finite; waits for a device once.

    Args:
        parts: Any shapes.
    """
    sums = [part.sum().double() for part in parts]
    whole = math.isfinite(float(torch.stack(sums).sum())) if sums else True
    return whole or all(bool(part.isfinite().all()) for part in parts)


def check_finite(
    problem: Problem, batch: Batch, what: str, parts: Sequence[Tensor]
) -> None:
    """Refuse what some data points make that is NaN or infinite.

    Args:
        problem: The objective.
        batch: The data points.
        what: Names what was computed.
        parts: All of it.

    Raises:
        NotFinite: If a number of it is no number; it says where.
    """
    if not are_finite(parts):
        raise _because(problem, what, _rows_of(batch))


def finite_gradient(
    problem: Problem, *, cancelled: Callable[[], bool] = never
) -> tuple[float, Tensor]:
    """Differentiate the objective; see `Problem.gradient`.

    Args:
        problem: The objective; of parameters in slices, only its own is looked at.
        cancelled: Polled before each mini-batch.

    Raises:
        NotFinite: If the loss or the gradient is NaN or infinite.
    """
    loss, gradient = problem.gradient(cancelled=cancelled)
    if problem.model.company.shares or (math.isfinite(loss) and is_finite(gradient)):
        return loss, gradient
    for batch in problem.data:
        share, rows = problem.batch_gradient(batch)
        for name, row in zip(problem.layout.names, rows, strict=True):
            if row is not None:
                check_finite(problem, batch, f"the gradient of {name}", [row])
        check_finite(problem, batch, "the loss", [share])
    check_finite_gradient(loss, gradient)
    return loss, gradient


def check_finite_gradient(loss: float, gradient: Tensor) -> None:
    """Refuse a loss and a gradient [P] that are not finite, with nothing known of why.

    Raises:
        NotFinite: If a number is NaN or infinite.
    """
    for what, value in (("the gradient", gradient), ("the loss", torch.tensor(loss))):
        if not is_finite(value):
            msg = f"{what} is NaN or infinite, or its sum overflows: {_REMEDY}"
            raise NotFinite(msg)


_REMEDY = (
    "a value overflows its type, or a derivative is not defined there (the norm of zero, a "
    "square root at 0): keep away from such places (eps), leave such data points out, or "
    "make the session with dtype='F64'"
)


def _because(problem: Problem, what: str, rows: str) -> NotFinite:
    named = infinite_buffers(problem)
    if named:
        msg = (
            f"{what} is NaN or infinite in {rows}, and so is a value of the buffer "
            f"{', '.join(named)}: update the session with buffers that are finite where "
            "they are multiplied"
        )
        return NotFinite(msg, buffers=", ".join(named))
    return NotFinite(f"{what} is NaN or infinite in {rows}: {_REMEDY}")


def infinite_buffers(problem: Problem) -> list[str]:
    """Name the buffers and frozen parameters that hold what is not finite; masks may."""
    constants = problem.model.constants.items()
    return [name for name, t in constants if t.is_floating_point() and not is_finite(t)]


def _rows_of(batch: Batch) -> str:
    return f"rows {batch.start} to {batch.start + len(batch.targets) - 1}"


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
            named = ", ".join(infinite_buffers(problem))
            buffers = f" and the buffer {named}, which is not finite" if named else ""
            return f", because of a data point in {_rows_of(batch)}{buffers}"
    return ""
