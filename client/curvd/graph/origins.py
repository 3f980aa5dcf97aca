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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvd.errors import CurvdError, InvalidSpec
from curvd.graph.attributes import (
    GRADIENT_HOOKS,
    HOOKS,
    MISSING,
    NotedLayer,
    attributes,
    same,
)
from curvd.graph.loss_origin import LossOrigin
from curvd.graph.manifest import CONSTANTS
from curvd.graph.twins import (
    in_types,
    twin_apart,
    types_by_name,
    without_gradients,
)
from curvd.v1 import graph_pb2 as graph_pb

Traced = tuple[graph_pb.Graph, Mapping[str, Tensor]]
_SHOWN = 5
"""Attributes that a message names."""
_THERE = object()


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
        self._seen = attributes(module)
        self._layers: list[NotedLayer] = []
        self._training = {n: m.training for n, m in module.named_modules()}
        self._types = types_by_name(module)
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
            raise _refusal({name: (_THERE, MISSING) for name in gone})
        return state

    def _check(self, module: nn.Module) -> None:
        known = bool(self._layers) and self._layers[0].is_of(module)
        if known and all(map(NotedLayer.is_as_before, self._layers)):
            return
        now = attributes(module)
        changed = {
            name: (self._seen.get(name, MISSING), now.get(name, MISSING))
            for name in {**self._seen, **now}
            if not same(self._seen.get(name, MISSING), now.get(name, MISSING))
        }
        hooked = any(name.endswith(HOOKS + GRADIENT_HOOKS) for name in changed)
        if changed and not self._does_the_same(module, prove=hooked):
            raise _refusal(_other_types(self._types, types_by_name(module)) | changed)
        self._seen = now
        self._layers = [NotedLayer(layer) for layer in module.modules()]

    def _does_the_same(self, module: nn.Module, *, prove: bool) -> bool:
        if prove and self._types != types_by_name(module):
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
            and all(same(constants[n], t) for n, t in self._constants.items())
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
        was, now = old.get(key, MISSING), new.get(key, MISSING)
        if not same(was, now):
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
    if value is MISSING or value is _THERE:
        return "not there" if value is MISSING else "there"
    if isinstance(value, Tensor) and value.numel() > 1:
        return f"a tensor of shape {list(value.shape)}"
    return repr(value.tolist() if isinstance(value, Tensor) else value)[:60]


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
