"""Prior precisions at which data are the most likely, by MacKay's fixed point."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from curvd_server.linalg.base import Progress, Query

_LEAST, _MOST = 1e-100, 1e100
_ENOUGH = 1e-9
"""Change of a logarithm of a precision that is none."""


def likeliest_precisions(
    A: Tensor,
    sizes: Sequence[int],
    squares: Sequence[float],
    start: Sequence[float],
    *,
    steps: int,
) -> Query[list[float]]:
    """Maximise Laplace's marginal likelihood over the precisions of groups of parameters.

    With ``H = A + D`` a group of n parameters has ``g = n - d tr (H^-1)`` of them determined
    by data, over the group, and the derivative of the marginal likelihood vanishes where ``d =
    g / |θ|^2`` (MacKay, Neural Computation 4, 1992). A step goes there.

    Args:
        A: [P, P] Curvature of the negative log-likelihood, float64.
        sizes: Parameters of each group; they follow each other.
        squares: ``|θ|^2`` of each group.
        start: Precisions to begin with.
        steps: At most.

    Yields:
        The step, and how far the logarithms moved.

    Returns:
        Precisions, in [1e-100, 1e100]: the largest where a group's parameters are all zero.
    """
    lengths = torch.tensor(sizes, device=A.device)
    d = [float(value) for value in start]
    for step in range(1, steps + 1):
        roots = torch.tensor(d, dtype=A.dtype, device=A.device).rsqrt()
        s = roots.repeat_interleave(lengths)
        M = s[:, None] * A * s
        M.diagonal().add_(1.0)
        triangle, failed = torch.linalg.cholesky_ex((M + M.T) / 2)
        if failed:  # nothing there; whoever evaluates it says so
            break
        left = 1 - torch.cholesky_inverse(triangle).diagonal()
        parts = left.split(list(sizes))  # type: ignore[no-untyped-call]
        known = [float(part.sum()) for part in parts]
        after = [
            min(max(g / square, _LEAST), _MOST) if square > 0 else _MOST
            for g, square in zip(known, squares, strict=True)
        ]
        moved = max(abs(math.log(new / old)) for new, old in zip(after, d, strict=True))
        d = after
        yield Progress(iteration=step, products=len(A), residuals=(moved,))
        if moved < _ENOUGH:
            break
    return d
