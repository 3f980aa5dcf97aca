"""A graph is run with plain torch, as a server would run it, to prove what it computes."""

from __future__ import annotations

import functools
import operator as python
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvd.contract import COMPLEX
from curvd.graph.tape import COMPLEX_NAMES, DTYPE_NAMES, MEMORY_FORMATS
from curvd.v1 import graph_pb2 as graph_pb

_DTYPES = {name: dtype for dtype, name in (DTYPE_NAMES | COMPLEX_NAMES).items()}
_FORMATS = {name: form for form, name in MEMORY_FORMATS.items()}
_SIZES: Mapping[str, Callable[..., Any]] = {
    "size": lambda tensor, axis: tensor.shape[axis],
    "numel": lambda tensor: tensor.numel(),
    "item": lambda sequence, index: sequence[index],
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "not": lambda a: not a,
    **{
        name: getattr(python, name)
        for name in "add sub mul floordiv mod truediv neg eq ne lt le gt ge".split()
    },
    "min": min,
    "max": max,
    "int": int,
    "float": float,
}


@dataclass(frozen=True, slots=True)
class _Value:
    """A value by its number."""

    index: int


@dataclass(frozen=True, slots=True)
class _Type:
    """A type by its name in the contract."""

    name: str


class Evaluator:
    """Runs a graph as often as is wanted, and reads the message once.

    Args:
        graph: The graph, from `curvd.graph.tape.write`.
    """

    def __init__(self, graph: graph_pb.Graph) -> None:
        self._own = (graph.dtype, COMPLEX[graph.dtype])
        self._outputs = list(graph.outputs)
        self._nodes: list[tuple[Callable[..., Any], bool, list[Any], dict[str, Any]]]
        self._nodes = []
        for node in graph.nodes:
            positional: list[Any] = []
            named: dict[str, Any] = {}
            for argument in node.arguments:
                if argument.name:
                    named[argument.name] = _read(argument)
                else:
                    positional.append(_read(argument))
            self._nodes.append((*_found(node.operator), positional, named))

    def __call__(
        self, inputs: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> list[Tensor]:
        """Run it; see `evaluate`."""
        floating = (t.dtype for t in (*tensors, *inputs) if t.is_floating_point())
        session = next(floating, torch.float32)
        device = inputs[0].device
        values: list[Any] = [*inputs, *tensors]

        def filled(item: Any) -> Any:
            kind = type(item)
            if kind is _Value:
                return values[item.index]
            if kind is list:
                return [filled(part) for part in item]
            return self._type(item.name, session) if kind is _Type else item

        for function, makes_tensors, positional, named in self._nodes:
            options = {name: filled(item) for name, item in named.items()}
            if makes_tensors:
                options["device"] = device
            values.append(function(*map(filled, positional), **options))
        return [values[index] for index in self._outputs]

    def _type(self, name: str, session: torch.dtype) -> torch.dtype:
        """Say what a type that the graph names is in a session."""
        dtype = _DTYPES[name]
        stands = name in self._own or session is torch.float64
        if dtype.is_complex:
            return _DTYPES[COMPLEX[DTYPE_NAMES[session]]] if stands else dtype
        return session if dtype.is_floating_point and stands else dtype


def evaluate(
    graph: graph_pb.Graph, inputs: Sequence[Tensor], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Run a graph, differentiably.

    Floating point types follow a session's rule: the exported type stands for the type
    of `tensors` and `inputs`, and in float64 all of them do.

    Args:
        graph: The graph, from `curvd.graph.tape.write`.
        inputs: Values of its inputs, in order.
        tensors: Values of its tensors, in order.

    Returns:
        Its outputs.
    """
    return Evaluator(graph)(inputs, tensors)


def _read(argument: graph_pb.GraphArgument) -> Any:
    """Read an argument; values and types are filled in when the graph runs."""
    kind = argument.WhichOneof("kind")
    if kind == "literals":
        return [_literal(item) for item in argument.literals.items]
    return None if kind is None else _literal(argument.literal)


def _literal(literal: graph_pb.GraphLiteral) -> Any:
    kind = literal.WhichOneof("kind")
    if kind is None:
        return None
    item = getattr(literal, kind)
    if kind == "memory_format":
        return _FORMATS[item]
    kinds: Mapping[str, Callable[..., Any]] = {"value": _Value, "dtype": _Type}
    return kinds[kind](item) if kind in kinds else item


def types_in(graph: graph_pb.Graph) -> frozenset[torch.dtype]:
    """List the types of numbers that a graph computes in.

    Args:
        graph: The graph, from `curvd.graph.tape.write`.

    Returns:
        Those of its tensors, and those that its operators name.
    """
    named = {t.dtype for t in graph.tensors} | {i.dtype for i in graph.inputs}
    named.add(graph.dtype)
    for node in graph.nodes:
        for argument in node.arguments:
            literals = [argument.literal, *argument.literals.items]
            named |= {item.dtype for item in literals if item.HasField("dtype")}
    return frozenset(_DTYPES[name] for name in named if name)


def constant(described: graph_pb.GraphTensor) -> Tensor:
    """Read a tensor whose value travels inside the graph."""
    dtype = _DTYPES[described.dtype]
    if not described.data:
        return torch.zeros(tuple(described.shape), dtype=dtype)
    raw = torch.frombuffer(bytearray(described.data), dtype=dtype)
    return raw.reshape(tuple(described.shape))


@functools.lru_cache(maxsize=1024)
def _found(operator: str) -> tuple[Callable[..., Any], bool]:
    """Look an operator up, and say whether it makes tensors of numbers alone."""
    namespace, name, *overload = operator.split(".")
    if namespace == "sym":
        return _SIZES[name], False
    function = getattr(getattr(torch.ops.aten, name), overload[0])
    kinds = {a.name: str(a.type) for a in function._schema.arguments}
    makes = "device" in kinds and not any("Tensor" in kind for kind in kinds.values())
    return function, makes
