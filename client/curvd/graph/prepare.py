"""What a session of a module needs beside the module: example outputs, named data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from curvd.graph.capture import Chosen, few
from curvd.graph.manifest import inputs_of


def example_outputs(module: nn.Module, inputs: Any, output: str | int | None) -> Tensor:
    """Run a module on a few data points and leave its buffers alone.

    Args:
        module: The model.
        inputs: As for `curvd.export`.
        output: Which of its results.

    Returns:
        Its outputs, [B, ...].
    """
    rows = inputs_of(module.forward, few(inputs))
    chosen = Chosen(module, output)
    state = {name: buffer.clone() for name, buffer in chosen.named_buffers()}
    with torch.no_grad():
        arguments = (rows.args, dict(rows.kwargs))
        result: Tensor = torch.func.functional_call(chosen, state, arguments)
    return result


def leaves_of(inputs: Any) -> list[Tensor]:
    """List the tensors of inputs, in the order of the graph's.

    Args:
        inputs: As for `curvd.export`.

    Returns:
        The tensors, all rows of them.
    """
    whole = inputs if isinstance(inputs, Mapping | tuple | list) else (inputs,)
    return [leaf for leaf in pytree.tree_leaves(whole) if isinstance(leaf, Tensor)]
