"""Modules of the same tensors, for what changes a module while it lasts.

A trace exchanges a module's parameters for tensors without values, and sets the mode of its
layers. Its owner may be training it meanwhile, in another thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

from curvd.errors import GradientMismatch

T = TypeVar("T")


def twin_of(module: nn.Module, training: Mapping[str, bool] | None = None) -> nn.Module:
    """Make a module of the same tensors, attributes and hooks.

    Args:
        module: The module; it is not touched.
        training: Modes of layers by name; the others keep theirs.

    Returns:
        The other.
    """
    twins: dict[int, nn.Module] = {}

    def copied(layer: nn.Module) -> nn.Module:
        if id(layer) not in twins:
            twin: nn.Module = layer.__class__.__new__(layer.__class__)
            vars(twin).update(vars(layer))
            twins[id(layer)] = twin
            for name in ("_parameters", "_buffers"):
                vars(twin)[name] = dict(vars(layer)[name])
            children = {n: m and copied(m) for n, m in layer._modules.items()}
            vars(twin)["_modules"] = children
        return twins[id(layer)]

    whole = copied(module)
    for name, layer in whole.named_modules():
        layer.training = (training or {}).get(name, layer.training)
    return whole


def apart(module: nn.Module, work: Callable[[nn.Module], T]) -> T:
    """Do something that changes a module for a while to a twin of it.

    Buffers that a first call registers are the module's afterwards.

    Args:
        module: The module.
        work: Takes the twin. If it fails there, it is done to the module itself: what a
            layer holds, a bound method, say, may call the module and not its twin.

    Returns:
        What it returned.

    Raises:
        GradientMismatch: If `work` does, on the twin: one that does now this, now that is
            not given a second chance.
    """
    try:
        twin = twin_of(module)
        result = work(twin)
    except GradientMismatch:
        raise
    except Exception:  # of the module's own code, or a refusal of ours
        return work(module)
    for layer, other in zip(module.modules(), twin.modules(), strict=False):
        for name, buffer in other._buffers.items():
            if not hasattr(layer, name):
                layer._buffers[name] = buffer
    return result
