"""How much one operator would do, known before it does: `meta` saves memory, not time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from curvd.errors import LimitExceeded
from curvd_server.graph.form import Node

MAX_PIECES = 65_536
"""Tensors that one operator may return."""
MAX_STEPS = 8_192
"""Steps in time, over all layers, that one recurrent operator may walk."""

RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
# They split a tensor: how many pieces is a number that a client chooses.
_SPLITTING = frozenset({"unbind", "split", "chunk", "tensor_split", "meshgrid"})


def pieces(node: Node, arguments: Sequence[Any]) -> int:
    """Predict how many tensors a node returns, before it does.

    Args:
        node: The node.
        arguments: What it is about to be called with.

    Returns:
        Their number; 1 for operators that return a fixed number.
    """
    name = node.operator.split(".")[1] if node.operator.startswith("aten.") else ""
    if name not in _SPLITTING or not arguments or not isinstance(arguments[0], Tensor):
        return 1
    tensor, *rest = arguments
    numbers = [*rest, *node.options.values()]
    sizes = [n for n in numbers if isinstance(n, int)]
    if name == "unbind":
        axis = sizes[0] if sizes else 0
        return int(tensor.shape[axis]) if -tensor.ndim <= axis < tensor.ndim else 1
    if not sizes:
        return 1  # a list of sizes, which has its own limit
    if name == "split":
        axis = sizes[1] if len(sizes) > 1 else 0
        length = tensor.shape[axis] if -tensor.ndim <= axis < tensor.ndim else 1
        return -(-int(length) // max(sizes[0], 1))
    return sizes[0]


def steps(node: Node, arguments: Sequence[Any]) -> int:
    """Predict how many steps a recurrent node walks, one after the other.

    Args:
        node: The node.
        arguments: What it is about to be called with.

    Returns:
        Their number, over all layers; 1 for other operators.
    """
    name = node.operator.split(".")[1]
    if name not in RECURRENT or not isinstance(arguments[0], Tensor):
        return 1
    layers, _, _, bidirectional, batch_first = arguments[4:9]
    axis = 1 if batch_first else 0
    length = arguments[0].shape[axis] if arguments[0].ndim > axis else 1
    return int(length) * int(layers) * (2 if bidirectional else 1)


def check_work(node: Node, arguments: Sequence[Any]) -> None:
    """Refuse a node that would take forever even without memory.

    Args:
        node: The node.
        arguments: What it is about to be called with.

    Raises:
        LimitExceeded: If it would return more than `MAX_PIECES` tensors, or walk more
            than `MAX_STEPS` steps.
    """
    count = pieces(node, arguments)
    if count > MAX_PIECES:
        msg = f"{node} would return {count} tensors; the limit is {MAX_PIECES}"
        raise LimitExceeded(msg, count=count, limit=MAX_PIECES)
    walked = steps(node, arguments)
    if walked > MAX_STEPS:
        msg = f"{node} would walk {walked} steps; the limit is {MAX_STEPS}"
        raise LimitExceeded(msg, steps=walked, limit=MAX_STEPS)
