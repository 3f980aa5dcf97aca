"""A loss that holds what is trained, such as a penalty on the model's parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvd.errors import InvalidSpec
from curvd.graph.seen import leaves

_CLOSE = 1e-4
"""Rounding of float32 is far below."""


def check_held(
    loss: Callable[[Tensor, Tensor], Any],
    model: nn.Module | None,
    outputs: Tensor,
    targets: Tensor,
    constants: Mapping[str, Tensor],
) -> None:
    """Refuse a loss that holds trained tensors, which would be constants on a server.

    Args:
        loss: The caller's; if it is a module, its own parameters may be constants.
        model: The model whose outputs they are; None: unknown.
        outputs: Some, [B, ...].
        targets: Some, [B, ...].
        constants: The constants of the loss's graph, as far as it is known.

    Raises:
        InvalidSpec: With their names, and what to say instead of a penalty.
    """
    parameters = model.named_parameters() if model is not None else ()
    named = {n: p for n, p in parameters if p.requires_grad}
    names = {id(p): name for name, p in named.items()}
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = loss(leaf, targets)
    total = result[0] if isinstance(result, tuple | list) and result else result
    if not isinstance(total, Tensor) or total.dim():
        return  # others say so
    holder = loss.parameters() if isinstance(loss, nn.Module) else ()
    own = {id(p) for p in holder} - set(names)
    reached = [t for t in leaves(total) if t is not leaf and id(t) not in own]
    memory = {p.untyped_storage().data_ptr(): name for name, p in named.items()}
    there = (t.untyped_storage().data_ptr() for t in constants.values())
    held = {names.get(id(t), f"a tensor of shape {list(t.shape)}") for t in reached}
    held |= {memory[pointer] for pointer in there if pointer in memory}
    if not held:
        return
    coefficients = _decay(total, {names[id(t)]: t for t in reached if id(t) in names})
    msg = (
        f"the loss holds {', '.join(sorted(held))}, which is trained. A loss is a "
        "function of outputs and targets: on a server these would be constants, without "
        "their derivative, that no update moves. Take the penalty out of the loss"
        f"{_advice(coefficients, len(named))}"
    )
    raise InvalidSpec(msg, parameters=", ".join(sorted(held)))


def _decay(total: Tensor, held: Mapping[str, Tensor]) -> dict[str, float] | None:
    """Find c where a penalty is ``c/2 |p|^2``, whose gradient is ``c p``.

    Returns:
        c by name; None if it is another penalty.
    """
    if not held:
        return None
    at = list(held.values())
    rows = torch.autograd.grad(total, at, create_graph=True, materialize_grads=True)
    along = sum((p * row).sum() for p, row in zip(at, rows, strict=True))
    if not isinstance(along, Tensor) or not along.requires_grad:
        return None
    twice = torch.autograd.grad(along, at, materialize_grads=True)
    found = {}
    for (name, p), row, slope in zip(held.items(), rows, twice, strict=True):
        p, row = p.detach(), row.detach()
        square = float(p.square().sum())
        found[name] = c = float((p * row).sum()) / square if square else 0.0
        # note: the gradient of |p| points along p, too, but does not grow with it.
        off = max(float((row - c * p).norm()), float((slope - 2 * row).norm()))
        if not (c > 0 and off <= _CLOSE * float(row.norm())):
            return None
    return found


def _advice(coefficients: dict[str, float] | None, parameters: int) -> str:
    if coefficients is None:
        return (
            "; weight_decay= adds c/2 |p|^2 to the objective, for all parameters or some "
            "of them. Another penalty is yours to add, with its gradient and Hessian, to "
            "what the session computes"
        )
    each: dict[str, Any] = {
        n: float(f"{c:.6g}") for n, c in sorted(coefficients.items())
    }
    alike = len(set(each.values())) == 1 and len(each) == parameters
    said = next(iter(each.values())) if alike else each
    return (
        f" and say weight_decay={said} instead, which adds c/2 |p|^2 to the objective"
    )
