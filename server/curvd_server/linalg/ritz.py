"""Which Ritz values are wanted, and which survive a restart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from curvd.contract import Which

Floats = NDArray[np.float64]


def select(values: Floats, k: int, which: Which) -> NDArray[np.intp]:
    """Choose k of ascending values, the one that converges first first.

    Args:
        values: [m], ascending.
        k: How many; all if there are fewer.
        which: Which end.

    Returns:
        Indices.
    """
    order = np.arange(len(values))
    if which is Which.SMALLEST:
        ranked = order
    elif which is Which.LARGEST:
        ranked = order[::-1]
    elif which is Which.LARGEST_MAGNITUDE:
        ranked = np.argsort(-np.abs(values), kind="stable")
    else:
        # Alternately from the top and the bottom; an odd k takes one more at the top.
        ends = np.empty(len(values), dtype=np.intp)
        ends[0::2] = order[::-1][: (len(values) + 1) // 2]
        ends[1::2] = order[: len(values) // 2]
        ranked = ends
    return ranked[:k]


def keep_of(values: Floats, k: int, which: Which, goals: Floats) -> NDArray[np.intp]:
    """Choose the Ritz vectors that survive a restart.

    To keep more widens the gap between a goal and what is left to be told apart from
    it, to keep fewer leaves more steps until the next restart. A cycle damps by a
    Chebyshev polynomial over the interval of what is left, which grows by
    ``exp(degree * arccosh(1 + 2 gap / width))`` at a goal; the largest exponent wins
    (Yamazaki, Bai, Simon, Wang & Wu, ACM Trans. Math. Softw. 37, 2010). Outliers at
    the far end are better met by a root each than by a wider interval.

    Args:
        values: [m], ascending.
        k: Wanted pairs.
        which: Which end.
        goals: Values of the wanted pairs that have not converged.

    Returns:
        Indices of at least k, fewer than m - 1.
    """
    m = len(values)
    ranked = select(values, m, which)

    def exponent(kept: int) -> float:
        far = np.sort(np.abs(values[ranked[kept:]] - goals[:, None]))[:, ::-1]
        gap, degree = far[:, -1:], np.arange(m - kept, 1, -1)
        width = np.maximum(far[:, :-1] - gap, np.finfo(np.float64).tiny)
        growth = degree * np.arccosh(1 + 2 * gap / width)
        return float(growth.max(axis=1).min())

    return ranked[: max(range(k, max(k + 1, m - 1)), key=exponent)]
