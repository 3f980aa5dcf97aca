"""New operations of a linear program."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx


def call_before(
    graph: fx.Graph,
    at: fx.Node,
    target: Any,
    args: tuple[Any, ...],
    shape: tuple[int, ...],
) -> fx.Node:
    """Add an operation to a program.

    Args:
        graph: The program.
        at: The node before which it stands; the result has its type and device.
        target: The operation.
        args: Its operands.
        shape: Of its result.

    Returns:
        Its node, with shape.
    """
    with graph.inserting_before(at):
        new = graph.call_function(target, args)
    value: Tensor = at.meta["val"]
    new.meta = {"val": value.new_empty(shape)}
    return new
