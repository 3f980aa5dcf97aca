"""Any module as a graph that a server can check and run; needs ``curvd[torch]``.

Importing this costs nothing: torch is imported when something is exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from curvd.types import Mode
from curvd.v1 import graph_pb2 as graph_pb

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """A module as data: what `Client.register_model` takes instead of a builder."""

    graph: graph_pb.Graph = field(repr=False)
    state: Mapping[str, Any] = field(repr=False)
    """Tensors by the names that they go by, constants of the code included."""
    mode: Mode
    """What a session of it needs: batch statistics if BatchNorm was training."""
    parameters: tuple[str, ...]
    """Names of those that are differentiated, in order."""


def export(
    module: nn.Module, inputs: Any, *, output: str | int | None = None
) -> ExportedModel:
    """Write a module as a graph of operators, with its tensors.

    The module is traced with a few of the given data points; the size of the mini-batch
    stays open, every other size is fixed. Call ``module.eval()`` before, unless
    BatchNorm is to use the statistics of the mini-batches.

    Args:
        module: Anything that torch.export traces: no branches on values, no chance.
        inputs: What it is called with: a tensor, a tuple of arguments, or a dict of
            keyword arguments; each tensor has the leading axis N. The server binds a
            dataset's tensors by order, or by these names.
        output: Which of its results, by name or index. None: ``logits`` if there is
            such a field, else the first tensor.

    Returns:
        The model.

    Raises:
        ModuleNotFoundError: If torch is not installed.
    """
    from curvd.graph.capture import capture

    graph, state, mode = capture(module, inputs, output)
    parameters = tuple(
        tensor.names[0]
        for tensor in graph.tensors
        if tensor.role == graph_pb.GRAPH_TENSOR_ROLE_PARAMETER
    )
    return ExportedModel(graph, state, mode, parameters)
