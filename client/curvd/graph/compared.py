"""How far two ways to compute the same may differ, and how far they do."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def differing(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    narrowest: torch.dtype,
    least: float = 0.0,
    power: float = 0.5,
) -> dict[str, float]:
    """Find what differs by more than rounding.

    Args:
        pairs: What was got, and what it should be, by name.
        narrowest: The type with the fewest digits that went into it.
        least: The size that they have elsewhere; where they vanish, because a function
            saturates, rounding is judged by it.
        power: Of that type's precision, which their relative errors may reach.

    Returns:
        Relative errors of those that differ; none if something is not finite, which is
        the server's to name.
    """
    eps = torch.finfo(narrowest).eps
    wide = {
        n: (a.detach().double(), b.detach().double()) for n, (a, b) in pairs.items()
    }
    total = size_of(pairs)
    scale = max(total, least)
    wrong = {}
    for name, (got, want) in wide.items():
        off = math.inf if got.shape != want.shape else float((got - want).norm())
        size = float(want.norm())
        if not off <= eps**power * size + 100 * eps * scale:
            wrong[name] = off / size if size else math.inf
    return wrong if math.isfinite(total) else {}


def size_of(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """Measure what several tensors should be, together."""
    return math.hypot(*(float(w.detach().double().norm()) for _, w in pairs.values()))


def shown_size(error: float) -> str:
    """Say how far something is off.

    Args:
        error: Relative.

    Returns:
        A phrase in brackets.
    """
    if math.isfinite(error):
        return f"(relative difference {error:.2g})"
    return "(what is exported has none, or another shape)"
