"""A module itself beside its graph: once, on a few rows, as its owner runs it.

All that is traced, compared and differentiated is a twin of the module, or a copy of that.
Either does what the module does as long as its code reaches the module by no other way than
from a layer to its children. `curvd.graph.places` looks for such ways, and cannot know all of
them: a frame, a registry in a package, a thread's own data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvd.contract import Mode, Output
from curvd.errors import GradientMismatch
from curvd.graph.capture import Chosen
from curvd.graph.compared import differing, shown_size
from curvd.graph.evaluate import evaluate, types_in
from curvd.graph.examples import few
from curvd.graph.manifest import inputs_of
from curvd.graph.unfilled import called
from curvd.v1 import graph_pb2 as graph_pb


def check_itself(
    module: nn.Module,
    inputs: Any,
    output: Output,
    mode: Mode | None,
    graph: graph_pb.Graph,
    tensors: Mapping[str, Tensor],
) -> None:
    """Compare what a module returns with what its graph does.

    Args:
        module: In the mode that its owner has it in; if another was chosen for the graph,
            nothing is compared.
        inputs: The inputs, as for `curvd.export`.
        output: Which of its results.
        mode: The mode that was chosen; None: as it is.
        graph: What was exported.
        tensors: Its tensors by name.

    Raises:
        GradientMismatch: If they differ.
    """
    is_other = mode is Mode.EVAL and any(m.training for m in module.modules())
    if is_other or mode is Mode.BATCH_STATISTICS:
        return
    rows = inputs_of(module.forward, few(inputs))
    returned = called(Chosen(module, output), rows)
    if returned is None:
        return
    given = [tensors[described.names[0]].detach() for described in graph.tensors]
    real = [
        torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in given
    ]
    with torch.no_grad():
        found = evaluate(graph, rows.leaves, real)[0]
    types = {returned.dtype, *(t for t in types_in(graph) if t.is_floating_point)}
    if (
        returned.device.type != "cpu"
        or torch.get_float32_matmul_precision() != "highest"
    ):
        types.add(torch.bfloat16)  # what products of matrices may be rounded to
    narrowest = max(types, key=lambda dtype: torch.finfo(dtype).eps)
    wrong = differing({"the output": (returned, found)}, narrowest)
    if wrong:
        (size,) = wrong.values()
        msg = (
            "the module returns something else than a module of the same classes, "
            f"attributes, parameters and buffers {shown_size(size)}, and that is what was "
            "exported: its forward looks something up by the very object (id(self), a "
            "registry, another object that holds it). Make it an attribute or a buffer "
            "of the module, or an input"
        )
        raise GradientMismatch(msg, parameters="all", largest=size)
