"""Modules without what trains or compiles them: DDP, DataParallel, torch.compile."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def unwrapped(value: Any) -> Any:
    """Take a module out of its wrappers.

    Args:
        value: A module, wrapped as often as you like, or anything else.

    Returns:
        The module within; what is no wrapper as it is.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return value
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(value, parallel):
            value = value.module
        elif _is_compiled(value):
            value = value._orig_mod
        else:
            return value


def state_of(value: Any) -> Any:
    """Give what has parameters by name the shape of a state dict.

    Args:
        value: A module, wrapped or not, or anything else.

    Returns:
        A module's state dict; anything else as it is.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.nn.Module):
        return value
    state: Mapping[str, Any] = unwrapped(value).state_dict()
    return state


def _is_compiled(value: Any) -> bool:
    """Tell what torch.compile returns; its class is imported with the compiler only."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(value, dynamo.OptimizedModule)
