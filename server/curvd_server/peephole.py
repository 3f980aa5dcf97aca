"""Simplifications of a linear program.

Each rule uses what a general autograd engine cannot know: which operands never change
between products. All keep the result up to rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_ADD, _MUL, _MM = aten.add.Tensor, aten.mul.Tensor, aten.mm.default
_CONV = aten.convolution_backward.default
_SCALES = {
    aten.gelu_backward.default,
    aten.silu_backward.default,
    aten.tanh_backward.default,
    aten.sigmoid_backward.default,
    aten.elu_backward.default,
    aten.softplus_backward.default,
}
"""Elementwise and linear in the first operand: a fixed factor in disguise."""
_SHAPES = {aten.t.default, aten.view.default, aten._unsafe_view.default}


def simplify(
    graph: fx.Graph, constants: Mapping[str, Any]
) -> tuple[fx.Graph, dict[str, Any]]:
    """Apply all rules.

    Args:
        graph: A linear program; owned by the caller and rewritten.
        constants: Values of its ``get_attr`` nodes.

    Returns:
        The graph and the constants that it still names.
    """
    values = dict(constants)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.target is _ADD:
            _drop_zero(graph, node, values)
        elif node.target is aten.copy.default:
            _drop_copy(graph, node)
    for node in list(graph.nodes):
        if node.target in _SCALES:
            _fold_factor(graph, node, values)
    for node in list(graph.nodes):
        if node.target is _MUL:
            _gather_factors(graph, node, values)
    for node in list(graph.nodes):
        if node.target is _ADD:
            _accumulate_product(graph, node) or _join_weight_gradients(graph, node)
    graph.eliminate_dead_code()
    graph.lint()
    named = {node.target for node in graph.nodes if node.op == "get_attr"}
    return graph, {name: values[name] for name in values if name in named}


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
        operands = [o for o in node.all_input_nodes if o.op != "get_attr"]
        if node.op == "placeholder":
            renamed[node] = special.node_copy(node) if position in inputs else None
            position += 1
        elif node.op == "output":
            kept = [node.args[0][i] for i in outputs]
            special.output(
                tuple(r and (renamed[r] if r.op != "get_attr" else None) for r in kept)
            )
        elif operands and all(renamed[o] is None for o in operands):
            # A tangent joined to a constant is not zero when the tangent is.
            joins = node.target is aten.cat.default
            affine = joins and len(operands) < len(node.all_input_nodes)
            renamed[node] = special.node_copy(node, copied) if affine else None
        elif (only := _only_summand(node, renamed)) is not None:
            renamed[node] = only
        else:
            renamed[node] = special.node_copy(node, copied)
    special.eliminate_dead_code()
    return special


def _only_summand(
    node: fx.Node, renamed: Mapping[fx.Node, fx.Node | None]
) -> fx.Node | None:
    """Give ``a`` for ``a + 0`` of equal shapes."""
    if node.target is not _ADD or node.kwargs or len(node.all_input_nodes) != 2:
        return None
    alive = [o for o in node.all_input_nodes if renamed[o] is not None]
    if len(alive) != 1 or _shape(alive[0]) != _shape(node):
        return None
    return renamed[alive[0]]


def _constant(node: object) -> bool:
    return not isinstance(node, fx.Node) or node.op == "get_attr"


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _new_constant(
    graph: fx.Graph, at: fx.Node, values: dict[str, Any], value: Tensor
) -> fx.Node:
    name = f"f{len(values)}"
    values[name] = value
    with graph.inserting_before(at):
        node = graph.get_attr(name)
    # note: a graph is a reference cycle, so it must not hold the value itself.
    node.meta["val"] = torch.empty_like(value, device="meta")
    return node


def _value(node: Any, values: Mapping[str, Any]) -> Any:
    return values[node.target] if isinstance(node, fx.Node) else node


def _replace(
    graph: fx.Graph, old: fx.Node, target: Any, args: tuple[Any, ...]
) -> fx.Node:
    with graph.inserting_before(old):
        new = graph.call_function(target, args)
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    return new


def _drop_zero(graph: fx.Graph, node: fx.Node, values: Mapping[str, Any]) -> None:
    """``t + 0 -> t``: tangents of what does not depend on the parameters."""
    for tangent, other in (node.args, node.args[::-1]):
        if _constant(tangent) or not _constant(other) or node.kwargs:
            continue
        value = _value(other, values)
        zero = not value.any() if isinstance(value, Tensor) else value == 0
        if zero and _shape(tangent) == _shape(node):
            node.replace_all_uses_with(tangent)
            graph.erase_node(node)
            return


def _drop_copy(graph: fx.Graph, node: fx.Node) -> None:
    """``copy(anything, t) -> t`` if `t` has the result's shape and type already."""
    source: Any = node.args[1]
    have, want = source.meta.get("val"), node.meta.get("val")
    if isinstance(have, Tensor) and isinstance(want, Tensor):
        if have.shape == want.shape and have.dtype == want.dtype:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _fold_factor(graph: fx.Graph, node: fx.Node, values: dict[str, Any]) -> None:
    """``gelu_backward(t, h) -> t * gelu'(h)``, the factor computed once."""
    tangent, *others = node.args
    if _constant(tangent) or not all(map(_constant, others)):
        return
    like = next(_value(o, values) for o in others if isinstance(o, fx.Node))
    known = [_value(o, values) for o in others]
    extra = {k: _value(v, values) for k, v in node.kwargs.items()}
    factor = node.target(torch.ones_like(like), *known, **extra)  # type: ignore[operator]
    constant = _new_constant(graph, node, values, factor)
    _replace(graph, node, _MUL, (tangent, constant))


def _gather_factors(graph: fx.Graph, node: fx.Node, values: dict[str, Any]) -> None:
    """``(t * a) * b -> t * (a * b)`` with the constants multiplied once."""
    inner, outer = _split_factors(node)
    if inner is None or inner.target is not _MUL or len(inner.users) != 1:
        return
    tangent, factor = _split_factors(inner)
    if tangent is None:
        return
    product = _value(factor, values) * _value(outer, values)
    if isinstance(product, Tensor):
        full = _shape(tangent)
        if _shape(node) != full or product.numel() > tangent.meta["val"].numel():
            return
        product = _new_constant(graph, node, values, product)
    _replace(graph, node, _MUL, (tangent, product))
    graph.erase_node(inner)


def _split_factors(node: fx.Node) -> tuple[fx.Node | None, Any]:
    """Tell the tangent from the constant of a product."""
    a, b = node.args[:2]
    if _constant(b) and isinstance(a, fx.Node) and not _constant(a):
        return a, b
    if _constant(a) and isinstance(b, fx.Node) and not _constant(b):
        return b, a
    return None, None


def _accumulate_product(graph: fx.Graph, node: fx.Node) -> bool:
    """``P(x) + P(a @ b) -> P(addmm(x, a, b))`` for a change of shape P."""
    if node.kwargs or len(node.all_input_nodes) != 2:
        return False
    first, second = node.all_input_nodes
    for left, right in ((first, second), (second, first)):
        path_l, x = _peel(left)
        path_r, product = _peel(right)
        # The result is computed where `node` stands, so both operands are ready.
        if product.target is _MM and path_l == path_r and _shape(x) == _shape(product):
            if x.target is not _MM and path_l:
                continue
            with graph.inserting_before(node):
                result = graph.call_function(aten.addmm.default, (x, *product.args))
                result.meta = dict(product.meta)
                for target, args, meta in reversed(path_r_meta(right)):
                    result = graph.call_function(target, (result, *args))
                    result.meta = meta
            node.replace_all_uses_with(result)
            graph.erase_node(node)
            return True
    return False


def _peel(node: fx.Node) -> tuple[list[Any], fx.Node]:
    """Strip changes of shape that nobody else uses."""
    path: list[Any] = []
    while node.target in _SHAPES and len(node.users) == 1:
        path.append((node.target, node.args[1:]))
        node = node.args[0]  # type: ignore[assignment]
    if len(node.users) != 1 and path:
        return [(None, ())], node
    return path, node


def path_r_meta(node: fx.Node) -> Sequence[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """List the stripped changes of shape with what is known about their results."""
    path = []
    while node.target in _SHAPES and len(node.users) == 1:
        path.append((node.target, node.args[1:], dict(node.meta)))
        node = node.args[0]  # type: ignore[assignment]
    return path


def _join_weight_gradients(graph: fx.Graph, node: fx.Node) -> bool:
    """Add two convolution weight gradients by joining their mini-batches.

    ``gW(a, x) + gW(b, y) = gW([a; b], [x; y])``: the sum runs inside the kernel, which
    walks the weights once instead of three times. It pays where the weights are larger
    than the activations, which have to be copied.
    """
    if node.kwargs or len(node.all_input_nodes) != 2:
        return False
    pairs = [(n, _weight_gradient(n)) for n in node.all_input_nodes]
    (_, first), (_, second) = pairs
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


def _size(node: Any) -> int:
    value: Tensor = node.meta["val"]
    return value.numel()
