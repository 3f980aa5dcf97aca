"""A graph whose structure is sound, as plain data. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, slots=True)
class Ref:
    """A value by its number."""

    index: int


@dataclass(frozen=True, slots=True)
class ElementType:
    """An element type by its safetensors name."""

    name: str


@dataclass(frozen=True, slots=True)
class MemoryFormat:
    """A memory format by its name in the contract."""

    name: str


Literal = Ref | ElementType | MemoryFormat | bool | int | float | str | None
Argument = Literal | tuple[Literal, ...]


@dataclass(frozen=True, slots=True)
class Input:
    """What the data is bound to."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of one data point."""


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """A parameter, buffer or constant."""

    names: tuple[str, ...]
    """It goes by the first."""
    role: str
    """``parameter``, ``frozen`` or ``buffer``."""
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Node:
    """One operator, applied."""

    operator: str
    arguments: tuple[Argument, ...]
    options: Mapping[str, Argument]
    source: str
    """Where it comes from; empty if nobody said."""

    def __str__(self) -> str:
        """Name it for a message."""
        return f"{self.operator} ({self.source})" if self.source else self.operator


def references(node: Node) -> Iterable[int]:
    """List the numbers of the values that a node uses."""
    for argument in (*node.arguments, *node.options.values()):
        for literal in argument if isinstance(argument, tuple) else (argument,):
            if isinstance(literal, Ref):
                yield literal.index


@dataclass(frozen=True)
class Graph:
    """A graph whose structure is sound."""

    inputs: tuple[Input, ...]
    tensors: tuple[GraphTensor, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    dtype: str
    """The floating point type that was exported."""
    digest: str
    """SHA-256 of its canonical bytes."""

    @property
    def first_node(self) -> int:
        """Number of the first node's result."""
        return len(self.inputs) + len(self.tensors)

    @property
    def size(self) -> int:
        """How many values there are."""
        return self.first_node + len(self.nodes)

    @cached_property
    def last_use(self) -> tuple[int, ...]:
        """For each value the last node that needs it, and is needed itself.

        The number of nodes stands for the outputs, -1 for what nobody needs.
        """
        last = [-1] * self.size
        for index in self.outputs:
            last[index] = len(self.nodes)
        for at in reversed(range(len(self.nodes))):
            if last[self.first_node + at] >= 0:
                for index in references(self.nodes[at]):
                    last[index] = max(last[index], at)
        return tuple(last)

    @cached_property
    def cut_off(self) -> tuple[str, ...]:
        """Where values that depend on parameters are taken for constants."""
        trained = {
            len(self.inputs) + at
            for at, tensor in enumerate(self.tensors)
            if tensor.role == "parameter"
        }
        places: dict[str, None] = {}
        for at, node in enumerate(self.nodes):
            if not trained.isdisjoint(references(node)):
                trained.add(self.first_node + at)
                if node.operator == "aten.detach.default":
                    places[node.source or "detach"] = None
        return tuple(places)
