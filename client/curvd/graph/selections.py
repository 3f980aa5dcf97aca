"""What a mask chooses, ``x[mask]``, where its size never matters.

Graphs have no sizes that depend on values. But most of what is chosen is computed with
element by element, and then put back, ``y[mask] = x[mask].log()``, or added up. Both are
to be had from the whole tensor, with a one where nothing was chosen, because one is in
the domain of nearly every function, and what lies outside must not become NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from curvd.errors import InvalidGraph
from curvd.graph.aliases import Alias
from curvd.graph.tape import Tape, Value

UNKNOWN = object()
"""Stands for how many were chosen; only the checks that torch adds may use it."""


@dataclass(eq=False, slots=True)
class Selected(Alias):
    """Elements or rows of a tensor, as the whole tensor."""

    mask: Value | None = None
    """Where they are; it has the first axes of the tensor."""
    axes: int = 0
    """How many the mask has."""

    @classmethod
    def like(cls, alias: Alias, other: Selected) -> Selected:
        """Choose of a tensor what another one chooses.

        Args:
            alias: The tensor; it is not used any more.
            other: The other one.

        Returns:
            The choice.
        """
        return cls.chosen(alias.value, other.mask, other.axes)

    @classmethod
    def chosen(cls, value: Value, mask: Value | None, axes: int) -> Selected:
        """Give a choice memory of its own."""
        made: Selected = cls.of(value)  # type: ignore[assignment]
        made.mask, made.axes = mask, axes
        return made


def selection(tape: Tape, base: Alias, mask: Alias, dim: int, axes: int) -> Selected:
    """Choose elements of a tensor.

    Args:
        tape: Where operators go.
        base: The tensor.
        mask: The mask.
        dim: Axes of the tensor.
        axes: Axes of the mask.

    Returns:
        The elements.
    """
    here = mask.value
    outside = tape.emit("aten.logical_not.default", _widened(tape, here, dim - axes))
    value = tape.emit("aten.masked_fill.Scalar", base.value, outside, 1)
    return Selected.chosen(value, here, axes)


def put_back(tape: Tape, base: Value, values: Selected, rest: int) -> Value:
    """Replace elements of a tensor by those that were chosen with the same mask.

    Args:
        tape: Where operators go.
        base: The tensor.
        values: What it gets.
        rest: Axes of the tensor that the mask does not have.

    Returns:
        The tensor.
    """
    assert values.mask is not None
    here = _widened(tape, values.mask, rest)
    return tape.emit("aten.where.self", here, values.value, base)


def total(tape: Tape, values: Selected, shape: tuple[int, ...], *, mean: bool) -> Value:
    """Add up what was chosen.

    Args:
        tape: Where operators go.
        values: The elements.
        shape: The shape of each of the rows that were chosen.
        mean: Whether to divide by how many there are.

    Returns:
        A scalar.
    """
    assert values.mask is not None
    here = _widened(tape, values.mask, len(shape))
    outside = tape.emit("aten.logical_not.default", here)
    kept = tape.emit("aten.masked_fill.Scalar", values.value, outside, 0)
    added = tape.emit("aten.sum.default", kept)
    if not mean:
        return added
    count = tape.emit("aten.sum.default", values.mask)
    for size in shape:
        count = tape.emit("aten.mul.Tensor", count, size)
    return tape.emit("aten.div.Tensor", added, count)


def chosen_by(arguments: Mapping[str, Any]) -> list[Selected]:
    """List the choices among an operator's arguments."""
    return [a for a in _flat(arguments.values()) if isinstance(a, Selected)]


def is_elementwise(
    target: Any,
    arguments: Mapping[str, Any],
    dims: Sequence[int],
    chosen: Sequence[bool],
) -> bool:
    """Tell whether an operator treats all that was chosen alike.

    Args:
        target: The operator.
        arguments: Its arguments, some of them choices.
        dims: How many axes its tensors have.
        chosen: Which of these are choices.

    Returns:
        Whether the choices are one mask's, and nothing else has their first axis.
    """
    found = chosen_by(arguments)
    pointwise = torch.Tag.pointwise in target.tags
    one_mask = len({(id(s.mask), s.axes) for s in found}) == 1
    first = [dim for dim, choice in zip(dims, chosen, strict=True) if choice]
    others = [dim for dim, choice in zip(dims, chosen, strict=True) if not choice]
    apart = all(dim < min(first) for dim in others)
    return (pointwise or target is torch.ops.aten.clone.default) and one_mask and apart


def check_known(tape: Tape, operator: str, arguments: Mapping[str, Any]) -> None:
    """Refuse an operator that needs to know how many were chosen.

    Args:
        tape: Knows where the operator comes from.
        operator: As the contract names it.
        arguments: Its arguments.

    Raises:
        InvalidGraph: With what to do.
    """
    if any(a is UNKNOWN for a in _flat(arguments.values())):
        raise refusal(tape, operator)


def refusal(tape: Tape, operator: str) -> InvalidGraph:
    """Say that a size depends on values."""
    msg = (
        f"operator {operator}{tape.where} makes a shape from a mask: use torch.where, and "
        "multiply by the mask instead of selecting"
    )
    return InvalidGraph(msg, operator=operator, source=tape.source)


def _widened(tape: Tape, mask: Value, axes: int) -> Value:
    for _ in range(axes):
        mask = tape.emit("aten.unsqueeze.default", mask, -1)
    return mask


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value
