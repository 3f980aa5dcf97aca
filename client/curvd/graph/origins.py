"""What a module was when it was exported, beside its parameters.

A training moves more than a state dict holds: buffers that are not persistent, and
attributes (a temperature, a tensor, a flag). A graph has the former as tensors, which travel
with an update, and the latter as constants, which nothing moves. So attributes are noted at
the export and compared when the module itself is given for an update. One that has changed
is looked at closely: the module is exported once more, and if that makes the same graph, a
counter of steps, say, nothing depends on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvd.errors import CurvdError, InvalidSpec
from curvd.graph.autocasts import attributes_of
from curvd.graph.loss_origin import LossOrigin
from curvd.graph.manifest import CONSTANTS
from curvd.graph.twins import (
    in_slots,
    in_types,
    twin_apart,
    types_of,
    without_gradients,
)
from curvd.v1 import graph_pb2 as graph_pb

Traced = tuple[graph_pb.Graph, Mapping[str, Tensor]]
_TORCHS = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weight_refs"}
"""Attributes that torch looks after itself."""
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_GRADIENT_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
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
_SHOWN = 5
"""Attributes that a message names."""
_MISSING, _THERE = object(), object()


@dataclasses.dataclass(frozen=True, slots=True)
class _Other:
    """What has no value to compare: the same only if it is the same object."""

    kind: type
    identity: int

    def __repr__(self) -> str:
        return f"<{self.kind.__name__}>"


class _Layer:
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
        self._mutable += [(n, _hooks(held[n])) for n in _HOOKS if held[n]]
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
            if held.get(name, _MISSING) is not value:
                return False
        for name, noted in self._mutable:
            if name in _HOOKS:
                now = _hooks(held[name])
            else:
                now = _noted(held.get(name, _MISSING))
            if not _same(noted, now):
                return False
        hooks = sum(bool(held[name]) for name in _HOOKS)
        return (
            len(held) == self._size
            and _same(self._tensors, _gradient_hooks(layer))
            and self._parameters == tuple(map(id, held["_parameters"].values()))
            and all(
                _same(noted, _noted(now))
                for (_, noted), (_, now) in zip(
                    self._class, _of_class(layer), strict=False
                )
            )
            and hooks == sum(name in _HOOKS for name, _ in self._mutable)
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
        for kind in _GRADIENT_HOOKS
        if parameter is not None and (registered := getattr(parameter, kind, None))
    }


class Origin:
    """A module as it was exported, for updates of a session that are given a module.

    Args:
        module: The module.
        traced: Exports a module like it, with the same examples; if it is told so, it proves
            that gradients are those of the graph.
    """

    def __init__(
        self, module: nn.Module, traced: Callable[[nn.Module, bool], Traced]
    ) -> None:
        self._seen = _attributes(module)
        self._layers: list[_Layer] = []
        self._training = {n: m.training for n, m in module.named_modules()}
        self._types = types_of(module)
        self._traced = traced
        self._graph, self._constants = graph_pb.Graph(), dict[str, Tensor]()
        self.loss: LossOrigin | None = None
        """The loss as it was, if it is the caller's own."""

    def exported(self, graph: graph_pb.Graph, tensors: Mapping[str, Tensor]) -> Origin:
        """Note what was exported.

        Args:
            graph: The graph.
            tensors: Its tensors by name.

        Returns:
            This.
        """
        self._graph, self._constants = graph, _constants(tensors)
        return self

    def state(self, module: nn.Module) -> dict[str, Any]:
        """Give the values that an update takes, those of passing buffers included.

        Args:
            module: The module, without wrappers.

        Returns:
            Its state dict, and the buffers of the graph that it leaves out.

        Raises:
            InvalidSpec: If an attribute has changed that the graph holds as a constant, or
                the loss.
        """
        self._check(module)
        if self.loss is not None:
            self.loss.check()
        state: dict[str, Any] = dict(module.state_dict())
        names = {name for tensor in self._graph.tensors for name in tensor.names}
        for name, buffer in module.named_buffers(remove_duplicate=False):
            if name in names:
                state.setdefault(name, buffer.detach())
        own = (
            t.names for t in self._graph.tensors if t.names[0] not in self._constants
        )
        gone = [tied[0] for tied in own if not any(name in state for name in tied)]
        if gone:
            raise _refusal({name: (_THERE, _MISSING) for name in gone})
        return state

    def _check(self, module: nn.Module) -> None:
        known = bool(self._layers) and self._layers[0].is_of(module)
        if known and all(map(_Layer.is_as_before, self._layers)):
            return
        now = _attributes(module)
        changed = {
            name: (self._seen.get(name, _MISSING), now.get(name, _MISSING))
            for name in {**self._seen, **now}
            if not _same(self._seen.get(name, _MISSING), now.get(name, _MISSING))
        }
        hooked = any(name.endswith(_HOOKS + _GRADIENT_HOOKS) for name in changed)
        if changed and not self._does_the_same(module, prove=hooked):
            raise _refusal(_other_types(self._types, types_of(module)) | changed)
        self._seen = now
        self._layers = [_Layer(layer) for layer in module.modules()]

    def _does_the_same(self, module: nn.Module, *, prove: bool) -> bool:
        if prove and self._types != types_of(module):
            return False  # hooks are of parameters, and these would be others
        twin = twin_apart(module, self._training)
        given, modes = module, _in_modes(module, self._training)
        if twin is not None:
            given = twin if prove else without_gradients(twin)  # hooks are theirs
            modes = _in_modes(twin, {})
        try:
            # A trainer may convert a module; the session computes in the type that it had.
            with modes, in_types(given, self._types):
                graph, tensors = self._traced(given, prove)
        except CurvdError:
            return False
        constants = _constants(tensors)
        return (
            _without_roles(graph) == _without_roles(self._graph)
            and list(constants) == list(self._constants)
            and all(_same(constants[n], t) for n, t in self._constants.items())
        )


def _refusal(changed: Mapping[str, tuple[Any, Any]]) -> InvalidSpec:
    parts = [one for name, pair in changed.items() for one in _parts(name, *pair)]
    shown = ", ".join(
        f"{name} {_changed(_said(old), _said(new))}"
        for name, old, new in parts[:_SHOWN]
    )
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    msg = (
        f"the module has changed in what no update moves: {shown}{more}. The session's graph "
        "has them as constants: make a new session (session_for), or make a number that "
        "moves in training a buffer (register_buffer), which travels with an update"
    )
    return InvalidSpec(msg, attributes=", ".join(changed))


def _parts(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """List what of an attribute has changed: items of a dictionary, or the whole."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        yield name, old, new
        return
    for key in {**old, **new}:
        was, now = old.get(key, _MISSING), new.get(key, _MISSING)
        if not _same(was, now):
            yield from _parts(f"{name}[{key!r}]", was, now)


def _other_types(
    old: Mapping[str, torch.dtype], new: Mapping[str, torch.dtype]
) -> dict[str, tuple[Any, Any]]:
    """Name a tensor of each type that has become another."""
    found: dict[tuple[Any, Any], str] = {}
    for name, was in old.items():
        if new.get(name, was) != was:
            found.setdefault((was, new[name]), name)
    return {f"the type of {name}": pair for pair, name in found.items()}


def _changed(old: str, new: str) -> str:
    return (
        f"was {old} and is {new}" if old != new else f"is {new} as before, but another"
    )


def _said(value: Any) -> str:
    if value is _MISSING or value is _THERE:
        return "not there" if value is _MISSING else "there"
    if isinstance(value, Tensor) and value.numel() > 1:
        return f"a tensor of shape {list(value.shape)}"
    return repr(value.tolist() if isinstance(value, Tensor) else value)[:60]


def _attributes(module: nn.Module) -> dict[str, Any]:
    """List what a module and its layers hold beside tensors of the state dict."""
    found: dict[str, Any] = {}
    for place, layer in module.named_modules():
        prefix = f"{place}." if place else ""
        found[f"{prefix}__class__"] = _Other(type(layer), id(type(layer)))
        held = attributes_of(layer)
        for name, value in held.items():
            if name not in _TORCHS:
                found[prefix + name] = value if type(value) in _ATOMS else _noted(value)
        for name in _HOOKS:
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


def _same(a: Any, b: Any) -> bool:
    """Compare what was noted."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype
        return alike and bool(torch.equal(a.cpu(), b.cpu()))
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(v, b[k]) for k, v in a.items())
    if type(a).__module__ == "numpy":
        return bool(a.shape == b.shape and a.dtype == b.dtype and (a == b).all())
    return bool(a == b) or (a != a and b != b)


def _constants(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy those that belong to the code."""
    prefix = f"{CONSTANTS}."
    return {n: t.detach().clone() for n, t in tensors.items() if n.startswith(prefix)}


def _without_roles(graph: graph_pb.Graph) -> graph_pb.Graph:
    """Leave out what trains: that may be frozen since."""
    copied = graph_pb.Graph.FromString(graph.SerializeToString())
    for tensor in copied.tensors:
        tensor.ClearField("role")
    return copied


@contextlib.contextmanager
def _in_modes(module: nn.Module, training: Mapping[str, bool]) -> Iterator[None]:
    """Set each layer as it was when it was exported, and then back."""
    before = [(layer, layer.training) for layer in module.modules()]
    try:
        for name, layer in module.named_modules():
            layer.training = training.get(name, layer.training)
        yield
    finally:
        for layer, was in before:
            layer.training = was
