"""Whether an objective can be computed at all, and its gradient is that of its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from curvd.contract import OperatorSpec
from curvd.errors import CurvatureUnverified
from curvd_server.engine.finite import finite_gradient
from curvd_server.engine.objective import Problem
from curvd_server.engine.verification.size import reference_of
from curvd_server.engine.verification.verify import TOLERANCE

_NAMED = 5
"""Places that a message names."""
_STRAY = 10 * TOLERANCE
"""How far two slopes may part; a gradient of something else is off by a tenth or more."""
_LOST = 10
"""Times its rounding, up to which a difference says nothing: a loss is a sum of many terms."""


def check_gradient(problem: Problem, cancelled: Callable[[], bool]) -> None:
    """Compute a gradient of all data, and compare one of a few points with differences.

    It costs a gradient, and finds at once what every operator would stumble over: an index
    that is out of range, values that become constants and have slopes all the same.

    Args:
        problem: The objective.
        cancelled: Polled between mini-batches.

    Raises:
        CurvatureUnverified: If central differences of the loss are something else, or none
            can be had, because the loss is too large beside its slope.
        NotFinite: If the loss is NaN or infinite.
    """
    reference = reference_of(problem, OperatorSpec())
    reference.check_gradients(cancelled)
    found = reference.slopes()
    difference, slope = found.difference, found.gradient
    gap = abs(difference - slope)
    if gap <= _STRAY * max(abs(difference), abs(slope)) or gap < 1e-9:
        return
    if not math.isfinite(difference):
        finite_gradient(problem, cancelled=cancelled)
    if math.isnan(slope):
        msg = (
            "the gradient is NaN where the loss is a number: a derivative is not defined at "
            "a value that is not used (torch.where computes both branches, and 0 times "
            "infinity is NaN), as of sqrt or log at 0 and below, or of a norm at zero. Keep "
            "the argument away from there before: torch.sqrt(torch.where(h > 0, h, 1.0))"
        )
        raise CurvatureUnverified(msg, difference=difference)
    if gap <= _LOST * found.rounding:
        msg = (
            f"the gradient cannot be compared with the loss: along a random direction it "
            f"says {slope:.3g}, and differences of the loss, which is {found.loss:.3g}, are lost "
            "in the rounding of float64. Targets far beyond all outputs do that: subtract "
            "their mean and divide by their standard deviation (or multiply the outputs)"
        )
        raise CurvatureUnverified(
            msg, slope=slope, loss=found.loss, rounding=found.rounding
        )
    cut_off: Sequence[str] = getattr(problem.model.skeleton, "cut_off", ())
    msg = (
        f"the gradient is not that of the loss: along a random direction it says {slope:.3g}, "
        f"and central differences of the loss {difference:.3g}. {explanation(cut_off)}"
    )
    raise CurvatureUnverified(msg, slope=slope, difference=difference)


def explanation(cut_off: Sequence[str]) -> str:
    """Say why a gradient has no right derivative, or is none, and what to do.

    Args:
        cut_off: Where values that depend on parameters become constants.

    Returns:
        Sentences for a message.
    """
    if cut_off:
        places = ", ".join(cut_off[:_NAMED])
        return (
            "Values that depend on parameters become constants, by detach(), .data or "
            f"no_grad(), at: {places}. So the gradient may be that of no function (a "
            "straight-through estimator's is), and then there is no Hessian: take it "
            "out, or freeze the parameters that act there (requires_grad=False)"
        )
    return (
        "A layer that owns these parameters has no right second derivative in torch: "
        "write it with elementary operations, freeze them (requires_grad=False), or "
        "leave them out of params. Where parameters also act through detach() or "
        "no_grad() (a straight-through estimator does), the gradient is that of no "
        "function, and there is no Hessian"
    )
