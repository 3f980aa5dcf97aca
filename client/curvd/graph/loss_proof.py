"""Proof that a graph is the loss that it was exported from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from curvd.errors import GradientMismatch
from curvd.graph.compared import differing, shown_size, size_of
from curvd.graph.eager import Digits
from curvd.graph.evaluate import evaluate, types_in
from curvd.v1 import graph_pb2 as graph_pb

_FACTORS = (0.03, 30.0, -1.0)
"""By which outputs are multiplied, beside those that are given and some nearby."""
_NEARBY = 0.03
"""How far these lie, relative to their scale."""


def prove_loss(
    wrapper: nn.Module,
    graph: graph_pb.Graph,
    tensors: Mapping[str, Tensor],
    outputs: Tensor,
    targets: Tensor,
) -> None:
    """Compare a loss with its graph, at outputs of very different sizes.

    Args:
        wrapper: Calls the loss; returns its sum, and perhaps a weight.
        graph: What was exported.
        tensors: Its constants by name.
        outputs: Example outputs, [B, ...].
        targets: Example targets, [B, ...].

    Raises:
        GradientMismatch: If values or gradients differ.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(outputs.shape, generator=generator).to(outputs)
    root = float(outputs.double().square().mean().sqrt())
    constants = [tensors[described.names[0]] for described in graph.tensors]
    nearby = outputs + _NEARBY * max(root, 1e-2) * noise
    usual = 0.0
    for z in (outputs, nearby, *(factor * nearby for factor in _FACTORS)):
        try:
            pairs, narrowest = _of_loss(wrapper, graph, constants, z, targets)
        except Exception:
            if z is outputs:
                raise
            continue  # it is not defined there
        wrong = differing(pairs, narrowest, usual)
        size = size_of(pairs)
        usual = max(usual, size) if math.isfinite(size) else usual
        if wrong:
            sizes = ", ".join(f"{n} {shown_size(size)}" for n, size in wrong.items())
            msg = (
                "what the loss returns and its .backward() computes is not what was "
                f"exported: {sizes}. A server differentiates what the loss computes, and "
                "knows nothing else: write it with torch's operators, without hooks, a "
                "backward of its own, or anything that changes between two calls"
            )
            raise GradientMismatch(
                msg, parameters="the loss", largest=max(wrong.values())
            )


def _of_loss(
    wrapper: nn.Module,
    graph: graph_pb.Graph,
    constants: Sequence[Tensor],
    outputs: Tensor,
    targets: Tensor,
) -> tuple[dict[str, tuple[Tensor, Tensor]], torch.dtype]:
    """Differentiate a loss and its graph by the outputs, in float64 where it can."""
    types, own = types_in(graph), outputs.dtype
    wide = torch.float64
    ways = [(wide, _wide(targets, wide)), (own, _wide(targets, own))]
    ways.append((own, targets))  # as the caller has both
    for last, (dtype, y) in zip((False, False, True), ways, strict=True):
        leaf = _wide(outputs, dtype).requires_grad_()
        digits = Digits(dtype, types)
        try:
            with torch.enable_grad(), digits:
                total, *weight = wrapper((leaf, y), {})
            slope = _slope(total, leaf)  # torch's own may insist on one type, too
        except Exception:
            if last:
                raise
            continue
        if not total.requires_grad:
            raise _cut_off()
        with torch.enable_grad():
            given = [_wide(t, dtype) for t in constants]
            other = leaf.detach().requires_grad_()  # without the hooks of the first
            want, *counted = evaluate(graph, (other, y), given)
        pairs = {
            "its value": (total, want),
            "its gradient": (slope, _slope(want, other)),
        }
        if weight:
            pairs["its weight"] = weight[0], counted[0]
        return pairs, digits.narrowest
    raise AssertionError


def _cut_off() -> GradientMismatch:
    """Say that nothing can be learned from a loss."""
    msg = (
        "the loss has no derivative in the outputs: detach(), torch.no_grad(), .item() "
        "or a backward of its own cuts it off"
    )
    return GradientMismatch(msg, parameters="the loss")


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor


def _slope(total: Tensor, leaf: Tensor) -> Tensor:
    if not total.requires_grad:
        return torch.zeros_like(leaf)
    (row,) = torch.autograd.grad(total, leaf, allow_unused=True)
    return torch.zeros_like(leaf) if row is None else row
