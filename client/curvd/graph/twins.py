"""Modules of the same tensors, for what changes a module while it lasts.

A trace exchanges a module's parameters for tensors without values, and sets the mode of its
layers. Its owner may be training it meanwhile, in another thread.
"""

from __future__ import annotations

import functools
import itertools
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, TypeVar

from torch import Tensor, nn

from curvd.errors import GradientMismatch

T = TypeVar("T")
_DEPTH, _SHOWN = 4, 100
"""Of what holds one another, and of each's parts: so far references are followed."""


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

    What a first call makes, a layer, a buffer, a table, is the module's afterwards, as after
    any call: it may have been drawn at random, and the next call would make another.

    Args:
        module: The module.
        work: Takes the twin. If it fails there, and a layer holds something that refers to
            the module, a bound method, say, it is done to the module itself: that is
            what such code calls.

    Returns:
        What it returned.

    Raises:
        GradientMismatch: If `work` does, on the twin: one that does now this, now that is
            not given a second chance.
    """
    names = [name for name, _ in module.named_modules()]
    try:
        twin = twin_of(module)
    except Exception:  # of classes that are not made in this way
        return work(module)
    try:
        result = work(twin)
    except GradientMismatch:
        raise
    except Exception:  # of the module's own code, or a refusal of ours
        if not _holds_itself(module):
            raise
        return work(module)
    for name in names:
        layer, other = vars(module.get_submodule(name)), vars(twin.get_submodule(name))
        for kind in ("_parameters", "_buffers", "_modules"):
            _hand_over(other[kind], layer[kind])
        _hand_over(other, layer)
    return result


def _hand_over(made: Mapping[str, Any], held: MutableMapping[str, Any]) -> None:
    """Add what is not there."""
    for name, value in made.items():
        if value is not None and held.get(name) is None:
            held[name] = value


def _holds_itself(module: nn.Module) -> bool:
    """Tell whether what a layer holds refers to the module or its layers."""
    own = set(map(id, module.modules()))

    def refers(item: Any, depth: int = _DEPTH) -> bool:
        if isinstance(item, nn.Module):
            return id(item) in own
        return depth > 0 and any(refers(part, depth - 1) for part in _parts(item))

    return any(
        refers(value)
        for layer in module.modules()
        for name, value in vars(layer).items()
        if name != "_modules"
    )


def _parts(item: Any) -> Iterable[Any]:
    """List what something holds, as far as it may be code or refer to modules."""
    if isinstance(item, Tensor | type | types.ModuleType):
        return ()
    if isinstance(item, dict):
        return itertools.islice(item.values(), _SHOWN)
    if isinstance(item, list | tuple | set):
        return itertools.islice(item, _SHOWN)
    if isinstance(item, types.MethodType):
        return (item.__self__,)
    if isinstance(item, functools.partial):
        return (item.func, *item.args, *item.keywords.values())
    if isinstance(item, types.FunctionType):
        return [c.cell_contents for c in item.__closure__ or () if _is_filled(c)]
    if isinstance(item, weakref.ref):
        return (item(),)
    held = getattr(item, "__dict__", None)
    return itertools.islice(held.values(), _SHOWN) if type(held) is dict else ()


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a variable that has no value yet
        return False
