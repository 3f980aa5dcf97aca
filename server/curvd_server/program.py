"""The linear program: what remains of ``jvp(grad)`` once its parameters are known.

The operator is traced once per shape into a graph of aten operations over parameters,
data and tangents. Linearising runs the part that needs no tangent and keeps only the
values that the rest asks for; the rest is a short straight program, linear in the
tangents, that is simplified (`peephole`), specialised to blocks (`specialise`) and
applied to any number of vectors. This is partial evaluation as in `jax.linearize`
(Frostig et al., 2021), with one graph for all mini-batches, parameter versions and
diagonal blocks:

* a new parameter version runs the known part again and traces nothing;
* a diagonal block is the same program with the other tangents set to zero and the
  other rows dropped, so that dead branches fall away and all constants are shared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from curvd.types import OperatorKind, OperatorSpec
from curvd_server.data import Batch
from curvd_server.objective import Problem
from curvd_server.outputs import Metric, metric
from curvd_server.peephole import Recipe, addends, simplify
from curvd_server.specialise import without_zeros
from curvd_server.tracing import Traced, evaluate, split, trace

Rows = list[Tensor | None]
Call = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class LinearCode:
    """A simplified linear program and its compiled specialisations."""

    graph: fx.Graph
    recipe: Recipe
    compiled: dict[tuple[range, range], tuple[Call, tuple[str, ...]]] = field(
        default_factory=dict
    )

    def constants(self, values: dict[str, Any]) -> dict[str, Any]:
        """Make the additional constants and drop those that are no longer named."""
        for name, compute in self.recipe.items():
            values[name] = compute(values)
        named = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        return {name: value for name, value in values.items() if name in named}

    def bind(self, inputs: range, outputs: range, constants: Mapping[str, Any]) -> Call:
        """Specialise to some inputs and outputs, and fix the constants.

        Graph and module are a reference cycle, so they never hold constants: these
        are arguments, bound outside, and freed with the linearisation.
        """
        key = (inputs, outputs)
        if key not in self.compiled:
            self.compiled[key] = _compile(without_zeros(self.graph, *key))
        forward, names = self.compiled[key]
        return functools.partial(forward, *(constants[name] for name in names))


@dataclass(frozen=True, slots=True)
class Program:
    """A traced operator and its linear part's simplified forms."""

    traced: Traced
    codes: dict[frozenset[str], LinearCode] = field(default_factory=dict)
    """By the constants that are zero: the only values that shape the code."""

    def code(self, constants: Mapping[str, Any]) -> LinearCode:
        """Simplify the linear part for these constants, or find it done."""
        linear = self.traced.linear
        zeros = frozenset(n for n in addends(linear) if not constants[n].any())
        if zeros not in self.codes:
            self.codes[zeros] = LinearCode(*simplify(linear, zeros))
        return self.codes[zeros]


@dataclass(frozen=True, slots=True)
class _HessianProgram:
    """Tangents in, rows out."""

    code: LinearCode
    constants: dict[str, Any]

    def product(
        self, tangents: Sequence[Tensor], block: range, *, batched: bool
    ) -> Rows:
        """Multiply one diagonal block; see `curvature.Linearisation`."""
        run = self.code.bind(block, block, self.constants)
        with torch.no_grad():
            return list((torch.vmap(run) if batched else run)(*tangents))

    def held(self) -> list[Any]:
        """List what is kept in memory."""
        return list(self.constants.values())


@dataclass(frozen=True, slots=True)
class _JacobianProgram:
    """Tangents to outputs, the metric, and cotangents back to rows."""

    code: LinearCode
    constants: dict[str, Any]
    metric: Metric
    parameters: int

    def product(
        self, tangents: Sequence[Tensor], block: range, *, batched: bool
    ) -> Rows:
        """Multiply one diagonal block; see `curvature.Linearisation`."""
        outputs = range(self.parameters, self.parameters + 1)
        push = self.code.bind(block, outputs, self.constants)
        pull = self.code.bind(outputs, block, self.constants)
        with torch.no_grad():
            (pushed,) = (torch.vmap(push) if batched else push)(*tangents)
            if pushed is None:
                return [None] * len(block)
            # The program's views were traced for a contiguous cotangent.
            cotangent = self.metric(pushed).contiguous()
            return list((torch.vmap(pull) if batched else pull)(cotangent))

    def held(self) -> list[Any]:
        """List what is kept in memory."""
        return [*self.constants.values(), *_tensors(self.metric)]


def program(
    problem: Problem, spec: OperatorSpec, batch: Batch
) -> _HessianProgram | _JacobianProgram:
    """Linearise by partial evaluation; see `curvature.Linearisation`."""
    hessian = spec.kind is OperatorKind.HESSIAN
    whole = _program(problem, batch, hessian=hessian)
    frozen = problem.model.constants.values()
    known = [*problem.parameters, *frozen, *batch.inputs, batch.targets]
    with torch.no_grad():
        values, outputs = evaluate(whole.traced, known)
        code = whole.code(values)
        constants = code.constants(values)
    if hessian:
        return _HessianProgram(code, constants)
    middle = metric(problem, spec, outputs, batch)
    return _JacobianProgram(code, constants, middle, len(problem.parameters))


def _program(problem: Problem, batch: Batch, *, hessian: bool) -> Program:
    """Trace the operator for the shapes of a mini-batch, or find it done."""
    tensors = (*batch.inputs, batch.targets)
    shapes = tuple((tuple(t.shape), t.dtype) for t in tensors)
    model = problem.model
    own = (model.names, *model.constants, model.data, problem.loss.spec, problem.mode)
    place = (problem.dtype, problem.device, problem.normaliser)
    key = (hessian, shapes, *own, *place)
    cache = model.programs
    if key not in cache:
        known = len(problem.parameters) + len(problem.model.constants) + len(tensors)
        cache[key] = Program(split(trace(problem, batch, hessian=hessian), known))
    found: Program = cache[key]
    return found


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


def _compile(graph: fx.Graph) -> tuple[Call, tuple[str, ...]]:
    """Make a graph callable, its constants the first arguments.

    Returns:
        The callable, and the names of the constants in order.
    """
    first = next(iter(graph.nodes))
    named: dict[str, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        if node.target not in named:
            with graph.inserting_before(first):
                named[node.target] = graph.placeholder(node.target)
        node.replace_all_uses_with(named[node.target])
        graph.erase_node(node)
    return fx.GraphModule(nn.Module(), graph).forward, tuple(named)


def _tensors(middle: Metric) -> list[Any]:
    names = getattr(type(middle), "__slots__", ())
    return [getattr(middle, name) for name in names]
