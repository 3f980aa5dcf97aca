"""Average pooling of windows that do not overlap, by sums that a processor is quick at.

On a CPU torch pools a row-major tensor element by element, which takes 3.5 to 9 times as long
as to add whole rows, then columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from curvd_server.engine.program.constants import (
    Derivation,
    DerivedConstants,
    new_constant,
    shape_of,
)
from curvd_server.engine.program.nodes import call_before
from curvd_server.system import yield_point

aten = torch.ops.aten

_LARGEST = 4
"""Rows or columns of a window up to which they are added one after the other."""


def add_windows(graph: fx.Graph, derived: DerivedConstants) -> None:
    """Write average pooling and its gradient as sums and copies, where that is quicker.

    Args:
        graph: A linear program with shapes; it is rewritten.
        derived: How constants are made.
    """
    for node in list(graph.nodes):
        yield_point()
        if node.target is aten.avg_pool2d.default:
            x, *options = node.args
            if (window := _window(x, *options)) is not None:
                _pool(graph, node, window)
        elif node.target is aten.avg_pool2d_backward.default:
            _, x, *options = node.args
            if (window := _window(x, *options)) is not None:
                _spread(graph, node, window, derived)


def _window(
    x: Any,
    size: list[int],
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,  # of nothing where windows fill the image
    include_padding: bool = True,
    divisor: int | None = None,
) -> tuple[int, int, int] | None:
    """Read a window's height, width and divisor; None if it is left to torch."""
    value: Tensor = x.meta["val"]
    (height, *more), image = size, shape_of(x)[-2:]
    width = more[0] if more else height
    apart = list(stride) in ([], [height, width], [height] if height == width else [])
    padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    filled = image[0] % height == 0 and image[1] % width == 0
    rows = value.is_contiguous() and value.device.type == "cpu"
    if not (apart and filled and rows) or padded or max(height, width) > _LARGEST:
        return None
    return height, width, divisor or height * width


def _pool(graph: fx.Graph, node: fx.Node, window: tuple[int, int, int]) -> None:
    """Average the windows: rows are added, then columns."""
    height, width, divisor = window
    *lead, rows, columns = shape_of(node)
    x: Any = node.args[0]
    across = (*lead, rows, columns * width)
    total = _summed(graph, node, x, (*lead, rows, height, columns * width), -2, across)
    total = _summed(
        graph, node, total, (*across[:-1], columns, width), -1, shape_of(node)
    )
    scale = (total, 1 / divisor)
    _replace(
        graph, node, call_before(graph, node, aten.mul.Tensor, scale, shape_of(node))
    )


def _summed(
    graph: fx.Graph,
    at: fx.Node,
    x: fx.Node,
    split: tuple[int, ...],
    axis: int,
    shape: tuple[int, ...],
) -> fx.Node:
    """Add the slices along an axis that a view makes."""
    parts = call_before(graph, at, aten.view.default, (x, list(split)), split)
    total, *more = (
        call_before(graph, at, aten.select.int, (parts, axis, i), shape)
        for i in range(split[axis])
    )
    for part in more:
        total = call_before(graph, at, aten.add.Tensor, (total, part), shape)
    return total


def _spread(
    graph: fx.Graph,
    node: fx.Node,
    window: tuple[int, int, int],
    derived: DerivedConstants,
) -> None:
    """Give each element of a window the same share: columns are repeated, then rows."""
    height, width, divisor = window
    g: Any = node.args[0]
    *lead, rows, columns = shape_of(g)
    value: Tensor = node.meta["val"]
    kind: Any = {"dtype": value.dtype, "device": value.device}
    shares = new_constant(
        graph, node, derived, value.new_empty(width),
        Derivation((), lambda _: torch.full((width,), 1 / divisor, **kind)),
    )  # fmt: skip
    one = call_before(graph, node, aten.unsqueeze.default, (g, -1), (*shape_of(g), 1))
    wide = call_before(
        graph, node, aten.mul.Tensor, (one, shares), (*shape_of(g), width)
    )
    across = (*lead, rows, columns * width)
    row = call_before(graph, node, aten.view.default, (wide, list(across)), across)
    whole = (*lead, rows, height, columns * width)
    tall = call_before(graph, node, aten.stack.default, ([row] * height, -2), whole)
    shape = shape_of(node)
    _replace(
        graph,
        node,
        call_before(graph, node, aten.view.default, (tall, list(shape)), shape),
    )


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    graph.erase_node(old)
