"""The tensors and inputs of a module: names, order, ties, roles."""

from __future__ import annotations

import collections
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from curvd.errors import InvalidGraph, InvalidSpec
from curvd.graph.tape import DTYPE_NAMES, Value
from curvd.v1 import graph_pb2 as graph_pb

CONSTANTS = "_constants"
"""Where constants of the code go by their traced names."""


@dataclass(frozen=True)
class Manifest:
    """All tensors of a module, each once."""

    entries: Sequence[tuple[Value, graph_pb.GraphTensor]]
    by_name: Mapping[str, Value]
    tensors: Mapping[str, Tensor]
    """By the name that each goes by."""
    turning: frozenset[str]
    """Names of complex constants, which travel as pairs of real numbers [..., 2]."""


def manifest(module: nn.Module, constants: Mapping[str, Tensor]) -> Manifest:
    """List parameters in order, then buffers, then constants of the code.

    Args:
        module: The module whose tensors they are. One object under several names is one tensor.
        constants: The constants, by their traced names.

    Returns:
        The list.
    """
    roles: dict[int, Any] = {}
    tensors: dict[int, Tensor] = {}
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        frozen = not parameter.requires_grad
        roles[id(parameter)] = (
            graph_pb.GRAPH_TENSOR_ROLE_FROZEN
            if frozen
            else graph_pb.GRAPH_TENSOR_ROLE_PARAMETER
        )
        tensors[id(parameter)] = parameter
        names.setdefault(id(parameter), []).append(name)
    others = dict(module.named_buffers(remove_duplicate=False))
    own = {_place(p): p for p in module.parameters()}
    # A parameter that code closes over is traced as a constant of the same memory.
    others |= {f"{CONSTANTS}.{n}": own.get(_place(t), t) for n, t in constants.items()}
    for name, buffer in others.items():
        roles.setdefault(id(buffer), graph_pb.GRAPH_TENSOR_ROLE_BUFFER)
        tensors[id(buffer)] = buffer
        names.setdefault(id(buffer), []).append(name)
    turning = frozenset(
        n for key, t in tensors.items() if t.is_complex() for n in names[key]
    )
    entries = []
    for key, tensor in tensors.items():
        if tensor.is_complex():
            _refuse_parameter(names[key][0], roles[key], tensor)
            tensors[key] = tensor = torch.view_as_real(tensor.detach().resolve_conj())
        described = graph_pb.GraphTensor(
            names=names[key],
            role=roles[key],
            dtype=_dtype(tensor, names[key][0]),
            shape=tensor.shape,
        )
        entries.append((Value(), described))
    by_name = {name: value for value, t in entries for name in t.names}
    held = {names[key][0]: tensor.detach() for key, tensor in tensors.items()}
    return Manifest(entries, by_name, held, turning)


def check_memory(module: nn.Module, constants: Mapping[str, Tensor]) -> None:
    """Refuse memory that trains under one name and is something else under another.

    Args:
        module: The module whose parameters train.
        constants: The constants of its code, by their traced names.

    Raises:
        InvalidGraph: With both names. Training would move both, and a server one.
    """
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    own = {_place(p) for p in trained.values()}
    given = {  # without generators, and without parameters themselves; see `manifest`
        n: t
        for n, t in constants.items()
        if isinstance(t, Tensor) and _place(t) not in own
    }
    others = {**trained, **dict(module.named_buffers()), **given}
    at = collections.defaultdict(list)
    for name, parameter in trained.items():
        at[parameter.untyped_storage().data_ptr()].append(name)
    for other, tensor in others.items():
        for name in at[tensor.untyped_storage().data_ptr()]:
            if trained[name] is not tensor and _overlap(trained[name], tensor):
                raise _two_tensors(name, other.removeprefix("module."))


def check_closures(graph: graph_pb.Graph, among: Collection[str] | None = None) -> None:
    """Refuse parameters that code closes over, perhaps by another tensor of their memory.

    Nothing but their gradients tells whether that is `detach()` of it.

    Args:
        graph: Of a module that was not compared with it, or is not the same.
        among: Names of parameters that are looked at; None: all.

    Raises:
        InvalidGraph: With both names.
    """
    prefix = f"{CONSTANTS}."
    for tensor in graph.tensors:
        own, *others = tensor.names
        if tensor.role != graph_pb.GRAPH_TENSOR_ROLE_PARAMETER:
            continue
        reached = [name for name in others if name.startswith(prefix)]
        if reached and (among is None or own in among):
            raise _two_tensors(own, reached[0].removeprefix(prefix))


def _two_tensors(name: str, other: str) -> InvalidGraph:
    msg = (
        f"parameter {name!r} and {other!r} share memory, but are two tensors: "
        "training moves both, and a server only one. Use the parameter itself "
        "in both places (layer.weight = other.weight ties them), or clone() it"
    )
    return InvalidGraph(msg, parameter=name, other=other)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Say where a tensor's elements lie, and how they are read."""
    start = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return (*start, tensor.dtype, tuple(tensor.shape), tensor.stride())


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors of one storage share elements, as far as ranges tell."""
    ranges = []
    for t in (a, b):
        start = t.storage_offset() * t.itemsize
        steps = ((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        ranges.append((start, start + (sum(steps) + 1) * t.itemsize))
    (first, end), (other, last) = ranges
    return bool(a.numel() and b.numel()) and first < last and other < end


def _refuse_parameter(name: str, role: Any, tensor: Tensor) -> None:
    """Refuse a complex parameter; a constant may be complex."""
    if role == graph_pb.GRAPH_TENSOR_ROLE_PARAMETER:
        msg = (
            f"parameter {name!r} is {tensor.dtype}: curvature is of real parameters. "
            "Store torch.view_as_real(...) of it, [..., 2], and use "
            "torch.view_as_complex in forward"
        )
        raise InvalidGraph(msg, tensor=name, dtype=tensor.dtype)


@dataclass(frozen=True)
class Inputs:
    """The tensors that a module is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    names: tuple[str, ...]
    leaves: tuple[Tensor, ...]
    """In the order in which torch.export numbers them."""

    def rows(self, start: int, count: int) -> Inputs:
        """Take data points that follow one another; nothing is copied."""
        return self._cut(slice(start, start + count))

    def taken(self, rows: Sequence[int]) -> Inputs:
        """Take data points from anywhere."""
        return self._cut(list(rows))

    def _cut(self, rows: slice | list[int]) -> Inputs:
        def cut(leaf: Any) -> Any:
            return leaf[rows] if isinstance(leaf, Tensor) else leaf

        args, kwargs = pytree.tree_map(cut, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs, self.names, tuple(map(cut, self.leaves)))

    def entries(self) -> list[tuple[Value, graph_pb.GraphInput]]:
        """Describe them."""
        return [
            (
                Value(),
                graph_pb.GraphInput(
                    name=name, dtype=_dtype(leaf, name), shape=leaf.shape[1:]
                ),
            )
            for name, leaf in zip(self.names, self.leaves, strict=True)
        ]


def inputs_of(forward: Any, inputs: Any) -> Inputs:
    """Read example inputs: a tensor, a tuple of arguments, or a dict of keywords.

    Args:
        forward: What is called with them; names those that are positional.
        inputs: As the user gave them.

    Returns:
        The inputs with their names.

    Raises:
        InvalidSpec: If there is no tensor, or the leading axes differ.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    else:
        args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    parameters = [*inspect.signature(forward).parameters.values()]
    positional = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    names: list[str] = []
    leaves: list[Tensor] = []
    for k, argument in enumerate(args):
        name = positional[k] if k < len(positional) else f"input_{k}"
        _collect(name, argument, names, leaves)
    for name, argument in kwargs.items():
        _collect(name, argument, names, leaves)
    if not leaves or any(leaf.dim() == 0 for leaf in leaves):
        msg = "the example inputs must be tensors with a leading batch axis"
        raise InvalidSpec(msg)
    lengths = {n: leaf.shape[0] for n, leaf in zip(names, leaves, strict=True)}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        msg = (
            f"all example inputs must have one leading batch axis, N > 0; got {lengths}"
        )
        raise InvalidSpec(msg, lengths=lengths)
    return Inputs(args, kwargs, tuple(names), tuple(leaves))


def _collect(name: str, argument: Any, names: list[str], leaves: list[Tensor]) -> None:
    for path, leaf in pytree.tree_flatten_with_path(argument)[0]:
        if isinstance(leaf, Tensor):
            key = getattr(path[-1], "key", None) if path else name
            chosen = str(key) if key is not None else f"{name}_{len(leaves)}"
            names.append(chosen if chosen not in names else f"{name}_{chosen}")
            leaves.append(leaf)


def _dtype(tensor: Tensor, name: str) -> str:
    try:
        return DTYPE_NAMES[tensor.dtype]
    except KeyError:
        advice = (
            ": pass torch.view_as_real(...) of it, and use torch.view_as_complex in forward"
            if tensor.is_complex()
            else ""
        )
        msg = f"tensor {name!r} is {tensor.dtype}, which graphs do not have{advice}"
        raise InvalidGraph(msg, tensor=name, dtype=tensor.dtype) from None


def exported_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Find the floating point type of a module.

    Args:
        tensors: Its parameters first.

    Returns:
        That of the first which is of floating point.
    """
    floating = (t.dtype for t in tensors if t.is_floating_point())
    return next(floating, torch.float32)
