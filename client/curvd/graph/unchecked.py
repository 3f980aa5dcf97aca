"""Choices and checks that torch's own code makes are left out while it is traced.

A traced tensor has no values. What is checked holds for the user's data when the module
itself runs on it. And what is chosen by sizes, an order of contraction, a kernel from 26 rows
on, would be the choice of one batch size, where any is right.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.modules import transformer
from torch.overrides import TorchFunctionMode

from curvd.errors import InvalidGraph
from curvd.graph.sources import source_here


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Let distributions, transformers and Gaussian losses trust what they are given.

    Products of several factors are made from the left, and distances in one way.
    """
    validated = Distribution._validate_args
    detect, fast = transformer._detect_is_causal_mask, torch.backends.mha
    fused, order = fast.get_fastpath_enabled(), torch.backends.opt_einsum
    ordered = order.enabled
    Distribution.set_default_validate_args(False)
    transformer._detect_is_causal_mask = _is_causal
    fast.set_fastpath_enabled(False)  # the fused layers have no derivative
    order.enabled = False
    try:
        with _Unchecked():
            yield
    finally:
        Distribution.set_default_validate_args(validated)
        transformer._detect_is_causal_mask = detect
        fast.set_fastpath_enabled(fused)
        order.enabled = ordered


def _is_causal(mask: Any, is_causal: bool | None = None, size: Any = None) -> bool:
    """Believe the caller; a causal mask that is not declared is a mask like others."""
    return is_causal is True


class _Unchecked(TorchFunctionMode):
    """Replaces functions whose code looks at values."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch, or what it computes without its checks."""
        if func is F.gaussian_nll_loss:
            func = _gaussian_nll_loss
        elif func is torch.cdist:
            func = _cdist
        elif func in (torch.linalg.multi_dot, torch.chain_matmul):
            func = _multi_dot if func is torch.linalg.multi_dot else _chain_matmul
        elif getattr(func, "__name__", "") == "_pack_padded_sequence":
            source = source_here()
            msg = (
                f"pack_padded_sequence ({source}) makes shapes from lengths: run the "
                "layer over padded sequences, and pick each last valid step by gather"
            )
            raise InvalidGraph(msg, source=source)
        return func(*args, **(kwargs or {}))


def _cdist(
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Tensor:
    """Compute distances in one way, not in another from 26 rows on."""
    if compute_mode.endswith("if_necessary"):
        compute_mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x1, x2, p, compute_mode)


def _multi_dot(tensors: Sequence[Tensor], *, out: None = None) -> Tensor:
    """Multiply from the left, not in the order that takes the fewest operations."""
    return functools.reduce(torch.matmul, tensors)


def _chain_matmul(*tensors: Tensor, out: None = None) -> Tensor:
    """Do the same."""
    return _multi_dot(tensors)


def _gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """Compute what ``F.gaussian_nll_loss`` does; the bound `eps` is no variable."""
    if isinstance(var, float):
        var = var * torch.ones_like(input)
    if var.dim() < input.dim() and var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    var = var + (var.clamp(min=eps) - var).detach()
    loss = 0.5 * (var.log() + (input - target) ** 2 / var)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
