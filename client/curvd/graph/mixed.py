"""Modules whose parameters have several types, computed in one.

A large model is trained with its body in bfloat16, and adapters or a head in float32. A
session computes in one type. One that holds every parameter exactly gives the module's
function without the roundings between its parts; so a graph of such a module says that one
type wherever the module has one of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from curvd.contract import Dtype
from curvd.errors import InvalidSpec
from curvd.graph.tape import DTYPE_NAMES
from curvd.v1 import graph_pb2 as graph_pb

_SESSIONS = {
    Dtype.FLOAT32: torch.float32,
    Dtype.FLOAT64: torch.float64,
    Dtype.BFLOAT16: torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Types:
    """The floating point types of a module's parameters, and one that holds them all."""

    own: frozenset[torch.dtype]
    common: torch.dtype

    @property
    def narrowest(self) -> torch.dtype:
        """That of the module's with the fewest digits."""
        return max(self.own, key=lambda t: torch.finfo(t).eps)

    def graph(
        self, graph: graph_pb.Graph, tensors: Mapping[str, Tensor]
    ) -> tuple[graph_pb.Graph, Mapping[str, Tensor]]:
        """Write a graph anew, so that the common type stands for each of the module's.

        Casts from one of them to another do nothing there.

        Args:
            graph: As it was traced; it is changed.
            tensors: Its tensors by name.

        Returns:
            Both.
        """
        names = {DTYPE_NAMES[t]: DTYPE_NAMES[self.common] for t in self.own}
        graph.dtype = names.get(graph.dtype, graph.dtype)
        for tensor in graph.tensors:
            tensor.dtype = names.get(tensor.dtype, tensor.dtype)
        for given in graph.inputs:
            given.dtype = names.get(given.dtype, given.dtype)
        for node in graph.nodes:
            for argument in node.arguments:
                for literal in (argument.literal, *argument.literals.items):
                    if literal.dtype in names:
                        literal.dtype = names[literal.dtype]
        return graph, {name: self.values(held) for name, held in tensors.items()}

    def values(self, held: Any) -> Any:
        """Convert what is in one of the module's types.

        Args:
            held: Tensors, in whatever they are held.

        Returns:
            The same with other tensors.
        """

        def converted(tensor: Tensor) -> Tensor:
            narrow = tensor.dtype in self.own
            return tensor.detach().to(self.common) if narrow else tensor

        return pytree.tree_map_only(Tensor, converted, held)


def types_of(module: nn.Module) -> dict[torch.dtype, str]:
    """List the types of a module's parameters that are floating point.

    Args:
        module: The model.

    Returns:
        The first parameter of each.
    """
    first: dict[torch.dtype, str] = {}
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            first.setdefault(parameter.dtype, name)
    return first


def said(types: Mapping[torch.dtype, str]) -> str:
    """Name types with a parameter of each, for a message."""
    return ", ".join(
        f"{str(t).removeprefix('torch.')} as {name}" for t, name in types.items()
    )


def mixed(module: nn.Module, dtype: Dtype | None) -> Types | None:
    """Find the types of a module that is to be computed in another.

    Args:
        module: The model.
        dtype: What the caller chose for the session.

    Returns:
        Its types; None if it has one, and a session has that, too.

    Raises:
        InvalidSpec: If nobody chose, or the chosen type does not hold the parameters.
    """
    types = types_of(module)
    if len(types) < 2 and not {*types} - {*_SESSIONS.values()}:
        return None
    if dtype is None:
        several = "several types" if len(types) > 1 else "a type that no session has"
        msg = (
            f"the module's parameters have {several} ({said(types)}), and a session "
            "computes in one: name it, dtype='float32' or 'float64'"
        )
        raise InvalidSpec(msg, types=len(types))
    common = functools.reduce(torch.promote_types, types)
    if common not in _SESSIONS.values():
        common = torch.float32
    chosen = _SESSIONS[dtype]
    rounded = {t: n for t, n in types.items() if not _holds(chosen, t)}
    if rounded:
        msg = (
            f"dtype {dtype.value} would round the module's parameters of type "
            f"{said(rounded)}: name one that holds all of them, "
            f"{' or '.join(d.value for d, t in _SESSIONS.items() if _holds(t, common))}"
        )
        raise InvalidSpec(msg, dtype=dtype)
    return Types(frozenset(types), common)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Tell whether each number of a type is one of another."""
    return torch.promote_types(wide, narrow) == wide
