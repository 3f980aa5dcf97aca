"""Which data points a module and a loss are traced with, tried on and compared on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

EXAMPLE_ROWS = 3
"""Data points that a module is traced with; neither 0 nor 1, which torch takes for
special cases."""
PROOF_ROWS = (0, 1, 2, -1)
"""Data points that a module and its graph are compared on."""
_SPREAD = 16
"""Targets that a loss is tried on, beside the special ones; and most classes."""


def few(inputs: Any) -> Any:
    """Take a few data points, repeated if there are too few.

    Args:
        inputs: Any structure of tensors.

    Returns:
        The same with `EXAMPLE_ROWS` rows each.
    """

    def some(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or not len(leaf):
            return leaf
        rows = leaf.detach()[:EXAMPLE_ROWS]
        return torch.cat([rows] * EXAMPLE_ROWS)[:EXAMPLE_ROWS]

    return pytree.tree_map(some, inputs)


def sampled(inputs: Any) -> Any:
    """Take the data points that a proof is made on.

    Args:
        inputs: Any structure of tensors with one leading axis.

    Returns:
        The same with `PROOF_ROWS`, repeated if there are too few.
    """

    def some(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or not len(leaf):
            return leaf
        return leaf.detach()[[row % len(leaf) for row in PROOF_ROWS]]

    return pytree.tree_map(some, inputs)


def spread(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Take targets of all kinds that there are, for what a loss does with each.

    Args:
        outputs: Example outputs, [B, ...]; those of few data points are repeated.
        targets: All targets, [N, ...].

    Returns:
        A few dozen of both: the first, others all over the data, and the targets that
        are the largest and the smallest; of classes, one of each.
    """
    rows = list(dict.fromkeys(_telling(targets)))
    return outputs.detach()[[r % len(outputs) for r in rows]], targets.detach()[rows]


def _telling(targets: Tensor) -> Iterator[int]:
    count = len(targets)
    yield from range(min(EXAMPLE_ROWS, count))
    yield from (count - 1 - k * count // _SPREAD for k in range(_SPREAD))
    if targets.is_complex() or not targets.numel():
        return
    flat = targets.reshape(count, -1)
    flat = flat.to(torch.uint8) if flat.dtype is torch.bool else flat
    for most in (flat.amax(1), flat.amin(1), flat.sum(1)):
        yield from (int(most.argmax()), int(most.argmin()))
    if flat.shape[1] == 1 and not flat.is_floating_point():
        for one in list(dict.fromkeys(flat[:, 0].tolist()))[:_SPREAD]:
            yield int((flat[:, 0] == one).nonzero()[0])
