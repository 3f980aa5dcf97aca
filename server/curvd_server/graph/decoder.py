"""From bytes to a `Graph` whose structure is sound. Knows no torch.

Whatever comes out of here is bounded and acyclic, and refers only to itself; whether
its operators exist and fit together is not asked yet.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from curvd.contract import graph_ops
from curvd.errors import InvalidGraph, LimitExceeded
from curvd.v1 import graph_pb2 as graph_pb
from curvd_server.graph.form import (
    Argument,
    ElementType,
    Graph,
    GraphTensor,
    Input,
    Literal,
    MemoryFormat,
    Node,
    Ref,
)
from curvd_server.system import yield_point

_MAX_ELEMENTS = 2**50
_ROLES = {
    graph_pb.GRAPH_TENSOR_ROLE_PARAMETER: "parameter",
    graph_pb.GRAPH_TENSOR_ROLE_FROZEN: "frozen",
    graph_pb.GRAPH_TENSOR_ROLE_BUFFER: "buffer",
}


def canonical(message: graph_pb.Graph) -> bytes:
    """Write a graph in the one form that its digest is of.

    Args:
        message: The message that a client gave.

    Returns:
        Its bytes, without what this version does not know.

    Raises:
        LimitExceeded: If they are too many.
    """
    known = graph_pb.Graph()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    data = known.SerializeToString(deterministic=True)
    if len(data) > graph_ops.MAX_GRAPH_BYTES:
        msg = (
            f"the graph has {len(data)} bytes; the limit is "
            f"{graph_ops.MAX_GRAPH_BYTES}. Register the model with a builder instead"
        )
        raise LimitExceeded(msg, bytes=len(data), limit=graph_ops.MAX_GRAPH_BYTES)
    return data


def decode(data: bytes) -> Graph:
    """Read a graph.

    Args:
        data: A serialised ``Graph``.

    Returns:
        The graph.

    Raises:
        InvalidGraph: If its structure is not sound.
        LimitExceeded: If it is too large.
    """
    if len(data) > graph_ops.MAX_GRAPH_BYTES:
        msg = (
            f"the graph has {len(data)} bytes; the limit is {graph_ops.MAX_GRAPH_BYTES}"
        )
        raise LimitExceeded(msg, bytes=len(data), limit=graph_ops.MAX_GRAPH_BYTES)
    try:
        message = graph_pb.Graph.FromString(data)
    except DecodeError as error:
        msg = "the graph is no message of curvd.v1.Graph"
        raise InvalidGraph(msg) from error
    if message.version != graph_ops.VERSION:
        msg = (
            f"the graph has version {message.version}; this server reads version "
            f"{graph_ops.VERSION}: use a client of the same version"
        )
        raise InvalidGraph(msg, version=message.version)
    _limited("nodes", len(message.nodes), graph_ops.MAX_NODES)
    for what in ("inputs", "outputs"):
        _limited(what, len(getattr(message, what)), graph_ops.MAX_LIST)
    if message.dtype not in graph_ops.FLOATING:
        known = ", ".join(graph_ops.FLOATING)
        msg = f"the graph's dtype must be one of {known}; got {_shown(message.dtype)}"
        raise InvalidGraph(msg, dtype=_shown(message.dtype))
    inputs = tuple(_input(m) for m in message.inputs)
    tensors = tuple(_tensor(m) for m in message.tensors)
    _check_unique("input", [i.name for i in inputs])
    _check_unique("tensor", [name for t in tensors for name in t.names])
    _check_homes(tensors)
    sources = [s[: graph_ops.MAX_NAME] for s in message.sources]
    first = len(inputs) + len(tensors)
    nodes = tuple(_node(m, first + at, sources) for at, m in enumerate(message.nodes))
    outputs = tuple(message.outputs)
    if not inputs or not outputs:
        msg = "a graph needs at least one input and one output"
        raise InvalidGraph(msg)
    for index in outputs:
        _check_defined(index, first + len(nodes), "the graph's output")
    digest = hashlib.sha256(data).hexdigest()
    return Graph(inputs, tensors, nodes, outputs, message.dtype, digest)


def _input(message: graph_pb.GraphInput) -> Input:
    name = _name(message.name, "input")
    return Input(name, _dtype(message.dtype, name), _shape(message.shape, name))


def _tensor(message: graph_pb.GraphTensor) -> GraphTensor:
    _limited("names of one tensor", len(message.names), graph_ops.MAX_LIST)
    names = tuple(_name(n, "tensor") for n in message.names)
    if not names:
        msg = "a tensor of the graph has no name"
        raise InvalidGraph(msg)
    home = names[0]
    for name in names:
        if not all(name.split(".")):
            msg = f"tensor {name!r}: a part of the dotted name is empty"
            raise InvalidGraph(msg, tensor=name)
    if message.role not in _ROLES:
        msg = f"tensor {home!r} has the unknown role {message.role}"
        raise InvalidGraph(msg, tensor=home, role=message.role)
    role, dtype = _ROLES[message.role], _dtype(message.dtype, home)
    if role == "parameter" and dtype not in graph_ops.FLOATING:
        msg = f"parameter {home!r} is {dtype}; only floating point ones are differentiated"
        raise InvalidGraph(msg, tensor=home, dtype=dtype)
    _limited("bytes of an inline tensor", len(message.data), graph_ops.MAX_INLINE_BYTES)
    shape = _shape(message.shape, home)
    return GraphTensor(names, role, dtype, shape, message.data)


def _node(message: graph_pb.GraphNode, index: int, sources: Sequence[str]) -> Node:
    yield_point()
    operator = message.operator
    if len(operator) > graph_ops.MAX_NAME or not graph_ops.is_allowed(operator):
        where = _source(message, sources)
        msg = (
            f"operator {_shown(operator)}{where and f' ({where})'} is not on the list "
            "of operators that a graph may use"
        )
        raise InvalidGraph(msg, operator=_shown(operator), source=where)
    positional: list[Argument] = []
    options: dict[str, Argument] = {}
    for argument in message.arguments:
        value = _argument(argument, index, operator)
        if not argument.name and not options:
            positional.append(value)
        elif not argument.name.isidentifier() or argument.name in options:
            msg = (
                f"{operator}: argument name {_shown(argument.name)} is empty after a "
                "named one, comes twice, or is no name"
            )
            raise InvalidGraph(msg, operator=operator)
        else:
            options[argument.name] = value
    _limited(f"arguments of {operator}", len(message.arguments), 64)
    return Node(operator, tuple(positional), options, _source(message, sources))


def _source(message: graph_pb.GraphNode, sources: Sequence[str]) -> str:
    return sources[message.source - 1] if 0 < message.source <= len(sources) else ""


def _argument(message: graph_pb.GraphArgument, index: int, operator: str) -> Argument:
    kind = message.WhichOneof("kind")
    if kind is None:
        return None
    if kind == "literal":
        return _literal(message.literal, index, operator)
    items = message.literals.items
    _limited(f"items of a list in {operator}", len(items), graph_ops.MAX_LIST)
    return tuple(_literal(item, index, operator) for item in items)


def _literal(message: graph_pb.GraphLiteral, index: int, operator: str) -> Literal:
    kind = message.WhichOneof("kind")
    if kind is None:
        return None
    value = getattr(message, kind)
    if kind == "value":
        _check_defined(value, index, f"an argument of {operator}")
        return Ref(value)
    if kind == "dtype":
        complex_types = tuple(graph_ops.COMPLEX.values())
        known = (*graph_ops.ELEMENT_TYPES, *complex_types)
        return ElementType(_dtype(value, operator, known))
    if kind == "memory_format":
        if value not in graph_ops.MEMORY_FORMATS:
            msg = f"{operator}: unknown memory format {_shown(value)}"
            raise InvalidGraph(msg, operator=operator)
        return MemoryFormat(value)
    if kind == "text":
        equation = graph_ops.EQUATION.fullmatch(value)
        if value not in graph_ops.WORDS and (
            operator != "aten.einsum.default" or not equation
        ):
            msg = f"{operator}: text {_shown(value)} is no word that operators take"
            raise InvalidGraph(msg, operator=operator, text=_shown(value))
    if kind == "number" and math.isnan(value):
        msg = f"{operator}: a number is NaN"
        raise InvalidGraph(msg, operator=operator)
    literal: Literal = value
    return literal


def _check_defined(index: int, limit: int, what: str) -> None:
    if index >= limit:
        msg = f"{what} refers to value {index}, but only {limit} are defined before it"
        raise InvalidGraph(msg, value=index, defined=limit)


def _check_unique(what: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            msg = f"{what} name {name!r} comes twice in the graph"
            raise InvalidGraph(msg, name=name)
        seen.add(name)


def _check_homes(tensors: Sequence[GraphTensor]) -> None:
    """Refuse a name that is also the beginning of another, as if it held tensors."""
    names = {name for t in tensors for name in t.names}
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            if ".".join(parts[:end]) in names:
                msg = f"tensor {name!r} lies inside tensor {'.'.join(parts[:end])!r}"
                raise InvalidGraph(msg, tensor=name)


def _name(name: str, what: str) -> str:
    if not 0 < len(name) <= graph_ops.MAX_NAME or not name.isprintable():
        msg = (
            f"{what} name {_shown(name)} must have 1 to {graph_ops.MAX_NAME} printable "
            "characters"
        )
        raise InvalidGraph(msg, name=_shown(name))
    return name


def _dtype(
    dtype: str, where: str, known: Sequence[str] = graph_ops.ELEMENT_TYPES
) -> str:
    if dtype not in known:
        msg = (
            f"{where}: unknown element type {_shown(dtype)}; known: {', '.join(known)}"
        )
        raise InvalidGraph(msg, dtype=_shown(dtype))
    return dtype


def _shape(shape: Sequence[int], where: str) -> tuple[int, ...]:
    sizes = tuple(shape)
    _limited(f"axes of {where}", len(sizes), 32)
    if any(n < 0 for n in sizes) or math.prod(sizes) > _MAX_ELEMENTS:
        msg = f"{where}: shape {list(sizes)} is negative or larger than {_MAX_ELEMENTS}"
        raise InvalidGraph(msg, shape=sizes)
    return sizes


def _limited(what: str, count: int, limit: int) -> None:
    if count > limit:
        msg = f"the graph has {count} {what}; the limit is {limit}"
        raise LimitExceeded(msg, count=count, limit=limit)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}…")
