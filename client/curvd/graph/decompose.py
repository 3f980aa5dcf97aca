"""Operators that no server knows are taken apart, the way torch itself does it.

Most of torch's operators are written in terms of others: ``linalg.norm`` in terms of
vector and matrix norms, ``fft.rfft`` of a padded transform. So the contract's list can
be short. Whatever comes out is translated like any traced code, so it may use only
what is on the list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from curvd.contract import graph_ops
from curvd.graph.plain import PLAIN
from curvd.graph.rewrites import is_rewritten
from curvd.graph.schemas import EXACT, RENAMED


@functools.cache
def table() -> Mapping[Any, Callable[..., Any]]:
    """Collect what torch says about operators that are not on the list.

    Returns:
        Operator -> a function that computes it by others.
    """
    return {
        target: function
        for target, function in decomposition_table.items()
        if isinstance(target, torch._ops.OpOverload)
        and not (_is_composite(target) or is_known(target))
    } | dict(PLAIN)


def is_known(target: Any) -> bool:
    """Tell whether an operator is translated as it is.

    Args:
        target: An operator of aten.

    Returns:
        Whether servers run it, under this name or another.
    """
    name = target.overloadpacket.__name__
    operator = f"aten.{name}.{target._overloadname}"
    if target in PLAIN or target._overloadname == "padding":
        return False  # note: "same" pads by what the kernel's size says
    renamed = name in EXACT or name in RENAMED or name == "to" or name.endswith("_")
    return renamed or is_rewritten(operator) or graph_ops.is_allowed(operator)


def decomposed(
    node: fx.Node, target: Any
) -> tuple[fx.GraphModule, list[fx.Node]] | None:
    """Trace what an operator does.

    Args:
        node: Calls it; the traced code knows the shapes of its arguments.
        target: The operator, or the form of it that is not in-place.

    Returns:
        The operators that it consists of, and which values they take; None if torch
        has no other way to compute it.
    """
    function = table().get(target)
    if function is None:
        if not _is_composite(target):
            return None
        function = target.decompose
    leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
    places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]
    given = [leaves[k].meta.get("val") for k in places]
    if any(value is None for value in given):
        return None

    def run(*values: Any) -> Any:
        filled = list(leaves)
        for k, value in zip(places, values, strict=True):
            filled[k] = value
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return function(*args, **kwargs)

    mode = detect_fake_mode(given)
    if mode is None:
        return None
    try:
        with torch.no_grad(), mode, enable_python_dispatcher():
            body = make_fx(run, dict(table()))(*given)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None  # it looks at values, or at what a traced tensor does not have
    if any(str(node.target).startswith("prims.") for node in body.graph.nodes):
        return None
    return body, [leaves[k] for k in places]


def _is_composite(target: Any) -> bool:
    try:
        return bool(target._can_decompose())
    except RuntimeError:  # an overload of TorchScript alone
        return False
