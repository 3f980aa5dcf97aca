"""Whether a loss is a sum over data points: a mini-batch is compared with its parts."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvd.errors import CurvdError, InvalidSpec
from curvd.graph.eager import Digits

Summed = Callable[[tuple[Tensor, Tensor], dict[str, Any]], tuple[Tensor, ...]]
"""Outputs and targets, and no keywords -> the sum of their losses, and perhaps a weight."""

_NEARBY = 0.03
"""How far other outputs lie, relative to their scale."""
_ROUNDING = 1e-12
"""Of a loss of size one, or less, that is nearly nothing: what it is the difference of."""
_TYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
"""Those that a loss may compute in, whatever it is given."""


def is_additive(
    loss: Summed, outputs: Tensor, targets: Tensor, *, elsewhere: bool = False
) -> bool:
    """Compare a mini-batch with its parts, to the digits that the loss has.

    A term that joins data points may be small beside the loss of one of them, and all of a loss
    may be as small as its factor makes it.

    Args:
        loss: The sum over a mini-batch.
        outputs: Example outputs, [B, ...].
        targets: Example targets, [B, ...].
        elsewhere: Whether to compare far from these outputs, too, and two of each: where the
            loss vanishes, or there is one data point, every loss is a sum, and a mean.

    Raises:
        InvalidSpec: If the loss fails.
    """
    if elsewhere and len(outputs) == 1:
        outputs, targets = torch.cat([outputs] * 2), torch.cat([targets] * 2)
    # Where all outputs are alike, as those of a layer of zeros are, so are their parts'.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(outputs.shape, generator=generator).to(outputs)
    root = max(float(outputs.detach().double().square().mean().sqrt()), 1e-2)
    nearby = outputs + _NEARBY * root * noise
    far = (-outputs, noise, *(size * root * noise for size in (1.0, -1.0, 30.0)))
    usual = _sizes(loss, (outputs, nearby, *far), targets)
    if not _agrees(loss, outputs, targets, usual):
        return False
    for z in (nearby, *far) if elsewhere else (nearby,):
        try:
            if not _agrees(loss, z, targets, usual):
                return False
        except InvalidSpec:
            continue  # it is not defined there
    return True


def tried(
    loss: Callable[[Tensor, Tensor], Any], outputs: Tensor, targets: Tensor
) -> Any:
    """Call a loss; what it warns of shows in what follows.

    Args:
        loss: Of the caller.
        outputs: Example outputs, [B, ...].
        targets: Example targets, [B, ...].

    Raises:
        InvalidSpec: If it fails.
    """
    leaf = outputs.detach().requires_grad_()  # some hang a hook on it
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return loss(leaf, targets)
    except CurvdError:
        raise
    except Exception as error:  # of the caller's own code
        first = str(error).strip().partition("\n")[0][:300]
        shapes = [list(t.shape) for t in (outputs, targets)]
        msg = (
            f"the loss fails on outputs and targets of shape {shapes[0]} and "
            f"{shapes[1]}: {type(error).__name__}: {first}"
        )
        raise InvalidSpec(msg) from error


def _agrees(
    loss: Summed, outputs: Tensor, targets: Tensor, usual: Sequence[float]
) -> bool:
    """Compare values; what is not finite tells nothing.

    Args:
        loss: The sum over a mini-batch.
        outputs: [B, ...]
        targets: [B, ...]
        usual: Sizes of the sum and the weight elsewhere; where a loss saturates, what is left
            of it is rounding of such.
    """
    whole, narrowest, dtype = _whole(loss, outputs, targets)
    tolerance = torch.finfo(narrowest).eps ** 0.7
    for cut in {1, -(-len(outputs) // 2)}:
        first, _ = _totals(loss, outputs[:cut], targets[:cut], dtype)
        second, _ = _totals(loss, outputs[cut:], targets[cut:], dtype)
        parts = zip(whole, first, second, usual, strict=True)
        for value, one, other, scale in parts:
            size = abs(value) + abs(one) + abs(other)
            rounding = _ROUNDING * min(scale, 1.0)
            if abs(value - one - other) > tolerance * size + rounding:
                return False
    return True


def _sizes(
    loss: Summed, places: Sequence[Tensor], targets: Tensor
) -> tuple[float, ...]:
    """Find how large a loss gets, and its weight, where they are numbers.

    Args:
        loss: The sum over a mini-batch.
        places: Outputs, [B, ...] each; the loss is defined at the first.
        targets: [B, ...]
    """
    largest = tuple(0.0 for _ in _whole(loss, places[0], targets)[0])
    for outputs in places:
        with contextlib.suppress(InvalidSpec):  # it is not defined there
            found = _whole(loss, outputs, targets)[0]
            sizes = (abs(value) if math.isfinite(value) else 0.0 for value in found)
            largest = tuple(map(max, zip(largest, sizes, strict=True)))
    return largest


def _whole(
    loss: Summed, outputs: Tensor, targets: Tensor
) -> tuple[list[float], torch.dtype, torch.dtype]:
    """Compute a mini-batch's totals; their digits, and the type that the loss is given."""
    try:
        dtype = torch.float64
        return *_totals(loss, outputs, targets, dtype), dtype
    except InvalidSpec:  # it insists on the type that it is used with
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        return *_totals(loss, outputs, targets, dtype), dtype


def _totals(
    loss: Summed, outputs: Tensor, targets: Tensor, dtype: torch.dtype
) -> tuple[list[float], torch.dtype]:
    """Compute the sum, and perhaps a weight; and the type that it has the digits of."""
    z = outputs.to(dtype)
    y = targets.to(dtype) if targets.is_floating_point() else targets
    digits = Digits(dtype, _TYPES)
    with digits:
        parts = tried(lambda z, y: loss((z, y), {}), z, y)
    return [float(part.detach()) for part in parts], digits.narrowest
