"""What a session of a module needs beside the module: example outputs, proof, data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from curvd.contract import LossSpec, Mode, Output
from curvd.graph.capture import Chosen, few, sampled
from curvd.graph.checkpoints import plain_checkpoints
from curvd.graph.losses import evaluated
from curvd.graph.manifest import inputs_of
from curvd.graph.packing import detached
from curvd.graph.proof import Objective, prove
from curvd.graph.statistics import in_mode
from curvd.v1 import graph_pb2 as graph_pb


def example_outputs(module: nn.Module, inputs: Any, output: Output, mode: Mode) -> Any:
    """Run a module on a few data points and leave its buffers alone.

    Args:
        module: The model.
        inputs: As for `curvd.export`.
        output: Which of its results.
        mode: Whose statistics BatchNorm uses.

    Returns:
        Its outputs, [B, ...]; several as they are, or in a tuple.
    """
    rows = inputs_of(module.forward, few(inputs))
    picked = _Picked(Chosen(module, output))
    state = {name: buffer.clone() for name, buffer in picked.named_buffers()}
    # note: a forward that differentiates needs gradients to be on.
    with torch.enable_grad(), plain_checkpoints(), in_mode(module, mode):
        arguments = (rows.args, dict(rows.kwargs))
        result = torch.func.functional_call(picked, state, arguments)
    return detached(result)


class _Picked(nn.Module):
    """Calls a module, and leaves several outputs apart."""

    def __init__(self, chosen: Chosen) -> None:
        super().__init__()
        self.chosen = chosen

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module and pick from what it returns."""
        return self.chosen.picked(args, kwargs)


def prove_module(
    module: nn.Module,
    inputs: Any,
    output: Output,
    mode: Mode,
    graph: graph_pb.Graph,
    tensors: Mapping[str, Tensor],
    loss: tuple[Any, LossSpec, Tensor] | None = None,
) -> None:
    """Prove that a graph is the module that it was exported from.

    Args:
        module: The model.
        inputs: As for `curvd.export`.
        output: Which of its results.
        mode: In which it was exported.
        graph: What was exported.
        tensors: Its tensors by name.
        loss: The caller's, what a server makes of it, and all targets.

    Raises:
        GradientMismatch: If outputs, loss or gradients differ.
    """
    rows = inputs_of(module.forward, sampled(inputs))
    objective = None
    if loss is not None:
        own, spec, targets = loss
        given: Tensor = sampled(targets)

        def wide(outputs: Tensor) -> Tensor:
            return given.to(outputs.dtype) if given.is_floating_point() else given

        def eager(outputs: Tensor) -> Tensor:
            result = own(outputs, wide(outputs))
            total: Tensor = result[0] if isinstance(result, tuple | list) else result
            return total

        objective = Objective(eager, lambda z: evaluated(spec, z, wide(z)))
    with in_mode(module, mode):
        prove(Chosen(module, output), rows, graph, tensors, objective)


def leaves_of(inputs: Any) -> list[Tensor]:
    """List the tensors of inputs, in the order of the graph's.

    Args:
        inputs: As for `curvd.export`.

    Returns:
        The tensors, all rows of them.
    """
    whole = inputs if isinstance(inputs, Mapping | tuple | list) else (inputs,)
    return [leaf for leaf in pytree.tree_leaves(whole) if isinstance(leaf, Tensor)]
