"""Which operations of a traced model are linear in a weight, and which are something else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from curvd.contract import ParameterLayout
from curvd_server.engine.kronecker.forms import (
    Added,
    Convolution,
    Embedding,
    Form,
    Matrices,
    Matrix,
    TransposedConvolution,
)
from curvd_server.engine.kronecker.movements import (
    Indices,
    as_indices,
    distinct,
    follow,
)

_aten = torch.ops.aten
_PASSES = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.alias.default,
}
"""Between a product and the bias that is added to it."""


@dataclass(frozen=True, slots=True)
class Site:
    """An operation that consumes parameters and is linear in them."""

    node: fx.Node
    """Whose output is tapped."""
    operand: fx.Node
    """What the weight is applied to."""
    form: Form
    weight: Tensor
    """[G, d_in, d_out] Indices into the vector of length P."""
    bias: Tensor | None = None
    """[G, d_out] Indices of the bias that is added, if there is one."""

    @property
    def index(self) -> Tensor:
        """Give weight and bias, the last input a one: [G, d_in (+ 1), d_out]."""
        if self.bias is None:
            return self.weight
        return torch.cat((self.weight, self.bias[:, None]), 1)


@dataclass(frozen=True, slots=True)
class Sites:
    """A traced model, and what consumes its parameters."""

    module: fx.GraphModule
    linear: tuple[Site, ...]
    """In the order of the graph."""
    other: tuple[tuple[str, Tensor], ...]
    """What is not linear or not known, by the operator's name, and the indices it takes."""


def find(module: fx.GraphModule, layout: ParameterLayout) -> Sites:
    """Find what consumes the parameters of a traced model.

    Args:
        module: The traced model; its first inputs are the parameters.
        layout: Where each parameter lies.

    Returns:
        The operations.
    """
    indices = follow(module.graph, layout)
    linear: dict[fx.Node, Site] = {}
    other: list[tuple[str, Tensor]] = []
    for node in module.graph.nodes:
        held = [n for n in node.all_input_nodes if n in indices]
        if not held or node in indices:
            continue
        if node.op == "output":  # a parameter is an output itself
            other += [("output", t) for t in _tensors(held, indices)]
            continue
        site, left = _site(node, indices, linear)
        if site is not None:
            linear[site.node] = site
        other += [(_name(node), t) for t in _tensors(left, indices)]
    return Sites(module, tuple(linear.values()), tuple(other))


def _site(
    node: fx.Node, indices: Indices, linear: dict[fx.Node, Site]
) -> tuple[Site | None, list[fx.Node]]:
    """Read one consumer: its site, and the operands that are in none."""
    held = [n for n in node.all_input_nodes if n in indices]
    site: Site | None = None
    if node.target is _aten.mm.default:
        site = _matrix(node, node.args, indices)
    elif node.target is _aten.addmm.default and not node.kwargs:
        site = _matrix(node, node.args[1:], indices)
        bias = as_indices(indices.get(_node(node.args[0])))
        if site is not None and bias is not None:
            site = _with_bias(site, bias, transposed=site.form.transposed)  # type: ignore[attr-defined]
        elif bias is not None:
            site = _added(node, bias)
    elif node.target is _aten.bmm.default:
        site = _matrices(node, indices)
    elif node.target is _aten.convolution.default:
        site = _convolution(node, indices)
    elif node.target is _aten.embedding.default:
        site = _embedding(node, indices)
    elif node.target is _aten.add.Tensor and not node.kwargs:
        site = _sum(node, indices, linear)
    if site is None:
        return None, held
    # All else that a site consumes is its weight and its bias.
    is_left = node.target is _aten.addmm.default and site.bias is None and len(held) > 1
    return site, [n for n in held if n is node.args[0]] if is_left else []


def _node(value: Any) -> Any:
    return value if isinstance(value, fx.Node) else None


def _matrix(node: fx.Node, args: Any, indices: Indices) -> Site | None:
    left, right = args
    weight, other = as_indices(indices.get(right)), as_indices(indices.get(left))
    if weight is not None and left not in indices:
        return Site(node, left, Matrix(transposed=False), weight[None])
    if other is not None and right not in indices:
        return Site(node, right, Matrix(transposed=True), other.mT[None])
    return None


def _matrices(node: fx.Node, indices: Indices) -> Site | None:
    left, right = node.args
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    transposed = left in indices
    if transposed == (right in indices):
        return None
    weight = as_indices(indices[left if transposed else right])
    if weight is None:
        return None
    weight = weight.mT if transposed else weight
    operand = right if transposed else left
    if bool((weight == weight[:1]).all()):
        form = Matrices(transposed=transposed, grouped=False)
        return Site(node, operand, form, weight[:1])
    if distinct(weight).numel() < weight.numel():
        return None
    return Site(node, operand, Matrices(transposed=transposed, grouped=True), weight)


def _convolution(node: fx.Node, indices: Indices) -> Site | None:
    x, weight, bias, stride, padding, dilation, transposed, more, groups = node.args
    index: Any = as_indices(indices.get(_node(weight)))
    if index is None or x in indices:
        return None
    count, groups = index.ndim - 2, int(groups)  # type: ignore[arg-type]
    shape: dict[str, Any] = {
        "kernel": tuple(index.shape[2:]),
        "stride": _each(stride, count),
        "padding": _each(padding, count),
        "dilation": _each(dilation, count),
        "groups": groups,
    }
    form: Form
    if transposed:  # the weight has the inputs' channels first, in groups
        form = TransposedConvolution(**shape, output_padding=_each(more, count))
        index = index.flatten(2).unflatten(0, (groups, -1)).movedim(2, 3)
        index = index.flatten(1, 2)
    else:
        form = Convolution(**shape)
        index = index.reshape(groups, -1, index[0].numel()).mT
    assert isinstance(x, fx.Node)
    site = Site(node, x, form, index)
    own = as_indices(indices.get(_node(bias)))
    return site if own is None else replace(site, bias=own.reshape(groups, -1))


def _each(value: Any, count: int) -> tuple[int, ...]:
    """Give a setting for each axis."""
    return tuple(value) if len(value) == count else tuple(value) * count


def _embedding(node: fx.Node, indices: Indices) -> Site | None:
    table, ids, *options = node.args
    weight = as_indices(indices.get(_node(table)))
    if weight is None or weight.ndim != 2 or any(options[1:]):
        return None
    padding: Any = options[0] if options else -1
    assert isinstance(ids, fx.Node)
    return Site(node, ids, Embedding(int(padding)), weight[None])


def _sum(node: fx.Node, indices: Indices, linear: dict[fx.Node, Site]) -> Site | None:
    """Join a bias with the product that it is added to, or let it be by itself."""
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    if (left in indices) == (right in indices):
        return None
    bias = as_indices(indices[left if left in indices else right])
    if bias is None:
        return None
    source = right if left in indices else left
    while source.target in _PASSES and len(source.users) == 1:
        before = source.args[0]
        assert isinstance(before, fx.Node)
        source = before
    site = linear.get(source)
    if site is not None and len(source.users) == 1 and site.bias is None:
        if isinstance(site.form, Matrix) and not site.form.transposed:
            joined = _with_bias(site, bias, transposed=False)
        elif isinstance(site.form, Matrices) and not site.form.grouped:
            joined = _with_bias(site, bias, transposed=site.form.transposed)
        else:
            joined = site
        if joined.bias is not None:
            return joined
    return _added(node, bias)


def _with_bias(site: Site, bias: Tensor, *, transposed: bool) -> Site:
    """Add a bias that varies along the outputs alone."""
    outputs = site.weight.shape[2]
    along = bias.reshape(-1) if bias.numel() == outputs else None
    axis = 0 if bias.ndim == 1 else bias.ndim - 1 - int(transposed)
    if along is None or bias.shape[axis] != outputs or (bias.ndim == 1 and transposed):
        return site
    return replace(site, bias=along[None])


def _added(node: fx.Node, bias: Tensor) -> Site | None:
    """A bias by itself, whose output is the sum."""
    shape = node.meta["val"].shape
    missing = len(shape) - bias.ndim
    own = [missing + i for i, n in enumerate(bias.shape) if n > 1]
    if any(shape[a] != bias.shape[a - missing] for a in own):
        return None
    if missing < 0 or distinct(bias).numel() < bias.numel():
        return None
    # A single number, or one that is repeated along no axis, varies along the last.
    axes = tuple(own) if own else (len(shape) - 1,) if shape[-1] == 1 else None
    if axes is None:
        return None
    return Site(node, node, Added(axes), bias.reshape(1, 1, -1))


def _tensors(nodes: list[fx.Node], indices: Indices) -> Iterator[Tensor]:
    for node in nodes:
        value = indices[node]
        yield from [value] if isinstance(value, Tensor) else value


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]
