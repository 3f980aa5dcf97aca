"""Matrix products of a weight that is used many times, joined to a few large ones.

A recurrent net multiplies the same weight at every step. Of its tangents, the products with
what is known (states, and gradients by them) do not wait for one another, and those that are
summed need not be told apart:

    h_1 dW, h_2 dW, ...      are rows of   [h_1; h_2; ...] dW
    dg_1' h_1 + dg_2' h_2 + ...    is      [dg_1; dg_2; ...]' [h_1; h_2; ...]

Small products are far from the processor's peak; large ones are near it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from curvd_server.engine.program.constants import (
    Derivation,
    DerivedConstants,
    is_constant,
    named,
    names_of,
    new_constant,
    shape_of,
)
from curvd_server.engine.program.nodes import call_before
from curvd_server.system import yield_point

aten = torch.ops.aten

_ADD, _MM, _T = aten.add.Tensor, aten.mm.default, aten.t.default
_LEAST = 3
"""Products from which on they are joined; two are left to what fuses sums."""


def join_products(graph: fx.Graph, derived: DerivedConstants) -> None:
    """Join what multiplies the same tangent, and what is summed.

    Args:
        graph: A linear program with shapes; it is rewritten.
        derived: How constants are made; those of the joined products are added.
    """
    _join_rows(graph, derived)
    for node in reversed(list(graph.nodes)):
        yield_point()
        if node.target is _ADD and not _is_inner(node):
            _join_sum(graph, node, derived)


def _join_rows(graph: fx.Graph, derived: DerivedConstants) -> None:
    """``a_1 x, a_2 x, ... -> slices of [a_1; a_2; ...] x`` for constants ``a``."""
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        yield_point()
        if node.target is _MM and is_constant(node.args[0]):
            base, is_turned = _untransposed(node.args[1])
            if not is_constant(base):
                groups[base, is_turned].append(node)
    for nodes in groups.values():
        if len(nodes) >= _LEAST:
            _stack(graph, nodes, derived)


def _untransposed(node: Any) -> tuple[Any, bool]:
    """Strip transposes, which each use makes anew; say whether one remains."""
    is_turned = False
    while isinstance(node, fx.Node) and node.target is _T:
        node, is_turned = node.args[0], not is_turned
    return node, is_turned


def _stack(
    graph: fx.Graph, nodes: Sequence[fx.Node], derived: DerivedConstants
) -> None:
    lefts = [node.args[0] for node in nodes]
    first, heights = nodes[0], [shape_of(left)[0] for left in lefts]
    stacked = _joined_constant(graph, first, derived, lefts, 0)
    with graph.inserting_before(first):
        product = graph.call_function(_MM, (stacked, first.args[1]))
    value: Tensor = first.meta["val"]
    product.meta = dict(first.meta, val=value.new_empty(sum(heights), value.shape[1]))
    start = 0
    for node, height in zip(nodes, heights, strict=True):
        with graph.inserting_before(node):
            rows = graph.call_function(
                aten.slice.Tensor, (product, 0, start, start + height)
            )
        rows.meta = dict(node.meta)
        node.replace_all_uses_with(rows)
        graph.erase_node(node)
        start += height


def _is_inner(node: fx.Node) -> bool:
    """Tell whether a sum is part of a larger one."""
    if len(node.users) != 1:
        return False
    (user,) = node.users
    if user.target is _T and len(user.users) == 1:
        (again,) = user.users
        if again.target is not _T or len(again.users) != 1:
            return False
        (user,) = again.users
    return user.target is _ADD and not user.kwargs and shape_of(user) == shape_of(node)


def _join_sum(graph: fx.Graph, root: fx.Node, derived: DerivedConstants) -> None:
    """``a_1 x_1 + a_2 x_2 + ... -> [a_1, a_2, ...] [x_1; x_2; ...]``, and the mirror."""
    if root.kwargs:
        return
    lefts, rights, others = [], [], []
    for leaf in _addends(root):
        known = tuple(map(is_constant, leaf.args)) if leaf.target is _MM else ()
        if known == (True, False) and len(leaf.users) == 1:
            lefts.append(leaf)
        elif known == (False, True) and len(leaf.users) == 1:
            rights.append(leaf)
        else:
            others.append(leaf)
    joined = []
    for leaves, which in ((lefts, 0), (rights, 1)):
        if len(leaves) < _LEAST:
            others += leaves
            continue
        constant = _joined_constant(
            graph, root, derived, [leaf.args[which] for leaf in leaves], 1 - which
        )
        tangent = _side_by_side(
            graph, root, [leaf.args[1 - which] for leaf in leaves], which
        )
        operands = (constant, tangent) if which == 0 else (tangent, constant)
        joined.append(call_before(graph, root, _MM, operands, shape_of(root)))
    if not joined:
        return
    total, *more = [*others, *joined]
    for addend in more:
        total = call_before(graph, root, _ADD, (total, addend), shape_of(root))
    root.replace_all_uses_with(total)
    graph.erase_node(root)


def _addends(root: fx.Node) -> list[fx.Node]:
    """List what a sum adds, inner sums and double transposes taken apart."""
    found: list[fx.Node] = []
    pending = list(reversed(root.all_input_nodes)) if _is_plain(root) else [root]
    while pending:
        yield_point()
        node = pending.pop()
        while node.target is _T and _is_transposed_once(node):
            node = node.args[0].args[0]  # type: ignore[union-attr,assignment]
        if node.target is _ADD and len(node.users) == 1 and _is_plain(node):
            pending += reversed(node.all_input_nodes)
        else:
            found.append(node)
    return found


def _is_plain(node: fx.Node) -> bool:
    """Tell whether a node is ``a + b`` of two nodes of its own shape."""
    operands = node.all_input_nodes
    alike = all(shape_of(operand) == shape_of(node) for operand in operands)
    return not node.kwargs and len(operands) == 2 and alike


def _is_transposed_once(node: fx.Node) -> bool:
    """Tell whether a transpose undoes another, and nobody else needs either."""
    inner: Any = node.args[0]
    alone = len(node.users) == 1 and len(inner.users) == 1
    return alone and inner.target is _T


def _joined_constant(
    graph: fx.Graph,
    at: fx.Node,
    derived: DerivedConstants,
    parts: Sequence[Any],
    dim: int,
) -> fx.Node:
    """Make a constant of several, along an axis."""
    read = [named(part) for part in parts]
    return new_constant(
        graph,
        at,
        derived,
        _along(parts, dim),
        Derivation(
            names_of(*parts),
            lambda values: torch.cat([one(values) for one in read], dim),
        ),
    )


def _side_by_side(
    graph: fx.Graph, at: fx.Node, parts: Sequence[Any], dim: int
) -> fx.Node:
    """Join tangents along an axis; transposed ones before they are transposed."""
    # note: `which` of the constant is the axis of the tangents too: [m, k] by [k, n].
    if all(part.target is _T for part in parts):
        bases = [part.args[0] for part in parts]
        whole = _along(bases, 1 - dim)
        joined = call_before(
            graph, at, aten.cat.default, (bases, 1 - dim), tuple(whole.shape)
        )
        return call_before(graph, at, _T, (joined,), tuple(reversed(whole.shape)))
    whole = _along(parts, dim)
    return call_before(
        graph, at, aten.cat.default, (list(parts), dim), tuple(whole.shape)
    )


def _along(parts: Sequence[Any], dim: int) -> Tensor:
    """Say what several have for a shape together."""
    value: Tensor = parts[0].meta["val"]
    shape = list(value.shape)
    shape[dim] = sum(shape_of(part)[dim] for part in parts)
    return value.new_empty(shape)
