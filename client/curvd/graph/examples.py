"""Which data points a module and a loss are traced with, tried on and compared on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
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
"""Targets that a loss is tried on, from all over the data."""
_SPECIAL = 24
"""Targets that it is tried on beside these, because they differ most from others."""
_SCANNED = 1 << 24
"""Elements of a tensor that are looked at, from all over it."""
_COLUMNS = 1 << 12
"""Columns of which each has a largest and a smallest value that counts."""
_VALUES = 1 << 20
"""Range of integers in which each value is counted."""


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
        are the largest and the smallest; of classes, one of each. Outputs beyond those
        that were given are mixtures of them, so that all differ.
    """
    count = len(targets)
    first = range(min(EXAMPLE_ROWS, count))
    evenly = (count - 1 - k * count // _SPREAD for k in range(_SPREAD))
    special = telling([targets], _SPECIAL)
    rows = list(dict.fromkeys((*first, *evenly, *special)))
    return _mixed(outputs.detach(), rows), targets.detach()[rows]


def _mixed(outputs: Tensor, rows: Sequence[int]) -> Tensor:
    """Make an output for each row: those given, and then mixtures of two of them.

    A mixture of probabilities is one, and one of what is positive is positive.
    """
    count = len(outputs)
    one, other = ([(r + shift) % count for r in rows] for shift in (0, 1))
    generator = torch.Generator().manual_seed(0)
    parts = torch.rand(len(rows), generator=generator)
    parts[: sum(r < count for r in rows[:count])] = 1.0
    parts = parts.reshape(-1, *[1] * (outputs.dim() - 1)).to(outputs)
    return parts * outputs[one] + (1 - parts) * outputs[other]


def telling(leaves: Sequence[Tensor], most: int) -> list[int]:
    """Find the data points that differ most from the others.

    Args:
        leaves: Inputs and targets, [N, ...] each.
        most: How many at most.

    Returns:
        So many rows in ascending order, without repetition: those with the largest and
        the smallest numbers, of single columns too, those with the rarest integers, and
        then others from all over the data.
    """
    points = len(leaves[0])
    if points <= most:
        return list(range(points))
    turns = itertools.zip_longest(*map(_outliers, leaves))
    found = (row for turn in turns for row in turn if row is not None)
    rows: dict[int, None] = {}
    for row in itertools.chain(found, scattered(points)):
        rows[row] = None
        if len(rows) == most:
            break
    return sorted(rows)


def scattered(count: int) -> Iterator[int]:
    """Number things so that the first few, however many, are from all over them.

    Args:
        count: How many there are.

    Yields:
        Each number below it once: multiples of what divides the circle by the golden ratio,
        so that gaps are nearly equal, and no period of the data is met in step.
    """
    step = max(1, round(count * (5**0.5 - 1) / 2))
    while math.gcd(step, count) != 1:
        step += 1
    yield from (turn * step % count for turn in range(count))


def _outliers(leaf: Tensor) -> Iterator[int]:
    """Name rows of one tensor, the most unusual first."""
    if leaf.is_complex() or not leaf.numel():
        return
    step = -(-leaf.numel() // _SCANNED)
    flat = leaf.detach()[::step].reshape(len(leaf.detach()[::step]), -1)
    if flat.dtype is torch.bool:
        flat = flat.to(torch.uint8)
    wide = flat.double() if flat.dtype.itemsize < 4 else flat
    for each in (wide.amax(1), wide.amin(1), wide.abs().sum(1)):
        yield step * int(each.argmax())
        yield step * int(each.argmin())
    if not flat.is_floating_point():
        yield from (step * row for row in _rarest(flat))
    elif 1 < flat.shape[1] <= _COLUMNS:
        ends = torch.stack((flat.argmax(0), flat.argmin(0)), 1)
        yield from (step * row for row in ends.reshape(-1).tolist())


def _rarest(flat: Tensor) -> Iterator[int]:
    """Name a row for each integer, the rarest first."""
    least = int(flat.min())
    if int(flat.max()) - least >= _VALUES:
        return
    places = flat.reshape(-1).long() - least
    counts = torch.bincount(places)
    first = torch.full_like(counts, flat.numel())
    first.scatter_reduce_(0, places, torch.arange(len(places)).to(places), "amin")
    order = counts.argsort(stable=True)
    for value in order[counts[order] > 0].tolist():
        yield int(first[value]) // flat.shape[1]
