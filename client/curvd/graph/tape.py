"""Operators in the order in which they run, and how they become a message."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from curvd.contract import graph_ops
from curvd.errors import InvalidGraph, LimitExceeded
from curvd.v1 import graph_pb2 as graph_pb

DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
COMPLEX_NAMES = {torch.complex64: "C64", torch.complex128: "C128"}
MEMORY_FORMATS = {
    torch.contiguous_format: "contiguous",
    torch.preserve_format: "preserve",
    torch.channels_last: "channels_last",
    torch.channels_last_3d: "channels_last_3d",
}
# Operators that ask for the shape of an argument, and its place.
_SHAPES: Mapping[str, int] = {
    "aten.expand_as.default": 1,
    "aten.full_like.default": 0,
    "aten.new_zeros.default": 0,
    "aten.zeros_like.default": 0,
    "sym.size": 0,
}
_VIEWS = frozenset({
    "aten.slice.Tensor",
    "aten.select.int",
    "aten.transpose.int",
    "aten.permute.default",
    "aten.reshape.default",
    "aten.unsqueeze.default",
})


@dataclass(eq=False, slots=True)
class Value:
    """One value of a graph: an input, a tensor, or what an operator returns."""

    operator: str = ""
    """Empty: an input or a tensor."""
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    uninitialised: bool = False
    """Whether it stands for memory that nobody has written to."""

    def references(self) -> Iterator[Value]:
        """Walk through the values that its operator uses."""
        for argument in (*self.arguments, *self.options.values()):
            items = argument if isinstance(argument, list | tuple) else (argument,)
            yield from (item for item in items if isinstance(item, Value))


class Tape:
    """Collects operators."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.source = ""
        """Where the operators that follow come from."""

    def emit(self, operator: str, *arguments: Any, **options: Any) -> Value:
        """Add an operator.

        Args:
            operator: As the contract names it.
            *arguments: Values and literals.
            **options: The same by name.

        Returns:
            What it returns.

        Raises:
            InvalidGraph: If no server knows it.
        """
        if not graph_ops.is_allowed(operator):
            msg = (
                f"operator {operator}{self.where} is not one that servers run: write "
                "it with other operators, or let the server's operator offer the model "
                "as a builder"
            )
            raise InvalidGraph(msg, operator=operator, source=self.source)
        value = Value(operator, arguments, options, self.source)
        self.values.append(value)
        return value

    @property
    def where(self) -> str:
        """The source, for a message."""
        return f" ({self.source})" if self.source else ""


def write(
    tape: Tape,
    inputs: Sequence[tuple[Value, graph_pb.GraphInput]],
    tensors: Sequence[tuple[Value, graph_pb.GraphTensor]],
    outputs: Sequence[Value],
    dtype: torch.dtype,
) -> graph_pb.Graph:
    """Write a graph without the operators that nobody needs.

    Args:
        tape: The operators.
        inputs: The inputs, with their descriptions, in order.
        tensors: Likewise.
        outputs: What is returned.
        dtype: The floating point type of the model.

    Returns:
        The message.

    Raises:
        LimitExceeded: If it is too large.
    """
    kept = _needed(tape.values, outputs)
    _check_initialised(kept, outputs)
    numbered = [*(v for v, _ in inputs), *(v for v, _ in tensors), *kept]
    numbers = {id(value): index for index, value in enumerate(numbered)}
    sources = {s: k for k, s in enumerate(dict.fromkeys(v.source for v in kept), 1)}
    graph = graph_pb.Graph(
        version=graph_ops.VERSION,
        inputs=[i for _, i in inputs],
        tensors=[t for _, t in tensors],
        nodes=[_node(value, numbers, sources) for value in kept],
        outputs=[numbers[id(value)] for value in outputs],
        sources=list(sources),
        dtype=DTYPE_NAMES[dtype],
    )
    size = graph.ByteSize()
    if size > graph_ops.MAX_GRAPH_BYTES or len(kept) > graph_ops.MAX_NODES:
        msg = (
            f"the graph has {len(kept)} operators and {size} bytes; the limits are "
            f"{graph_ops.MAX_NODES} and {graph_ops.MAX_GRAPH_BYTES}: replace loops by "
            "operators on whole tensors, or let the server offer the model as a builder"
        )
        raise LimitExceeded(msg, nodes=len(kept), bytes=size)
    return graph


def _needed(values: Sequence[Value], outputs: Iterable[Value]) -> list[Value]:
    needed = {id(value) for value in outputs}
    kept = []
    for value in reversed(values):
        if id(value) in needed:
            kept.append(value)
            needed.update(id(v) for v in value.references())
    return kept[::-1]


def _check_initialised(values: Sequence[Value], outputs: Sequence[Value]) -> None:
    """Refuse whoever reads memory that is not written; its shape may be asked for."""
    bare = {id(value): value for value in values if value.uninitialised}
    read: list[Any] = list(outputs)
    for value in values:
        arguments = list(value.arguments)
        if value.operator in _VIEWS and id(arguments[0]) in bare:
            bare[id(value)] = bare[id(arguments.pop(0))]
        elif value.operator in _SHAPES:
            del arguments[_SHAPES[value.operator]]
        for item in (*arguments, *value.options.values()):
            read += item if isinstance(item, list | tuple) else [item]
    for item in read:
        if id(item) in bare:
            source = bare[id(item)].source
            msg = (
                f"memory from torch.empty{f' ({source})' if source else ''} is read "
                "uninitialised, or only a part of it was written: use torch.zeros"
            )
            raise InvalidGraph(msg, source=source)


def _node(
    value: Value, numbers: dict[int, int], sources: dict[str, int]
) -> graph_pb.GraphNode:
    def literal(item: Any) -> graph_pb.GraphLiteral:
        if isinstance(item, Value):
            return graph_pb.GraphLiteral(value=numbers[id(item)])
        return _literal(item, value)

    def argument(item: Any, name: str = "") -> graph_pb.GraphArgument:
        if isinstance(item, list | tuple):
            several = graph_pb.GraphLiterals(items=[literal(i) for i in item])
            return graph_pb.GraphArgument(name=name, literals=several)
        if item is None:
            return graph_pb.GraphArgument(name=name)
        return graph_pb.GraphArgument(name=name, literal=literal(item))

    return graph_pb.GraphNode(
        operator=value.operator,
        arguments=[
            *(argument(a) for a in value.arguments),
            *(argument(a, name) for name, a in value.options.items()),
        ],
        source=sources[value.source] if value.source else 0,
    )


def _literal(item: Any, value: Value) -> graph_pb.GraphLiteral:
    if item is None:
        return graph_pb.GraphLiteral()
    if isinstance(item, bool):
        return graph_pb.GraphLiteral(boolean=item)
    if isinstance(item, int) and -(2**63) <= item < 2**63:
        return graph_pb.GraphLiteral(integer=item)
    if isinstance(item, float) and not math.isnan(item):
        return graph_pb.GraphLiteral(number=item)
    if isinstance(item, str):
        return graph_pb.GraphLiteral(text=item)
    if isinstance(item, torch.dtype) and item in DTYPE_NAMES | COMPLEX_NAMES:
        return graph_pb.GraphLiteral(dtype=(DTYPE_NAMES | COMPLEX_NAMES)[item])
    if isinstance(item, torch.memory_format):
        return graph_pb.GraphLiteral(memory_format=MEMORY_FORMATS[item])
    where = f" ({value.source})" if value.source else ""
    msg = (
        f"operator {value.operator}{where} has the argument {item!r}, which a graph "
        "cannot hold: NaN and nested lists are not supported"
    )
    raise InvalidGraph(msg, operator=value.operator, source=value.source)
