"""Linear programs as JSON, for the process that makes native code of them."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

_PLAIN: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "zeros": torch.zeros,
}
"""What a program calls beside aten operations."""
_NAMES = {call: name for name, call in _PLAIN.items()}


def describe(graph: fx.Graph, arguments: Sequence[Tensor]) -> str:
    """Write a program and how it is called as JSON; the inverse of `rebuild`.

    Args:
        graph: Placeholders, calls of aten operations, and an output.
        arguments: Examples; only their shapes, strides, types and devices count.

    Returns:
        The text.

    Raises:
        TypeError: If the program has something that cannot be written.
    """
    nodes = [
        [node.op, node.name, _target(node), _encoded(node.args), _encoded(node.kwargs)]
        for node in graph.nodes
    ]
    shapes = [
        [list(t.shape), list(t.stride()), _encoded(t.dtype), _encoded(t.device)]
        for t in arguments
    ]
    content = {"nodes": nodes, "arguments": shapes, "threads": torch.get_num_threads()}
    return json.dumps(content, separators=(",", ":"))


def rebuild(text: str) -> tuple[fx.GraphModule, list[Tensor]]:
    """Read a program; the inverse of `describe`.

    Args:
        text: What `describe` wrote.

    Returns:
        The program, and arguments without values.
    """
    content = json.loads(text)
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs in content["nodes"]:
        arguments = _decoded(args, known), _decoded(kwargs, known)
        if op == "placeholder":
            known[name] = graph.placeholder(name)
        elif op == "output":
            graph.output(tuple(arguments[0][0]))
        else:
            known[name] = graph.call_function(
                _resolved(target), tuple(arguments[0]), arguments[1]
            )
    examples = [
        torch.empty_strided(
            shape, stride, dtype=_decoded(dtype, {}), device=_decoded(device, {})
        )
        for shape, stride, dtype, device in content["arguments"]
    ]
    torch.set_num_threads(content["threads"])  # native code fixes their number
    return fx.GraphModule(nn.Module(), graph), examples


def _target(node: fx.Node) -> str:
    target: Any = node.target
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target)
    if target not in _NAMES:
        msg = f"the program calls {target}, which cannot be written"
        raise TypeError(msg)
    return _NAMES[target]


def _resolved(name: str) -> Callable[..., Any]:
    if name in _PLAIN:
        return _PLAIN[name]
    _, packet, overload = name.split(".")
    call: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
    return call


def _encoded(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_encoded(v) for v in value]
    if isinstance(value, dict):
        return {"dict": {k: _encoded(v) for k, v in value.items()}}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": str(value).removeprefix("torch.")}
    msg = f"an operand of type {type(value).__name__} cannot be written"
    raise TypeError(msg)


def _decoded(value: Any, known: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decoded(v, known) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return known[content]
    if kind == "dict":
        return {k: _decoded(v, known) for k, v in content.items()}
    return torch.device(content) if kind == "device" else getattr(torch, content)
