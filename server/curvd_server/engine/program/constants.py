"""Constants of a linear program, and new ones that are computed from them once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Derivation:
    """How a constant is computed from others."""

    names: tuple[str, ...]
    """The others, which must be there."""
    compute: Callable[[Values], Tensor]


DerivedConstants = dict[str, Derivation]
"""New constants by name, each behind those that it is computed from."""


def is_constant(node: object) -> bool:
    """Tell whether an operand of a linear program never changes between products."""
    return not isinstance(node, fx.Node) or node.op == "get_attr"


def shape_of(node: Any) -> tuple[int, ...]:
    """Read the shape of a node's value; that of a plain number is ()."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def new_constant(
    graph: fx.Graph,
    at: fx.Node,
    derived: DerivedConstants,
    like: Tensor,
    derivation: Derivation,
) -> fx.Node:
    """Add a constant to a program.

    Args:
        graph: The program.
        at: The node before which it stands.
        derived: How constants are made; this one is added.
        like: Its shape and type.
        derivation: Makes it of the others.

    Returns:
        Its node.
    """
    name = f"f{len(derived)}"
    derived[name] = derivation
    with graph.inserting_before(at):
        node = graph.get_attr(name)
    node.meta["val"] = like
    return node


def named(operand: Any) -> Callable[[Values], Any]:
    """Read an operand, a constant by name or a plain value."""
    if not isinstance(operand, fx.Node):
        return lambda _: operand
    name = str(operand.target)
    return lambda values: values[name]


def names_of(*operands: Any) -> tuple[str, ...]:
    """List the names of the operands that are constants of the program."""
    return tuple(str(o.target) for o in operands if isinstance(o, fx.Node))
