"""Tracing an operator without computing, and running the part that needs no tangent."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx

from curvd_server.engine.objective import Batch, Problem
from curvd_server.engine.program.interruptible import Interruptible
from curvd_server.engine.program.simplify import drop_unused
from curvd_server.system import alone, yield_point

_one_trace = threading.Lock()
"""A trace patches `nn.Module` for all threads, and takes that back at its end: traces
may lie within each other, but not overlap."""


@dataclass(frozen=True, slots=True)
class LinearGraph:
    """A traced operator, split; shared by all mini-batches of one shape."""

    module: fx.GraphModule
    lifted: Mapping[fx.Node, str]
    """Known nodes whose values the linear part asks for, and their names there."""
    linear: fx.Graph
    """The rest, with ``get_attr`` nodes for known operands."""


def trace(problem: Problem, batch: Batch, *, hessian: bool) -> fx.GraphModule:
    """Trace ``jvp(grad)`` of the objective, or ``(jvp, vjp)`` of the outputs.

    Args:
        problem: The objective.
        batch: Gives the shapes; its values are not looked at.
        hessian: Which of the two.

    Returns:
        A graph of parameters, constants, inputs, targets, tangents and, for a
        Jacobian, a cotangent, to the rows (then ``J v`` and the outputs).
    """
    primals = problem.parameters
    yield_point()

    def linear(
        parameters: tuple[Tensor, ...],
        constants: tuple[Tensor, ...],
        inputs: tuple[Tensor, ...],
        targets: Tensor,
        tangents: tuple[Tensor, ...],
        cotangents: tuple[Tensor, ...],
    ) -> Any:
        here, at = Batch(batch.start, inputs, targets), _with(problem, constants)
        if hessian:
            gradient = torch.func.grad(lambda p: at.objective(p, here))
            return torch.func.jvp(gradient, (parameters,), (tangents,))[1]

        def outputs(p: tuple[Tensor, ...]) -> Tensor:
            return at.outputs(p, here)

        pair: Any = torch.func.jvp(outputs, (parameters,), (tangents,))
        rows = torch.func.vjp(outputs, parameters)[1](*cotangents)[0]
        return (*rows, *reversed(pair))

    constants = tuple(problem.model.constants.values())
    with torch.no_grad():
        z = None if hessian else problem.outputs(primals, batch)
    cotangents = () if z is None else (z.new_empty(z.shape),)
    # note: one tensor in two places would be traced as one input.
    tangents = tuple(torch.empty_like(p) for p in primals)
    return _traced(
        linear, (primals, constants, batch.inputs, batch.targets, tangents, cotangents)
    )


def trace_outputs(problem: Problem, batch: Batch) -> fx.GraphModule:
    """Trace the model alone, forwards.

    Args:
        problem: The objective.
        batch: Gives the shapes; its values are not looked at.

    Returns:
        A graph of parameters, constants, inputs and targets to the outputs.
    """
    yield_point()

    def outputs(
        parameters: tuple[Tensor, ...],
        constants: tuple[Tensor, ...],
        inputs: tuple[Tensor, ...],
        targets: Tensor,
    ) -> Tensor:
        here = Batch(batch.start, inputs, targets)
        return _with(problem, constants).outputs(parameters, here)

    constants = tuple(problem.model.constants.values())
    args = (problem.parameters, constants, batch.inputs, batch.targets)
    return _traced(outputs, args)


def _with(problem: Problem, constants: Sequence[Tensor]) -> Problem:
    """Make a problem whose constants are these, in order."""
    state = dict(zip(problem.model.constants, constants, strict=True))
    model = dataclasses.replace(problem.model, constants=state)
    return dataclasses.replace(problem, model=model)


def _traced(function: Callable[..., Any], args: tuple[Any, ...]) -> fx.GraphModule:
    """Trace a function into aten operations, without mutations."""
    pure = torch.func.functionalize(function, remove="mutations")

    def gently(*given: Any) -> Any:
        with Interruptible():
            return pure(*given)

    # note: with grad mode off torch picks fused backwards that have no forward mode.
    # note: backwards of a CUDA model run on this thread as well, so that they can yield.
    with (
        alone(_one_trace),
        torch.enable_grad(),
        torch.autograd.set_multithreading_enabled(False),
        _use_lazy_graph_module(True),  # nobody calls the module: no code is needed
    ):
        tracer = make_fx(gently, tracing_mode="fake", _allow_non_fake_inputs=True)
        return tracer(*args)


def split(traced: fx.GraphModule, known: int) -> LinearGraph:
    """Separate what needs no tangent from the linear rest.

    Args:
        traced: A graph whose first inputs are known, and the others tangents.
        known: How many are known.

    Returns:
        The graph, without what no row depends on, and its linear part with ``get_attr``
        nodes for known operands.
    """
    # Above all the gradient itself, of which only the tangent was asked for.
    drop_unused(traced.graph)
    graph = fx.Graph()
    renamed: dict[fx.Node, fx.Node] = {}
    lifted: dict[fx.Node, str] = {}
    tangent: set[fx.Node] = set()

    def lift(node: fx.Node) -> fx.Node:
        if node not in renamed:
            lifted[node] = f"c{len(lifted)}"
            renamed[node] = graph.get_attr(lifted[node])
            renamed[node].meta = dict(node.meta)
        return renamed[node]

    placeholders = 0
    for node in traced.graph.nodes:
        yield_point()
        placeholders += node.op == "placeholder"
        if node.op == "output":
            graph.output(tuple(fx.map_arg(r, lift) for r in node.args[0]))
        elif (node.op == "placeholder" and placeholders > known) or any(
            operand in tangent for operand in node.all_input_nodes
        ):
            tangent.add(node)
            renamed[node] = graph.node_copy(node, lift)
    return LinearGraph(traced, lifted, graph)


def evaluate(graph: LinearGraph, known: Sequence[Tensor]) -> tuple[dict[str, Any], Any]:
    """Run the part that needs no tangent.

    Args:
        graph: The split operator.
        known: Values of its first inputs.

    Returns:
        The constants of the linear part by name, and the value of the last output
        (the model's outputs, of a Jacobian). All else is freed on the way.
    """
    values: dict[fx.Node, Any] = {}
    constants: dict[str, Any] = {}
    pending = {node: len(node.users) for node in graph.module.graph.nodes}
    given = iter(known)
    for node in graph.module.graph.nodes:
        if node.op == "output":
            return constants, values.get(node.args[0][-1])
        operands = node.all_input_nodes
        if node.op == "placeholder":
            value = next(given, None)
            if value is not None:
                values[node] = value
        elif node.op == "get_attr":
            values[node] = getattr(graph.module, node.target)
        elif all(operand in values for operand in operands):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
        if node in values and node in graph.lifted:
            constants[graph.lifted[node]] = values[node]
        for operand in operands:
            pending[operand] -= 1
            if not pending[operand] and operand in values:
                values[operand] = None
    raise AssertionError
