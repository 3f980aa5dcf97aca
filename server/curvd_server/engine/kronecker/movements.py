"""Where the elements of parameters go: each parameter is followed by its indices.

Operators that only move elements are run on the tensor of a parameter's flat indices, so
that no layout needs a pattern of its own: a transposed, sliced, packed or repeated weight
arrives at its consumer as a tensor of indices into the vector of length P.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from curvd.contract import ParameterLayout

_aten = torch.ops.aten
_MOVES = {
    _aten.t.default,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.unsqueeze.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.expand.default,
    _aten.slice.Tensor,
    _aten.select.int,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.unbind.int,
    _aten.cat.default,
    _aten.stack.default,
    operator.getitem,
}
_VIEWS = {_aten.view.default, _aten._unsafe_view.default}
_COPIES = {_aten.clone.default, _aten.alias.default, _aten._to_copy.default}
"""They may change the type or the strides, which indices do not have."""

Indices = Mapping[fx.Node, Any]
"""What a node holds of parameters: a tensor of indices, or several."""


def follow(graph: fx.Graph, layout: ParameterLayout) -> Indices:
    """Follow every parameter through the operators that only move elements.

    Args:
        graph: The traced model; its first inputs are the parameters.
        layout: Where each parameter lies.

    Returns:
        Indices into the vector of length P, by node, where a node holds nothing else.
    """
    found: dict[fx.Node, Any] = {}
    parameters = iter(layout.parameters)
    for node in graph.nodes:
        if node.op == "placeholder":
            own = next(parameters, None)
            if own is not None:
                flat = torch.arange(own.offset, own.offset + own.size)
                found[node] = flat.view(own.shape)
        elif node.op == "call_function" and node.all_input_nodes:
            moved = _moved(node, found)
            if moved is not None:
                found[node] = moved
    return found


def _moved(node: fx.Node, found: Indices) -> Any:
    """Run an operator on indices, if it only moves what it is given."""
    if not all(operand in found for operand in node.all_input_nodes):
        return None
    if node.target in _COPIES:
        return found[node.all_input_nodes[0]]
    if node.target not in _MOVES:
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
    target: Any = _aten.reshape.default if node.target in _VIEWS else node.target
    return target(*args, **kwargs)


def distinct(index: Tensor) -> Tensor:
    """List indices once each, in ascending order."""
    found: Tensor = torch.unique(index)
    return found


def as_indices(value: Any) -> Tensor | None:
    """Take a node's indices, if they are of one tensor."""
    return value if isinstance(value, Tensor) else None
