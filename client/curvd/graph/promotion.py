"""Integers that become floating point: in the type that is the default of this process.

``torch.arange(6) / 7`` is in float64 after ``torch.set_default_dtype(torch.float64)``. No
server has that default, so a graph says the type: integers are converted beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from curvd.errors import InvalidGraph
from curvd.graph.schemas import meta_of, names
from curvd.graph.tape import Tape, Value

SERVERS = torch.float32
"""The default type of every server."""
_CHOICES = frozenset({"condition", "mask"})
"""Arguments that stay what they are."""


def promoted(
    tape: Tape, node: fx.Node, target: Any, operator: str, plain: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Say the type where an operator would ask for the default one.

    Args:
        tape: Where conversions go.
        node: Calls the operator.
        target: The operator.
        operator: As the contract names it.
        plain: Its arguments by name.

    Returns:
        The arguments, changed where the default type decides.

    Raises:
        InvalidGraph: If it decides, and nothing of the operator's can be converted.
    """
    made = meta_of(node)
    if torch.get_default_dtype() is SERVERS or made is None:
        return plain
    if not (made.is_floating_point() or made.is_complex()):
        return plain
    given = [meta_of(n) for n in node.all_input_nodes]
    if any(m is not None and (m.is_floating_point() or m.is_complex()) for m in given):
        return plain
    if "dtype" in names(target):
        return {**plain, "dtype": plain["dtype"] or made.dtype}
    traced = dict(zip(names(target), node.args, strict=False)) | node.kwargs
    changed = {
        name: tape.emit("aten.to.dtype", value, made.dtype)
        if isinstance(value, Value)
        and name not in _CHOICES
        and meta_of(traced.get(name)) is not None
        else value
        for name, value in plain.items()
    }
    if all(changed[name] is value for name, value in plain.items()):
        msg = (
            f"operator {operator}{tape.where} makes numbers of the default type, which is "
            f"{made.dtype} here and {SERVERS} at a server: give it tensors of a type, "
            f"torch.tensor(0.5, dtype={made.dtype})"
        )
        raise InvalidGraph(msg, operator=operator, source=tape.source)
    return changed
