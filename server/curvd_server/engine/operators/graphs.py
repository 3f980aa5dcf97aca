"""Autograd graphs that are kept and walked backwards, and functions that run forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvd_server.engine.program import Rows


def gradient_graph(
    outputs: Tensor, leaves: Sequence[Tensor], weights: Tensor | None = None
) -> Sequence[Tensor | None]:
    """Differentiate so that the result can be differentiated again; None: not used."""
    if not outputs.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(
        outputs, leaves, weights, create_graph=True, allow_unused=True
    )


def edge(tensor: Tensor | None) -> GradientEdge | None:
    """Name a tensor's place in the graph without holding its memory."""
    if tensor is None or not tensor.requires_grad:
        return None
    return get_gradient_edge(tensor)


def pull(
    edges: Sequence[GradientEdge | None],
    leaves: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    batched: bool,
) -> Rows:
    """Walk the kept graph backwards; edges that are None contribute nothing."""
    live = [(e, c) for e, c in zip(edges, cotangents, strict=True) if e is not None]
    if not live:
        return [None] * len(leaves)
    with torch.enable_grad():
        rows: Any = torch.autograd.grad(
            [e for e, _ in live],
            leaves,
            [c for _, c in live],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
    return list(rows)


def run_forward(
    product: Callable[..., tuple[Tensor, ...]],
    tangents: Sequence[Tensor],
    *,
    batched: bool,
) -> Rows:
    """Run a function of tangents that works in forward mode, batched or not."""
    # note: with grad mode off torch picks fused backwards that have no forward mode.
    with torch.enable_grad():
        run = torch.func.vmap(product) if batched else product
        return [row.detach() for row in run(*tangents)]
