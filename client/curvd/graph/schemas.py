"""What torch says about an operator and its values, in the form that we need it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from curvd.graph.aliases import Alias

DROPPED = frozenset({"device", "layout", "pin_memory", "generator"})
"""Arguments that are the server's to choose."""
UNDECLARED = frozenset({"type_as", "broadcast_tensors", "meshgrid"})
"""Operators that may return their first argument, which their schema does not say."""
EXACT = {"view": "aten.reshape.default", "_unsafe_view": "aten.reshape.default"}
"""Views that are emitted in a form which takes any layout of memory."""
RENAMED = {"__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor"}
RENAMED |= {f"__i{n.strip('_')}__": pure for n, pure in RENAMED.items()}
RENAMED |= {f"unsafe_{n}": n for n in ("split", "chunk", "split_with_sizes")}
"""Operators of Python, in place or not, and pieces that share no memory."""


def positions(graph: fx.Graph) -> dict[fx.Node, int]:
    """Number the nodes of a graph.

    Args:
        graph: The graph of torch.fx.

    Returns:
        Node -> its place in the order.
    """
    return {node: k for k, node in enumerate(graph.nodes)}


def aliases(result: Any) -> Iterator[Alias]:
    """Walk through the tensors of a result.

    Args:
        result: An alias, a number, or a sequence of them.

    Yields:
        The aliases.
    """
    if isinstance(result, Alias):
        yield result
    elif isinstance(result, list | tuple):
        for item in result:
            yield from aliases(item)


def is_written(argument: Any) -> bool:
    """Tell whether an operator writes to an argument of its schema."""
    return argument.alias_info is not None and argument.alias_info.is_write


def is_view(target: Any, name: str) -> bool:
    """Tell whether an operator returns memory of its first argument."""
    declared = any(r.alias_info is not None for r in target._schema.returns)
    return declared or name in UNDECLARED or name == "_unsafe_view"


def meta_of(item: Any) -> Any:
    """Find the traced tensor of a node: shape and type; None if it is no tensor."""
    value = item.meta.get("val") if isinstance(item, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def items(argument: Any) -> list[Any]:
    """List the items of an argument; nothing if it is no list."""
    return list(argument) if isinstance(argument, list | tuple) else []


def names(target: Any) -> list[str]:
    """List the names of an operator's arguments."""
    return [a.name for a in target._schema.arguments]


def trimmed(target: Any, plain: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Split into positional and named arguments, without trailing defaults.

    Args:
        target: The operator.
        plain: All its arguments but `DROPPED`, in the order of its schema.

    Returns:
        The positional ones, and the others by name.
    """
    schema = [a for a in target._schema.arguments if a.name not in DROPPED]
    values = list(plain.values())
    positional = [
        (a, v) for a, v in zip(schema, values, strict=True) if not a.kwarg_only
    ]
    while positional and _is_default(*positional[-1]):
        positional.pop()
    options = {
        a.name: v
        for a, v in zip(schema, values, strict=True)
        if a.kwarg_only and not _is_default(a, v)
    }
    return [v for _, v in positional], options


def _is_default(argument: Any, value: Any) -> bool:
    if not argument.has_default_value():
        return False
    default = argument.default_value
    return type(default) is type(value) and bool(default == value)
