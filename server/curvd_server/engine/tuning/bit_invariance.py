"""Columns of several requests in one product, and what that does to their last bits.

Shapes decide in which order kernels add, so a column's result may depend on how many go
through with it. A caller who asks for the same again expects the same again, whoever
else asks: either a column is known to be alike in any company, or each request goes
through in the shapes that it has alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def is_alike(product: Callable[[Tensor], Tensor], V: Tensor) -> bool:
    """Try whether a column's result has the same bits in any company.

    Args:
        product: Multiplies columns ``[k, P]``, all of them at once.
        V: Columns ``[K, P]``, as many as go through together at most.

    Returns:
        Whether it does alone, in products of some widths, and at another place.
    """
    known = product(V[:1])
    for size in sorted({2, len(V) // 2 + 1, len(V)}):
        rows = product(V[:size])
        if not torch.equal(rows[: len(known)], known):
            return False
        known = rows
    return torch.equal(product(V.flip(0)).flip(0), known)


def steps(counts: Sequence[int], width: int, most: int) -> Iterator[list[int]]:
    """Cut requests into chunks that go through together, each as if it were alone.

    Args:
        counts: Columns of each request.
        width: Columns that go through together at most.
        most: Columns that share what is linearised for them.

    Yields:
        Sizes of consecutive chunks that are multiplied side by side.
    """
    step: list[int] = []
    for count in counts:
        for at in range(0, count, width):
            size = min(width, count - at)
            if step and sum(step) + size > most:
                yield step
                step = []
            step.append(size)
    if step:
        yield step
