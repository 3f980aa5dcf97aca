"""How much one operator would do, known before it does: `meta` saves memory, not time."""

from __future__ import annotations

from collections.abc import Mapping
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
_SPLITTING = frozenset({"unbind", "split", "chunk", "tensor_split"})


def pieces(node: Node, given: Mapping[str, Any]) -> int:
    """Predict how many tensors a node returns, before it does.

    Args:
        node: The node.
        given: What it is about to be called with, by the names of its schema.

    Returns:
        Their number; 1 for operators that return a fixed number, or a list of sizes,
        which has its own limit.
    """
    name, tensor = _name(node), given.get("self")
    if name not in _SPLITTING or not isinstance(tensor, Tensor):
        return 1
    axis = given.get("dim", 0)
    if type(axis) is not int or not -tensor.ndim <= axis < tensor.ndim:
        return 1  # which is refused at the call
    length = int(tensor.shape[axis])
    if name == "unbind":
        return length
    size = given.get("split_size", given.get("chunks", given.get("sections", 1)))
    if type(size) is not int:
        return 1
    return -(-length // max(size, 1)) if name == "split" else size


def steps(node: Node, given: Mapping[str, Any]) -> int:
    """Predict how many steps a recurrent node walks, one after the other.

    Args:
        node: The node.
        given: What it is about to be called with, by the names of its schema.

    Returns:
        Their number, over all layers; 1 for other operators.
    """
    tensor = given.get("input")
    if _name(node) not in RECURRENT or not isinstance(tensor, Tensor):
        return 1
    axis = 1 if given.get("batch_first") else 0
    length = int(tensor.shape[axis]) if tensor.ndim > axis else 1
    layers = int(given.get("num_layers", 1))
    return length * layers * (2 if given.get("bidirectional") else 1)


def _name(node: Node) -> str:
    return node.operator.split(".")[1]


def check_work(node: Node, given: Mapping[str, Any]) -> None:
    """Refuse a node that would take forever even without memory.

    Args:
        node: The node.
        given: What it is about to be called with, by the names of its schema.

    Raises:
        LimitExceeded: If it would return more than `MAX_PIECES` tensors, or walk more
            than `MAX_STEPS` steps.
    """
    count = pieces(node, given)
    if count > MAX_PIECES:
        msg = f"{node} would return {count} tensors; the limit is {MAX_PIECES}"
        raise LimitExceeded(msg, count=count, limit=MAX_PIECES)
    walked = steps(node, given)
    if walked > MAX_STEPS:
        msg = f"{node} would walk {walked} steps; the limit is {MAX_STEPS}"
        raise LimitExceeded(msg, steps=walked, limit=MAX_STEPS)
