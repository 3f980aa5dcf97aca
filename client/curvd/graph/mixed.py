"""Modules whose parameters have several types, computed in one.

A large model is trained with its body in bfloat16, and adapters or a head in float32. A
session computes in one type. Wide enough, that holds every parameter exactly, and what it
computes is the module's function without the roundings between its parts.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from curvd.contract import Dtype
from curvd.errors import InvalidGraph, InvalidSpec

_SESSIONS = {
    Dtype.FLOAT32: torch.float32,
    Dtype.FLOAT64: torch.float64,
    Dtype.BFLOAT16: torch.bfloat16,
}


def types_of(module: nn.Module) -> dict[torch.dtype, str]:
    """List the types of a module's parameters that are floating point.

    Args:
        module: The model.

    Returns:
        The first parameter of each.
    """
    first: dict[torch.dtype, str] = {}
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            first.setdefault(parameter.dtype, name)
    return first


def said(types: dict[torch.dtype, str]) -> str:
    """Name types with a parameter of each, for a message."""
    return ", ".join(
        f"{str(t).removeprefix('torch.')} as {name}" for t, name in types.items()
    )


def common(module: nn.Module, dtype: Dtype | None) -> torch.dtype | None:
    """Find the type in which a module is to be computed that has several.

    Args:
        module: The model.
        dtype: What the caller chose.

    Returns:
        That as torch's; None if the module has one type, and a session has that, too.

    Raises:
        InvalidSpec: If nobody chose, or the chosen type does not hold the parameters.
    """
    types = types_of(module)
    if len(types) < 2 and not {*types} - {*_SESSIONS.values()}:
        return None
    if dtype is None:
        several = "several types" if len(types) > 1 else "a type that no session has"
        msg = (
            f"the module's parameters have {several} ({said(types)}), and a session "
            "computes in one: name it, dtype='float32' or 'float64'"
        )
        raise InvalidSpec(msg, types=len(types))
    chosen = _SESSIONS[dtype]
    rounded = {t: n for t, n in types.items() if not _holds(chosen, t)}
    if rounded:
        msg = (
            f"dtype {dtype.value} would round the module's parameters of type "
            f"{said(rounded)}: name one that holds all of them, such as F32"
        )
        raise InvalidSpec(msg, dtype=dtype)
    return chosen


def in_one_type(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a module with all that is floating point in one type.

    Args:
        module: The model; it is not touched.
        dtype: Wide enough for its parameters.

    Returns:
        The copy; parameters and buffers that need no conversion are the same.

    Raises:
        InvalidGraph: If it cannot be copied.
    """
    alike: dict[int, Any] = {}
    for parameter in module.parameters():
        alike[id(parameter)] = _converted(parameter, dtype)
    for buffer in module.buffers():
        alike[id(buffer)] = _converted(buffer, dtype)
    try:
        return copy.deepcopy(module, alike)
    except Exception as error:  # of the module's own code
        why = str(error).strip().partition("\n")[0][:200]
        msg = (
            "a module of several types is copied to be computed in one, and copy.deepcopy "
            f"fails on this one ({type(error).__name__}: {why})"
        )
        raise InvalidGraph(msg) from error


def widened(tensors: Any, dtype: torch.dtype | None) -> Any:
    """Convert the inputs and targets that are floating point, and fit.

    Args:
        tensors: In whatever they are held.
        dtype: What holds the parameters; None: nothing is converted.

    Returns:
        The same with other tensors; those that would be rounded stay as they are.
    """
    if dtype is None:
        return tensors
    return pytree.tree_map_only(Tensor, lambda t: _converted(t, dtype), tensors)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Tell whether each number of a type is one of another."""
    return torch.promote_types(wide, narrow) == wide


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point() or not _holds(dtype, tensor.dtype):
        return tensor
    if tensor.dtype == dtype:
        return tensor
    wide = tensor.detach().to(dtype)
    if isinstance(tensor, nn.Parameter):
        wide = nn.Parameter(wide, tensor.requires_grad)
        for hook in (tensor._backward_hooks or {}).values():
            wide.register_hook(hook)  # type: ignore[no-untyped-call]
    return wide
