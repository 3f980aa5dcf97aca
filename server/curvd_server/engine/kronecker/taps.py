"""A mini-batch through the traced model, with inputs and gradients of every site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from curvd_server.engine.kronecker.sites import Sites, find
from curvd_server.engine.objective import Batch, Problem
from curvd_server.engine.program import trace_outputs
from curvd_server.system import yield_point


@dataclass(frozen=True, slots=True)
class Taps:
    """A mini-batch's outputs, and what each site was given and gave."""

    outputs: Tensor
    operands: tuple[Tensor, ...]
    """What each site's weight was applied to."""
    tapped: tuple[Tensor, ...]
    """What each site gave, in the graph of the outputs."""

    def gradients(self, cotangent: Tensor) -> list[Tensor]:
        """Pull a gradient of the outputs back to every site.

        Args:
            cotangent: In the shape of the outputs.

        Returns:
            One tensor per site, zeros where the outputs do not depend on it.
        """
        if not self.outputs.requires_grad:
            return [torch.zeros_like(y) for y in self.tapped]
        found = torch.autograd.grad(
            self.outputs, self.tapped, cotangent, retain_graph=True, allow_unused=True
        )
        return [
            torch.zeros_like(y) if g is None else g
            for g, y in zip(found, self.tapped, strict=True)
        ]


def tap(problem: Problem, batch: Batch, sites: Sites) -> Taps:
    """Run the traced model on a mini-batch.

    Args:
        problem: Gives parameters and constants.
        batch: Of the shapes that the model was traced for.
        sites: The traced model, and what to look at.

    Returns:
        What was seen. Weights carry no gradient, sites' outputs do.
    """
    given = iter((
        *problem.parameters,
        *problem.model.constants.values(),
        *batch.inputs,
        batch.targets,
    ))
    tapped = dict[fx.Node, Tensor]()
    operands = dict[fx.Node, Tensor]()
    wanted = {site.node: site.operand for site in sites.linear}
    operated = set(wanted.values())
    with torch.enable_grad():
        for node, value in _run(sites.module, given):
            if node in wanted:
                tapped[node] = value if value.requires_grad else value.requires_grad_()
            if node in operated:
                operands[node] = value.detach()
            if node.op == "output":
                outputs = value[0] if isinstance(value, Sequence) else value
    return Taps(
        outputs,
        tuple(operands[site.operand] for site in sites.linear),
        tuple(tapped[site.node] for site in sites.linear),
    )


def _run(
    module: fx.GraphModule, given: Iterator[Tensor]
) -> Iterator[tuple[fx.Node, Any]]:
    """Evaluate a graph node by node, and free what nobody asks for any more."""
    values: dict[fx.Node, Any] = {}
    pending = {node: len(node.users) for node in module.graph.nodes}
    mutates = any(map(_is_mutable, module.graph.nodes))
    for node in module.graph.nodes:
        yield_point()
        if node.op == "placeholder":
            value: Any = next(given).detach()
        elif node.op == "get_attr":
            value = getattr(module, node.target)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            value = args[0] if node.op == "output" else node.target(*args, **kwargs)
        yield node, value
        if mutates and isinstance(value, Tensor) and value.requires_grad:
            value = value.clone()  # what was yielded stays what it is
        values[node] = value
        for operand in node.all_input_nodes:
            pending[operand] -= 1
            if not pending[operand]:
                del values[operand]


def _is_mutable(node: fx.Node) -> bool:
    """Tell whether an operator writes to what it is given: some recurrences do."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def sites_of(problem: Problem, batch: Batch) -> Sites:
    """Trace the model for the shapes of a mini-batch and find its sites, or find it done.

    Args:
        problem: The objective.
        batch: Gives the shapes.

    Returns:
        The sites, kept with the architecture.
    """
    tensors: Sequence[Tensor] = (*batch.inputs, batch.targets)
    shapes = tuple((tuple(t.shape), t.dtype) for t in tensors)
    model = problem.model
    key = ("sites", shapes, model.names, *model.constants, model.data, problem.mode)
    key = (*key, problem.dtype, problem.device)
    if key not in model.programs:
        module = trace_outputs(problem, batch)
        model.programs[key] = find(module, problem.layout)
    found: Sites = model.programs[key]
    return found
