"""Whether a loss is a sum over data points: a mini-batch is compared with its parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvd.errors import CurvdError, InvalidSpec
from curvd.graph.eager import Digits

Summed = Callable[[tuple[Tensor, Tensor], dict[str, Any]], tuple[Tensor, ...]]
"""Outputs and targets, and no keywords -> the sum of their losses, and perhaps a weight."""

_NEARBY = 0.03
"""How far other outputs lie, relative to their scale."""
_TYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
"""Those that a loss may compute in, whatever it is given."""


def is_additive(loss: Summed, outputs: Tensor, targets: Tensor) -> bool:
    """Compare a mini-batch with its parts, to the digits that the loss has.

    A term that joins data points may be small beside the loss of one of them.

    Args:
        loss: The sum over a mini-batch.
        outputs: Example outputs, [B, ...].
        targets: Example targets, [B, ...].

    Raises:
        InvalidSpec: If the loss fails.
    """
    if not _agrees(loss, outputs, targets):
        return False
    # Where all outputs are alike, as those of a layer of zeros are, so are their parts'.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(outputs.shape, generator=generator).to(outputs)
    root = float(outputs.detach().double().square().mean().sqrt())
    try:
        nearby = outputs + _NEARBY * max(root, 1e-2) * noise
        return _agrees(loss, nearby, targets)
    except InvalidSpec:
        return True  # it is not defined there


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


def _agrees(loss: Summed, outputs: Tensor, targets: Tensor) -> bool:
    """Compare values; what is not finite tells nothing."""
    try:
        dtype = torch.float64
        whole, narrowest = _totals(loss, outputs, targets, dtype)
    except InvalidSpec:  # it insists on the type that it is used with
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        whole, narrowest = _totals(loss, outputs, targets, dtype)
    tolerance = torch.finfo(narrowest).eps ** 0.7
    for cut in {1, -(-len(outputs) // 2)}:
        first, _ = _totals(loss, outputs[:cut], targets[:cut], dtype)
        second, _ = _totals(loss, outputs[cut:], targets[cut:], dtype)
        for value, one, other in zip(whole, first, second, strict=True):
            size = abs(value) + abs(one) + abs(other)
            if abs(value - one - other) > tolerance * size + 1e-12:
                return False
    return True


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
