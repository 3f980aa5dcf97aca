"""Checks of values that torch's own code makes are passed over while it is traced.

A traced tensor has no values. What is checked holds for the user's data when the module
itself runs on it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
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
    """Let distributions, transformers and Gaussian losses trust what they are given."""
    validated = Distribution._validate_args
    detect, fast = transformer._detect_is_causal_mask, torch.backends.mha
    fused = fast.get_fastpath_enabled()
    Distribution.set_default_validate_args(False)
    transformer._detect_is_causal_mask = _is_causal
    fast.set_fastpath_enabled(False)  # the fused layers have no derivative
    try:
        with _Unchecked():
            yield
    finally:
        Distribution.set_default_validate_args(validated)
        transformer._detect_is_causal_mask = detect
        fast.set_fastpath_enabled(fused)


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
        elif getattr(func, "__name__", "") == "_pack_padded_sequence":
            source = source_here()
            msg = (
                f"pack_padded_sequence ({source}) makes shapes from lengths: run the "
                "layer over padded sequences, and pick each last valid step by gather"
            )
            raise InvalidGraph(msg, source=source)
        return func(*args, **(kwargs or {}))


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
