"""The determinism check: an objective has to give the same value twice."""

from __future__ import annotations

import torch
from torch import Tensor

from curvd.errors import NotDeterministic, NotFinite
from curvd_server.engine.finite import check_finite
from curvd_server.engine.objective import Problem, chunks
from curvd_server.system import yield_point

REPEAT_RTOL, REPEAT_ATOL = 5e-5, 1e-6
"""As curvlinops' determinism check."""


def check_objective(problem: Problem) -> None:
    """Evaluate loss and gradient twice on the first mini-batch.

    Args:
        problem: The objective.

    Raises:
        NotDeterministic: If two evaluations differ.
        NotFinite: If they are NaN, or the gradient is infinite.
    """
    first = problem.batch_gradient(problem.data[0])
    yield_point()
    second = problem.batch_gradient(problem.data[0])

    def compare() -> None:
        batch = problem.data[0]
        if first[0].isnan():
            check_finite(problem, batch, "the loss", [first[0]])
        check_repeatable("loss", first[0], second[0])
        for name, a, b in zip(problem.layout.names, first[1], second[1], strict=True):
            if a is not None and b is not None:
                check_finite(problem, batch, f"the gradient of {name}", [a])
                check_repeatable(f"gradient of {name}", a, b)

    problem.model.company.all_pass(compare)


def check_repeatable(what: str, first: Tensor, second: Tensor) -> None:
    """Refuse an objective that does not give the same value twice.

    Args:
        what: ``loss``, ``gradient`` or ``product``, for the message.
        first: One evaluation.
        second: Another one of the same.

    Raises:
        NotDeterministic: If they differ beyond rounding.
        NotFinite: If they are NaN, or infinite of either sign.
    """
    pairs = [(a, b) for a, b in chunks(first, second) if not _close(a, b)]
    if not pairs:
        return
    if not all(t.isfinite().all() for pair in pairs for t in pair):
        msg = f"the {what} is not finite; check the parameters and the data"
        raise NotFinite(msg, what=what)
    gap = max(float((a - b).abs().max()) for a, b in pairs)
    msg = (
        f"two evaluations of the {what} on one mini-batch differ by {gap:.1e} (allowed: "
        f"relative {REPEAT_RTOL:.0e} or absolute {REPEAT_ATOL:.0e}); the likely cause "
        "is a random layer, such as dropout called with training=True, or a model "
        "that changes its own state"
    )
    raise NotDeterministic(msg, what=what, gap=gap)


def _close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=REPEAT_RTOL, atol=REPEAT_ATOL)
