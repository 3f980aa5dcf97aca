"""Modules of the same tensors, for what changes a module while it lasts.

A trace exchanges a module's parameters for tensors without values, and sets the mode of its
layers. Its owner may be training it meanwhile, in another thread.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvd.graph.autocasts import attributes_of, without_autocast
from curvd.graph.places import reaches

T = TypeVar("T")
_OBJECTS, _BYTES = 20_000, 16 << 20
"""Most that is copied with a module, beside its tensors: who has more holds data, or a trainer."""


def twin_of(module: nn.Module, training: Mapping[str, bool] | None = None) -> nn.Module:
    """Make a module of the same tensors, attributes and hooks, without autocast around it.

    Args:
        module: The module; it is not touched.
        training: Modes of layers by name; the others keep theirs.

    Returns:
        The other.
    """
    twins: dict[int, nn.Module] = {}

    def copied(layer: nn.Module) -> nn.Module:
        if id(layer) not in twins:
            twin: nn.Module = object.__new__(layer.__class__)
            vars(twin).update(attributes_of(layer))
            for name, value in in_slots(layer):
                object.__setattr__(twin, name, value)
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


def in_slots(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """List what a layer holds in slots of its classes, by name.

    Args:
        layer: The layer.

    Yields:
        Name and value, of those that have one.
    """
    for kind in type(layer).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not name.startswith("__") and hasattr(layer, name):
                yield name, getattr(layer, name)


def twin_apart(
    module: nn.Module, training: Mapping[str, bool] | None = None
) -> nn.Module | None:
    """Make a twin whose code does not reach the module.

    Where it would by another way than from a layer to its children, a bound method or a
    parent in a list, all is copied that leads there, and only tensors stay the same.

    Args:
        module: The module; it is not touched.
        training: Modes of layers by name; the others keep theirs.

    Returns:
        The other; None: there is none, because a global leads to the module, or something
        cannot be copied.
    """
    try:
        twin = twin_of(module, training)
        is_reached = reaches(twin, module)
        if is_reached is False:
            return twin
        twin = without_autocast(_copied(module))
        if is_reached and reaches(twin, module):
            return None
    except Exception:  # of classes that are not made, or not copied, in this way
        return None
    for name, layer in twin.named_modules():
        layer.training = (training or {}).get(name, layer.training)
    return twin


def _copied(module: nn.Module) -> nn.Module:
    """Copy a module and what it holds, with the same tensors.

    Raises:
        ValueError: If it holds too much: data, or a trainer with its optimisers.
    """
    held = (
        value
        for layer in module.modules()
        for value in (*vars(layer).values(), *layer._parameters.values())
    )
    tensors = chain(held, module.buffers())
    kept = {id(t): t for t in tensors if isinstance(t, Tensor)}
    left_objects, left_bytes = _OBJECTS, _BYTES
    known, ahead = {*kept}, deque[Any]([module])
    while ahead:
        item = ahead.pop()
        if id(item) in known:
            continue
        known.add(id(item))
        left_objects -= 1
        left_bytes -= getattr(item, "nbytes", 0)
        if left_objects < 0 or left_bytes < 0:
            msg = "what the module holds is not to be copied"
            raise ValueError(msg)
        ahead.extend(_parts(item))
    return copy.deepcopy(module, dict[int, Any](kept))


def _parts(item: Any) -> Iterable[Any]:
    """List what is copied with an object, as far as that has parts."""
    if isinstance(item, str | bytes | int | float | type | types.ModuleType):
        return ()
    if isinstance(item, types.FunctionType | types.BuiltinFunctionType):
        return ()  # these are never copied
    if isinstance(item, Mapping):
        return (*item.keys(), *item.values())
    if isinstance(item, list | tuple | set | frozenset | deque):
        return item
    if isinstance(item, types.MethodType):
        return (item.__self__,)
    return (*getattr(item, "__dict__", {}).values(),)


def without_gradients(twin: nn.Module) -> nn.Module:
    """Give a twin parameters of its own, of the same memory.

    A trace reads ``.grad``, and torch does not survive that another thread frees it then.

    Args:
        twin: From `twin_apart`; hooks of its parameters stay behind.

    Returns:
        The same.
    """
    own: dict[int, nn.Parameter] = {}
    for layer in twin.modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                alike = nn.Parameter(parameter.detach(), parameter.requires_grad)
                layer._parameters[name] = own.setdefault(id(parameter), alike)
    return twin


@contextlib.contextmanager
def in_types(module: nn.Module, types: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Give a module's tensors other types for a while.

    Args:
        module: The module; the tensors that have other types are its own again afterwards.
        types: Floating point types of parameters and buffers, by name.

    Yields:
        Nothing.
    """
    homes: dict[str, list[dict[str, Any]]] = {
        f"{place}." if place else "": [layer._parameters, layer._buffers]
        for place, layer in module.named_modules(remove_duplicate=False)
    }
    before = [(held, dict(held)) for pair in homes.values() for held in pair]
    made: dict[int, Tensor] = {}
    try:
        for prefix, pair in homes.items():
            for held in pair:
                for name, tensor in held.items():
                    kind = types.get(prefix + name)
                    if tensor is not None and kind not in (None, tensor.dtype):
                        other = made.get(id(tensor), tensor.detach().to(kind))
                        if isinstance(tensor, nn.Parameter) and id(tensor) not in made:
                            other = nn.Parameter(other, tensor.requires_grad)
                        held[name] = made[id(tensor)] = other
        yield
    finally:
        for held, was in before:
            held.update(was)


def types_by_name(module: nn.Module) -> dict[str, torch.dtype]:
    """List the types of a module's parameters and buffers that are floating point, by name."""
    tensors = chain(
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    )
    return {name: t.dtype for name, t in tensors if t.is_floating_point()}


def apart(
    module: nn.Module,
    work: Callable[[nn.Module], T],
    compare: Callable[[nn.Module, nn.Module], None] | None = None,
) -> T:
    """Do something that changes a module for a while to a twin of it.

    What a first call makes, a layer, a buffer, a table, is the module's afterwards, as after
    any call: it may have been drawn at random, and the next call would make another.

    Args:
        module: The module.
        work: Takes the twin; the module itself, if its code can reach that from every twin: a
            layer that writes to its parent, say, does not write to the twin.
        compare: Takes the module and the twin afterwards, if there was one.

    Returns:
        What it returned.
    """
    twin = twin_apart(module)
    if twin is None:
        return work(module)
    names = [name for name, _ in module.named_modules()]
    result = work(twin)
    for name in names:
        layer, other = vars(module.get_submodule(name)), vars(twin.get_submodule(name))
        for kind in ("_parameters", "_buffers", "_modules"):
            _hand_over(other[kind], layer[kind])
        _hand_over(other, layer)
    if compare is not None:
        compare(module, twin)
    return result


def _hand_over(made: Mapping[str, Any], held: MutableMapping[str, Any]) -> None:
    """Add what is not there."""
    for name, value in made.items():
        if value is not None and held.get(name) is None:
            held[name] = value
