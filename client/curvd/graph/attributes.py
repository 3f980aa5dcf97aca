"""What a module and its layers hold beside tensors, noted so that a change of it shows."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvd.graph.autocasts import attributes_of
from curvd.graph.twins import in_slots

MISSING = object()
"""In the place of an attribute that is not there."""
_TORCHS = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weight_refs"}
"""Attributes that torch looks after itself."""
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
GRADIENT_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""Of parameters: no graph shows what they do, so that gradients are compared."""
_ATOMS = frozenset({
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
})
_DEPTH = 4
"""Of containers in containers that are looked into."""
_ELEMENTS = 1 << 20
"""Of a tensor that is copied; one that has more is known by its place and its version."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Other:
    """What has no value to compare: the same only if it is the same object."""

    kind: type
    identity: int

    def __repr__(self) -> str:
        return f"<{self.kind.__name__}>"


class NotedLayer:
    """One layer as it was, by identity where that is enough: the quick look.

    It keeps nothing alive that is not the caller's plain value.
    """

    __slots__ = (
        *("_children", "_class", "_layer", "_mutable", "_parameters", "_plain"),
        *("_size", "_tensors"),
    )

    def __init__(self, layer: nn.Module) -> None:
        held = vars(layer)
        own = {n: v for n, v in held.items() if n not in _TORCHS}
        self._layer, self._size = weakref.ref(layer), len(held)
        self._children = tuple(map(id, held["_modules"].values()))
        self._plain = [(n, v) for n, v in own.items() if _is_plain(v)]
        self._mutable = [(n, _noted(v)) for n, v in own.items() if not _is_plain(v)]
        self._mutable += [(n, _hooks(held[n])) for n in HOOKS if held[n]]
        self._tensors = _gradient_hooks(layer)
        self._class = [(name, _noted(value)) for name, value in _of_class(layer)]
        self._parameters = tuple(map(id, held["_parameters"].values()))

    def is_of(self, module: nn.Module) -> bool:
        """Tell whether this is of a module."""
        return self._layer() is module

    def is_as_before(self) -> bool:
        """Tell whether nothing has changed; where that takes longer to say, it has."""
        layer = self._layer()
        if layer is None:
            return False
        held = vars(layer)
        for name, value in self._plain:
            if held.get(name, MISSING) is not value:
                return False
        for name, noted in self._mutable:
            if name in HOOKS:
                now = _hooks(held[name])
            else:
                now = _noted(held.get(name, MISSING))
            if not same(noted, now):
                return False
        hooks = sum(bool(held[name]) for name in HOOKS)
        return (
            len(held) == self._size
            and same(self._tensors, _gradient_hooks(layer))
            and self._parameters == tuple(map(id, held["_parameters"].values()))
            and all(
                same(noted, _noted(now))
                for (_, noted), (_, now) in zip(
                    self._class, _of_class(layer), strict=False
                )
            )
            and hooks == sum(name in HOOKS for name, _ in self._mutable)
            and self._children == tuple(map(id, held["_modules"].values()))
        )


def _is_plain(value: Any) -> bool:
    """Tell what cannot change without becoming another object."""
    kind = type(value)
    return kind in _ATOMS or (kind is tuple and all(type(v) in _ATOMS for v in value))


def _hooks(registered: Mapping[Any, Any]) -> list[Any]:
    return [_noted(hook) for hook in registered.values()]


def _gradient_hooks(layer: nn.Module) -> dict[str, list[Any]]:
    """List the hooks on the gradients of a layer's own parameters."""
    return {
        f"{name}.{kind}": _hooks(registered)
        for name, parameter in layer._parameters.items()
        for kind in GRADIENT_HOOKS
        if parameter is not None and (registered := getattr(parameter, kind, None))
    }


def attributes(module: nn.Module) -> dict[str, Any]:
    """List what a module and its layers hold beside tensors of the state dict.

    Args:
        module: The module.

    Returns:
        What was noted of each, by name.
    """
    found: dict[str, Any] = {}
    for place, layer in module.named_modules():
        prefix = f"{place}." if place else ""
        found[f"{prefix}__class__"] = _Other(type(layer), id(type(layer)))
        held = attributes_of(layer)
        for name, value in held.items():
            if name not in _TORCHS:
                found[prefix + name] = value if type(value) in _ATOMS else _noted(value)
        for name in HOOKS:
            if held[name]:
                found[prefix + name] = _hooks(held[name])
        for name, registered in _gradient_hooks(layer).items():
            found[prefix + name] = registered
        for name, value in _of_class(layer):
            found[prefix + name] = value if type(value) in _ATOMS else _noted(value)
    found["tied"] = [names for names in _names_of_each(module) if len(names) > 1]
    return found


def _of_class(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """List what a layer has by its class: values in slots, numbers, and its ``forward``."""
    yield "forward of its class", type(layer).forward
    yield from in_slots(layer)
    for kind in type(layer).__mro__:
        if kind.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name, value in list(vars(kind).items()):
            if type(value) in _ATOMS and not name.startswith("__"):
                yield name, value


def _names_of_each(module: nn.Module) -> list[list[str]]:
    """List the names of each parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _noted(value: Any, depth: int = _DEPTH) -> Any:
    """Note a value so that a change of it in place shows."""
    if type(value) in _ATOMS:
        return value
    if isinstance(value, Tensor):
        if value.numel() <= _ELEMENTS:
            return value.detach().clone()
        return (value.data_ptr(), value._version, tuple(value.shape))
    if depth:
        if isinstance(value, list | tuple):
            return [_noted(item, depth - 1) for item in value]
        if isinstance(value, Mapping):
            return {k: _noted(v, depth - 1) for k, v in value.items()}
        if isinstance(value, Collection) and isinstance(value, set | frozenset):
            return frozenset(v for v in value if type(v) in _ATOMS)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {k: _noted(v, depth - 1) for k, v in _fields(value)}
    if type(value).__module__ == "numpy":
        return value.copy() if hasattr(value, "copy") else value
    return _Other(type(value), id(value))


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        yield field.name, getattr(value, field.name, None)


def same(a: Any, b: Any) -> bool:
    """Compare what was noted.

    Args:
        a: Of one attribute.
        b: Of it at another time.

    Returns:
        Whether it is as it was.
    """
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype
        return alike and bool(torch.equal(a.cpu(), b.cpu()))
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if type(a).__module__ == "numpy":
        return bool(a.shape == b.shape and a.dtype == b.dtype and (a == b).all())
    return bool(a == b) or (a != a and b != b)
