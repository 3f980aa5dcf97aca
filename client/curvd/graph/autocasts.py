"""What trainers of mixed precision wrap around ``forward``, and modules without it.

Under autocast a module's parameters stay what they are, and so does the function that a session
has: that of the module as it computes alone. Some trainers enter the context around their calls,
which leaves no trace. accelerate's ``prepare``, which the Trainer of transformers uses, gives the
module a ``forward`` that calls the former one in `torch.autocast`, and converts what it returns.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.amp import autocast_mode

from curvd.tensors import loaded

_KEPT = "_original_forward"
"""Where accelerate keeps the former ``forward``."""
_OURS = frozenset({"forward", _KEPT, "_is_accelerate_prepared"})
"""Attributes that it sets."""


def _nothing() -> None:
    """Stand for a forward."""


_decorator: Any = autocast_mode.autocast_decorator
_DECORATED = _decorator(None, _nothing).__code__
"""Of each function that torch.autocast makes as a decorator."""


def attributes_of(layer: nn.Module) -> dict[str, Any]:
    """List a layer's attributes as they are without autocast around its ``forward``.

    Args:
        layer: The layer; its children are not looked at.

    Returns:
        Values by name; the layer's own dictionary if nothing was wrapped.
    """
    held = vars(layer)
    forward = held.get("forward")
    inner = _function(forward, layer)
    is_bound = inner is not forward
    is_wrapped = False
    while (within := _wrapped(inner)) is not None:
        inner, is_wrapped = _function(within, layer), True
        is_bound |= inner is not within
    if not is_wrapped:
        return held
    kept = held.get(_KEPT)
    is_kept = _function(kept, layer) is inner
    ours = _OURS if is_kept else {"forward"}
    own = {name: value for name, value in held.items() if name not in ours}
    if not (is_bound and inner is type(layer).forward):
        bound = types.MethodType(inner, layer) if is_bound else inner
        own["forward"] = kept if is_kept else bound
    return own


def _function(method: Any, layer: nn.Module) -> Any:
    """Find the function of a layer's own method; anything else is what it is."""
    is_own = isinstance(method, types.MethodType) and method.__self__ is layer
    return method.__func__ if is_own else method


def without_autocast(twin: nn.Module) -> nn.Module:
    """Take autocast from around the ``forward`` of each layer.

    Args:
        twin: A module that nobody else has.

    Returns:
        The same.
    """
    for layer in twin.modules():
        _set(vars(layer), attributes_of(layer))
    return twin


@contextlib.contextmanager
def alone(module: nn.Module) -> Iterator[None]:
    """Have a module compute without autocast around the ``forward`` of its layers.

    Args:
        module: The caller's; what was around is there again afterwards.

    Yields:
        Nothing.
    """
    before = [(vars(layer), dict(vars(layer))) for layer in module.modules()]
    without_autocast(module)
    try:
        yield
    finally:
        for held, was in before:
            _set(held, was)


def _set(held: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    """Make accelerate's attributes of a layer what they are among others."""
    for name in _OURS:
        if name not in wanted:
            held.pop(name, None)
        elif held.get(name) is not wanted[name]:
            held[name] = wanted[name]


def _wrapped(function: Any) -> Any:
    """Find what a function calls under autocast, or whose results it converts; None: neither."""
    if not isinstance(function, types.FunctionType):
        return None
    within: Any = getattr(function, "__wrapped__", None)
    if function.__code__ is _DECORATED:
        return within
    accelerate = loaded("accelerate.utils.operations")
    if (
        accelerate is not None
        and function.__module__ == accelerate.__name__
        and type(within) is accelerate.ConvertOutputsToFp32
    ):
        return within.model_forward
    return None
