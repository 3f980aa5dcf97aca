"""Operators that exist in float32 and float64 only, in sessions of half precision.

Transforms, factorisations and complex numbers: their arguments are widened to float32,
and real results come back in the session's type. What is complex stays complex64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_HALF = frozenset({torch.float16, torch.bfloat16})
_NAMES = frozenset(
    """
    abs angle cholesky_solve complex lu_unpack polar view_as_complex view_as_real
    """.split()
)
_BEGINNINGS = ("_fft_", "_linalg_", "linalg_")


def is_wide(operator: str, session: torch.dtype) -> bool:
    """Tell whether an operator has to be widened.

    Args:
        operator: As the contract names it.
        session: What the session computes in.

    Returns:
        Whether there is no such operator in the session's type.
    """
    name = operator.split(".")[1]
    return session in _HALF and (name in _NAMES or name.startswith(_BEGINNINGS))


def widened(
    function: Callable[..., Any], session: torch.dtype, *arguments: Any, **options: Any
) -> Any:
    """Run an operator in float32.

    Args:
        function: The operator.
        session: The type that real results come back in.
        *arguments: What it is called with.
        **options: The same by name.

    Returns:
        What it returns.
    """
    wide = [_cast(a, session, torch.float32) for a in arguments]
    named = {n: _cast(o, session, torch.float32) for n, o in options.items()}
    return _cast(function(*wide, **named), torch.float32, session)


def _cast(item: Any, old: torch.dtype, new: torch.dtype) -> Any:
    if isinstance(item, list | tuple):
        return [_cast(i, old, new) for i in item]
    return item.to(new) if isinstance(item, Tensor) and item.dtype == old else item
