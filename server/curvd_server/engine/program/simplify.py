"""Simplifications of a linear program.

Each rule uses what a general autograd engine cannot know: which operands never change
between products. All keep the result up to rounding.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, fx

from curvd_server.engine.program.combine import combine
from curvd_server.engine.program.constants import (
    Derivation,
    DerivedConstants,
    Values,
    is_constant,
    named,
    names_of,
    new_constant,
    shape_of,
)
from curvd_server.engine.program.join_products import join_products
from curvd_server.engine.program.nodes import call_before
from curvd_server.engine.program.pooling import add_windows
from curvd_server.system import yield_point

aten = torch.ops.aten

_ADD, _SUB = aten.add.Tensor, aten.sub.Tensor
_MUL, _NEG = aten.mul.Tensor, aten.neg.default
_SCALES = {
    aten.gelu_backward.default,
    aten.silu_backward.default,
    aten.tanh_backward.default,
    aten.sigmoid_backward.default,
    aten.elu_backward.default,
    aten.softplus_backward.default,
}
"""Elementwise and linear in the first operand: a fixed factor in disguise."""
_COPIES = {aten.expand.default, aten._to_copy.default}
"""What forward mode inserts where a tangent might be another's view, and is not."""


def simplify(graph: fx.Graph, zeros: Set[str]) -> tuple[fx.Graph, DerivedConstants]:
    """Apply all rules.

    Nothing here looks at a value, so that the result serves every mini-batch.

    Args:
        graph: A linear program whose constants are ``get_attr`` nodes; a copy is
            rewritten.
        zeros: Names of the constants that are zero.

    Returns:
        The simplified graph and how to make the constants that it has in addition.
    """
    graph, derived = _copied(graph), DerivedConstants()
    drop_unused(graph)
    for node in list(graph.nodes):
        yield_point()
        if node.target in (_ADD, _SUB):
            _drop_zero(graph, node, zeros)
        elif node.target is aten.copy.default:
            _drop_copy(graph, node, source=1)
        elif node.target in _COPIES and "memory_format" not in node.kwargs:
            _drop_copy(graph, node, source=0)
    for node in list(graph.nodes):
        yield_point()
        if node.target in _SCALES:
            _fold_factor(graph, node, derived)
    share_equal(graph)
    add_windows(graph, derived)
    join_products(graph, derived)
    drop_unused(graph)
    combine(graph, derived)
    drop_unused(graph)
    graph.lint()
    return graph, derived


def drop_unused(graph: fx.Graph) -> None:
    """Remove what no output depends on; between two nodes is a yield point.

    Args:
        graph: A linear program, all of whose operations have no effect but a result.
    """
    # Users come behind what they use, so that they are gone before it is looked at.
    for node in reversed(graph.nodes):
        yield_point()
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _copied(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        yield_point()
        copies[node] = new.node_copy(node, copies.__getitem__)
    return new


def share_equal(graph: fx.Graph) -> None:
    """Compute what several nodes compute alike, once.

    Args:
        graph: A linear program, none of whose operations draws or writes.
    """
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        yield_point()
        if node.op not in ("call_function", "get_attr"):
            continue
        key = repr((node.op, str(node.target), node.args, sorted(node.kwargs.items())))
        if (earlier := first.setdefault(key, node)) is not node:
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)


def addends(graph: fx.Graph) -> frozenset[str]:
    """Name the constants that a program adds; a linear one adds only zeros."""
    return frozenset(
        str(operand.target)
        for node in graph.nodes
        if node.target in (_ADD, _SUB)
        for operand in node.all_input_nodes
        if operand.op == "get_attr"
    )


def _replace(
    graph: fx.Graph, old: fx.Node, target: Any, args: tuple[Any, ...]
) -> fx.Node:
    with graph.inserting_before(old):
        new = graph.call_function(target, args)
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    return new


def _drop_zero(graph: fx.Graph, node: fx.Node, zeros: Set[str]) -> None:
    """``t + 0 -> t``, ``0 - t -> -t``: tangents of what no parameter moves are zero."""
    subtracts = node.target is _SUB
    pairs: Any = (node.args, node.args[::-1])
    for tangent, other in pairs:
        if not isinstance(tangent, fx.Node) or is_constant(tangent):
            continue
        if not is_constant(other) or node.kwargs:
            continue
        if other != 0 and not (isinstance(other, fx.Node) and other.target in zeros):
            continue
        if subtracts and tangent is node.args[1]:
            tangent = call_before(graph, node, _NEG, (tangent,), shape_of(tangent))
        if shape_of(tangent) == shape_of(node):
            node.replace_all_uses_with(tangent)
            graph.erase_node(node)
        else:
            _replace(graph, node, aten.expand.default, (tangent, list(shape_of(node))))
        return


def _drop_copy(graph: fx.Graph, node: fx.Node, source: int) -> None:
    """``copy(anything, t) -> t`` if `t` has the result's shape and type already.

    Args:
        graph: The program.
        node: Copies, expands or converts; nothing here writes to what it makes.
        source: Which operand it copies.
    """
    original: Any = node.args[source]
    have, want = original.meta.get("val"), node.meta.get("val")
    if isinstance(have, Tensor) and isinstance(want, Tensor):
        alike = have.shape == want.shape and have.dtype == want.dtype
        if alike and have.device == want.device:
            node.replace_all_uses_with(original)
            graph.erase_node(node)


def _fold_factor(graph: fx.Graph, node: fx.Node, derived: DerivedConstants) -> None:
    """``gelu_backward(t, h) -> t * gelu'(h)``, the factor computed once."""
    tangent, *others = node.args
    if is_constant(tangent) or not all(map(is_constant, others)):
        return
    target: Any = node.target
    first = next(o for o in others if isinstance(o, fx.Node))
    # note: a name, not a node, because a graph must not be kept alive by derived constants.
    names = [named(o) for o in others]
    extra = {k: named(v) for k, v in node.kwargs.items()}

    def factor(values: Values) -> Tensor:
        known = [read(values) for read in names]
        options = {k: read(values) for k, read in extra.items()}
        result: Tensor = target(torch.ones_like(known[at]), *known, **options)
        return result

    at = others.index(first)
    derivation = Derivation(names_of(*others, *node.kwargs.values()), factor)
    constant = new_constant(graph, node, derived, first.meta["val"], derivation)
    _replace(graph, node, _MUL, (tangent, constant))
