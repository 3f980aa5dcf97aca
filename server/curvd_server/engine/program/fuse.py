"""Fewer kernels for a linear program: sums that go into the operation that feeds them.

It is done to a program that is cut to its block already (`restrict`): what is fused
cannot be told apart again.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from curvd_server.engine.program.constants import shape_of
from curvd_server.engine.program.simplify import drop_unused
from curvd_server.system import yield_point

aten = torch.ops.aten

_ADD, _SUB, _MUL = aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor
_MM = aten.mm.default
_CONV = aten.convolution_backward.default
_SHAPES = {aten.t.default, aten.view.default, aten._unsafe_view.default}

Path = list[tuple[Any, tuple[Any, ...], dict[str, Any]]]
"""Changes of shape, the last first: operation, arguments, what is known of the result."""


def fuse(graph: fx.Graph) -> fx.Graph:
    """Fuse sums of products, of convolutions' weight gradients and of elements.

    Args:
        graph: A linear program with shapes; it is rewritten.

    Returns:
        The graph.
    """
    for node in list(graph.nodes):
        yield_point()
        if node.kwargs or len(node.all_input_nodes) != 2:
            continue
        if node.target is _SUB:
            _accumulate_elements(graph, node)
        elif node.target is _ADD:
            _ = (
                _accumulate_product(graph, node)
                or _join_weight_gradients(graph, node)
                or _accumulate_elements(graph, node)
            )
    drop_unused(graph)
    graph.lint()
    return graph


def _accumulate_product(graph: fx.Graph, node: fx.Node) -> bool:
    """``P(x) + P(a @ b) -> P(addmm(x, a, b))`` for a change of shape P."""
    first, second = node.all_input_nodes
    for left, right in ((first, second), (second, first)):
        path_l, x = _peel(left)
        path_r, product = _peel(right)
        if product.target is not _MM or shape_of(x) != shape_of(product):
            continue
        if [step[:2] for step in path_l] != [step[:2] for step in path_r]:
            continue
        if (path_l and x.target is not _MM) or len(product.users) != 1:
            continue
        # The result is computed where `node` stands, so both operands are ready.
        with graph.inserting_before(node):
            result = graph.call_function(aten.addmm.default, (x, *product.args))
            result.meta = dict(product.meta)
            for target, args, meta in reversed(path_r):
                result = graph.call_function(target, (result, *args))
                result.meta = meta
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        return True
    return False


def _peel(node: fx.Node) -> tuple[Path, fx.Node]:
    """Strip changes of shape that nobody else uses."""
    path: Path = []
    while node.target in _SHAPES and len(node.users) == 1:
        path.append((node.target, node.args[1:], dict(node.meta)))
        node = node.args[0]  # type: ignore[assignment]
    return path, node


def _join_weight_gradients(graph: fx.Graph, node: fx.Node) -> bool:
    """Add two convolution weight gradients by joining their mini-batches.

    ``gW(a, x) + gW(b, y) = gW([a; b], [x; y])``: the sum runs inside the kernel, which
    walks the weights once instead of three times. It pays where the weights are larger
    than the activations, which have to be copied.
    """
    first, second = (_weight_gradient(n) for n in node.all_input_nodes)
    if first is None or second is None or first.args[2:] != second.args[2:]:
        return False
    moved = sum(_size(o) for c in (first, second) for o in c.args[:2])
    if moved > 2 * _size(node):
        return False
    with graph.inserting_before(node):
        joined = [
            graph.call_function(aten.cat.default, ([a, b],))
            for a, b in zip(first.args[:2], second.args[:2], strict=True)
        ]
        both = graph.call_function(_CONV, (*joined, *first.args[2:]))
        result = graph.call_function(operator.getitem, (both, 1))
    for new, old in zip(joined, first.args[:2], strict=True):
        value = old.meta["val"]  # type: ignore[union-attr]
        new.meta["val"] = value.new_empty(2 * value.shape[0], *value.shape[1:])
    both.meta, result.meta = dict(first.meta), dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return True


def _weight_gradient(node: fx.Node) -> fx.Node | None:
    """Find the convolution whose weight gradient, and nothing else, `node` is."""
    if node.target is not operator.getitem or node.args[1] != 1:
        return None
    conv = node.args[0]
    if not isinstance(conv, fx.Node) or conv.target is not _CONV:
        return None
    if list(conv.args[10]) != [False, True, False] or len(node.users) != 1:  # type: ignore[arg-type]
        return None
    return conv


def _accumulate_elements(graph: fx.Graph, node: fx.Node) -> bool:
    """``x + a * b -> addcmul(x, a, b)``: one pass over memory instead of two.

    Likewise ``x - a * b``, and ``x + a * 0.5``.
    """
    first, second = node.args
    subtracts = node.target is _SUB
    for x, product in ((first, second), (second, first))[: 1 if subtracts else 2]:
        if not isinstance(product, fx.Node) or product.target is not _MUL:
            continue
        if len(product.users) != 1 or product.kwargs:
            continue
        a, b = product.args
        if any(_type(o) != _type(node) for o in (x, a)):
            continue
        call: tuple[Any, tuple[Any, ...], dict[str, Any]]
        if isinstance(b, int | float):
            call = node.target, (x, a), {"alpha": b}
        elif _type(b) == _type(node):
            value = {"value": -1} if subtracts else {}
            call = aten.addcmul.default, (x, a, b), value
        else:
            continue
        with graph.inserting_before(node):
            result = graph.call_function(*call)
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        return True
    return False


def _type(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def _size(node: Any) -> int:
    value: Tensor = node.meta["val"]
    return value.numel()
