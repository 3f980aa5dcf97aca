"""The linear program: what remains of ``jvp(grad)`` once its parameters are known.

The operator is traced once per shape into a graph of aten operations over parameters,
data and tangents. Linearising runs the part that needs no tangent and keeps only the
values that the rest asks for; the rest is a short straight program, linear in the
tangents, that is simplified (`peephole`) and applied to any number of vectors. This is
partial evaluation as in `jax.linearize` (Frostig et al., 2021), with one graph for
all mini-batches, parameter versions and diagonal blocks:

* a new parameter version runs the known part again and traces nothing;
* a diagonal block is the same program with the other tangents set to zero and the
  other rows dropped, so that dead branches fall away and all constants are shared.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from curvd.types import OperatorKind, OperatorSpec
from curvd_server.objective import Batch, Problem
from curvd_server.outputs import Metric, metric
from curvd_server.peephole import simplify, without_zeros

Rows = list[Tensor | None]
Call = Callable[..., Sequence[Tensor]]

_traced: weakref.WeakKeyDictionary[nn.Module, dict[Any, fx.GraphModule]] = (
    weakref.WeakKeyDictionary()
)
"""Per skeleton, so that a graph lives as long as the sessions that use it."""


@dataclass(frozen=True, slots=True)
class _HessianProgram:
    """Tangents in, rows out."""

    graph: fx.Graph
    constants: dict[str, Any]
    specialised: dict[tuple[range, bool], Call] = field(default_factory=dict)

    def product(
        self, tangents: Sequence[Tensor], block: range, *, batched: bool
    ) -> Rows:
        """Multiply one diagonal block; see `curvature.Linearisation`."""
        key = (block, batched)
        if key not in self.specialised:
            run = _compile(without_zeros(self.graph, block, block), self.constants)
            self.specialised[key] = torch.vmap(run) if batched else run
        with torch.no_grad():
            return list(self.specialised[key](*tangents))

    def held(self) -> list[Any]:
        """List what is kept in memory."""
        return list(self.constants.values())


@dataclass(frozen=True, slots=True)
class _JacobianProgram:
    """Tangents to outputs, the metric, and cotangents back to rows."""

    graph: fx.Graph
    constants: dict[str, Any]
    metric: Metric
    parameters: int
    specialised: dict[tuple[range, bool], tuple[Call, Call]] = field(
        default_factory=dict
    )

    def product(
        self, tangents: Sequence[Tensor], block: range, *, batched: bool
    ) -> Rows:
        """Multiply one diagonal block; see `curvature.Linearisation`."""
        key = (block, batched)
        if key not in self.specialised:
            n = self.parameters
            push = without_zeros(self.graph, block, range(n, n + 1))
            pull = without_zeros(self.graph, range(n, n + 1), block)
            calls = [_compile(g, self.constants) for g in (push, pull)]
            if batched:
                calls = [torch.vmap(call) for call in calls]
            self.specialised[key] = (calls[0], calls[1])
        pushing, pulling = self.specialised[key]
        with torch.no_grad():
            (pushed,) = pushing(*tangents)
            if pushed is None:
                return [None] * len(block)
            # The program's views were traced for a contiguous cotangent.
            return list(pulling(self.metric(pushed).contiguous()))

    def held(self) -> list[Any]:
        """List what is kept in memory."""
        return [*self.constants.values(), *_tensors(self.metric)]


def program(
    problem: Problem, spec: OperatorSpec, batch: Batch
) -> _HessianProgram | _JacobianProgram:
    """Linearise by partial evaluation; see `curvature.Linearisation`."""
    hessian = spec.kind is OperatorKind.HESSIAN
    traced = _trace(problem, batch, hessian=hessian)
    constants = problem.model.constants.values()
    known = [*problem.parameters, *constants, *batch.inputs, batch.targets]
    with torch.no_grad():
        graph, values, outputs = partially_evaluate(traced, known)
        graph, values = simplify(graph, values)
    if hessian:
        return _HessianProgram(graph, values)
    middle = metric(problem, spec, outputs, batch)
    return _JacobianProgram(graph, values, middle, len(problem.parameters))


def held_bytes(linear: _HessianProgram | _JacobianProgram, known: set[int]) -> int:
    """Count the memory of a program's constants.

    Args:
        linear: The program.
        known: Addresses of storages that exist anyway.

    Returns:
        Bytes of the distinct other storages.
    """
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in linear.held()
        if isinstance(t, Tensor)
    }
    return sum(size for at, size in storages.items() if at not in known)


def _trace(problem: Problem, batch: Batch, *, hessian: bool) -> fx.GraphModule:
    """Trace ``jvp(grad)``, or ``(jvp, vjp)`` of the outputs, without computing."""
    tensors = (*batch.inputs, batch.targets)
    shapes = tuple((tuple(t.shape), t.dtype) for t in tensors)
    key = (hessian, shapes, problem.dtype, problem.device, problem.normaliser)
    cache = _traced.setdefault(problem.model.skeleton, {})
    if key not in cache:
        cache[key] = _fresh_trace(problem, batch, hessian=hessian)
    return cache[key]


def _fresh_trace(problem: Problem, batch: Batch, *, hessian: bool) -> fx.GraphModule:
    names = tuple(problem.model.constants)
    primals = problem.parameters

    def linear(
        parameters: tuple[Tensor, ...],
        constants: tuple[Tensor, ...],
        inputs: tuple[Tensor, ...],
        targets: Tensor,
        tangents: tuple[Tensor, ...],
        cotangents: tuple[Tensor, ...],
    ) -> Any:
        here = Batch(batch.start, inputs, targets)
        state = dict(zip(names, constants, strict=True))
        model = dataclasses.replace(problem.model, constants=state)
        at = dataclasses.replace(problem, model=model)
        if hessian:
            gradient = torch.func.grad(lambda p: at.objective(p, here))
            return torch.func.jvp(gradient, (parameters,), (tangents,))[1]

        def outputs(p: tuple[Tensor, ...]) -> Tensor:
            return at.outputs(p, here)

        z, pushed = torch.func.jvp(outputs, (parameters,), (tangents,))
        rows = torch.func.vjp(outputs, parameters)[1](*cotangents)[0]
        return (*rows, pushed, z)

    constants = tuple(problem.model.constants.values())
    with torch.no_grad():
        z = None if hessian else problem.outputs(primals, batch)
    cotangents = () if z is None else (z.new_empty(z.shape),)
    # note: one tensor in two places would be traced as one input.
    tangents = tuple(torch.empty_like(p) for p in primals)
    args = (primals, constants, batch.inputs, batch.targets, tangents, cotangents)
    pure = torch.func.functionalize(linear, remove="mutations")
    # note: with grad mode off torch picks fused backwards that have no forward mode.
    with torch.enable_grad():
        tracer = make_fx(pure, tracing_mode="fake", _allow_non_fake_inputs=True)
        return tracer(*args)


def partially_evaluate(
    traced: fx.GraphModule, known: Sequence[Tensor]
) -> tuple[fx.Graph, dict[str, Any], Any]:
    """Run what needs no tangent, and return the rest as a graph.

    Args:
        traced: A graph whose first inputs are `known`; the others are tangents.
        known: Values of the first inputs.

    Returns:
        The linear graph, whose known operands are ``get_attr`` nodes; their values by
        name; and the value of the last output if it is known (the model's outputs).
    """
    graph, renamed = fx.Graph(), {}
    values: dict[fx.Node, Any] = {}
    pending = {node: len(node.users) for node in traced.graph.nodes}
    constants: dict[str, Any] = {}

    def lift(node: fx.Node) -> fx.Node:
        if node not in renamed:
            name = f"c{len(constants)}"
            constants[name] = values[node]
            renamed[node] = graph.get_attr(name)
            renamed[node].meta = dict(node.meta)
        return renamed[node]

    given = iter(known)
    last: Any = None
    for node in traced.graph.nodes:
        operands = node.all_input_nodes
        if node.op == "output":
            results = list(node.args[0])
            last = values.get(results[-1])
            graph.output(tuple(fx.map_arg(r, lift) for r in results))
        elif node.op == "get_attr":
            values[node] = getattr(traced, node.target)
        elif node.op == "placeholder" and (value := next(given, None)) is not None:
            values[node] = value
        elif node.op == "placeholder" or any(o not in values for o in operands):
            renamed[node] = graph.node_copy(node, lift)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
        for operand in operands:
            pending[operand] -= 1
            if not pending[operand] and operand in values and node.op != "output":
                # Constants of the program stay alive in `constants`.
                values[operand] = None
    return graph, constants, last


def _compile(graph: fx.Graph, constants: Mapping[str, Any]) -> Call:
    """Make a graph callable.

    Graph and module are a reference cycle, so they must not hold the constants: these
    become arguments, bound outside, and are freed with the linearisation.
    """
    first = next(iter(graph.nodes))
    named: dict[str, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        if node.target not in named:
            with graph.inserting_before(first):
                named[node.target] = graph.placeholder(node.target)
        node.replace_all_uses_with(named[node.target])
        graph.erase_node(node)
    forward = fx.GraphModule(nn.Module(), graph).forward
    return functools.partial(forward, *(constants[name] for name in named))


def _tensors(middle: Metric) -> list[Any]:
    names = getattr(type(middle), "__slots__", ())
    return [getattr(middle, name) for name in names]
