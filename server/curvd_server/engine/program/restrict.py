"""A diagonal block's program, cut out of the whole operator's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from curvd_server.engine.program.constants import shape_of
from curvd_server.engine.program.simplify import drop_unused
from curvd_server.system import yield_point

aten = torch.ops.aten


def without_zeros(graph: fx.Graph, inputs: range, outputs: range) -> fx.Graph:
    """Specialise a linear program to some inputs and outputs; the others are zero.

    Args:
        graph: The program.
        inputs: Indices of the placeholders that stay.
        outputs: Indices of the results that stay.

    Returns:
        A program of the remaining inputs; a result that is always zero is None.
    """
    special = fx.Graph()
    renamed: dict[fx.Node, fx.Node | None] = {}
    position = 0

    def copied(node: fx.Node) -> fx.Node:
        found = renamed[node]
        if found is None:
            value = node.meta["val"]
            found = special.call_function(
                torch.zeros,
                (tuple(value.shape),),
                {"dtype": value.dtype, "device": value.device},
            )
        return found

    for node in graph.nodes:
        yield_point()
        operands = [o for o in node.all_input_nodes if o.op != "get_attr"]
        if node.op == "placeholder":
            renamed[node] = special.node_copy(node) if position in inputs else None
            position += 1
        elif node.op == "output":
            kept = [node.args[0][i] for i in outputs]
            special.output(
                tuple(r and (renamed[r] if r.op != "get_attr" else None) for r in kept)
            )
        elif node.target is aten.zeros_like.default:
            renamed[node] = None  # forward mode's way to say that there is no tangent
        elif operands and all(renamed[o] is None for o in operands):
            # A tangent joined to a constant is not zero when the tangent is.
            joins = node.target is aten.cat.default
            affine = joins and len(operands) < len(node.all_input_nodes)
            renamed[node] = special.node_copy(node, copied) if affine else None
        elif (only := _only_summand(special, node, renamed)) is not None:
            renamed[node] = _expanded(special, only, node)
        else:
            renamed[node] = special.node_copy(node, copied)
    drop_unused(special)
    return special


def _only_summand(
    special: fx.Graph, node: fx.Node, renamed: Mapping[fx.Node, fx.Node | None]
) -> fx.Node | None:
    """Give ``a`` for ``a + 0`` and ``a - 0``, ``-a`` for ``0 - a``."""
    if (
        node.target not in (aten.add.Tensor, aten.sub.Tensor)
        or node.kwargs
        or len(node.all_input_nodes) != 2
    ):
        return None
    alive = [o for o in node.all_input_nodes if renamed[o] is not None]
    if len(alive) != 1:
        return None
    found = renamed[alive[0]]
    assert found is not None
    if node.target is aten.sub.Tensor and alive[0] is node.args[1]:
        meta = found.meta
        found = special.call_function(aten.neg.default, (found,))
        found.meta = dict(meta)
    return found


def _expanded(special: fx.Graph, summand: fx.Node, node: fx.Node) -> fx.Node:
    """Give a summand the shape of the sum, in which it may have been broadcast."""
    if shape_of(summand) == shape_of(node):
        return summand
    new = special.call_function(aten.expand.default, (summand, list(shape_of(node))))
    new.meta = dict(node.meta)
    return new
