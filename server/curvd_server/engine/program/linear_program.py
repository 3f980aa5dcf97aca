"""The linear program: what remains of ``jvp(grad)`` once its parameters are known.

The operator is traced once per shape into a graph of aten operations over parameters,
data and tangents. Linearising runs the part that needs no tangent and keeps only the
values that the rest asks for; the rest is a short straight program, linear in the
tangents, that is simplified (`simplify`), restricted to blocks (`restrict`) and
applied to any number of vectors. This is partial evaluation as in `jax.linearize`
(Frostig et al., 2021), with one graph for all mini-batches, parameter versions and
diagonal blocks:

* a new parameter version runs the known part again and traces nothing;
* a diagonal block is the same program with the other tangents set to zero and the
  other rows dropped, so that dead branches fall away and all constants are shared.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn

from curvd_server.engine.objective import Batch, OutputMetric, Problem
from curvd_server.engine.program.constants import DerivedConstants
from curvd_server.engine.program.fuse import fuse
from curvd_server.engine.program.interpreter import emitted
from curvd_server.engine.program.native import CompileTask, Kernel
from curvd_server.engine.program.restrict import without_zeros
from curvd_server.engine.program.simplify import addends, simplify
from curvd_server.engine.program.trace import LinearGraph, evaluate, split, trace
from curvd_server.system import yield_point

Rows = list[Tensor | None]
_VIEWS = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}
Call = Callable[..., Sequence[Any]]


@dataclass(frozen=True, slots=True)
class SimplifiedGraph:
    """A simplified linear program and its specialisations."""

    graph: fx.Graph
    derived: DerivedConstants
    kernels: dict[tuple[range, range], Kernel] = field(default_factory=dict)

    def constants(self, values: dict[str, Any]) -> dict[str, Any]:
        """Make the additional constants, and drop each that is no longer named."""
        named = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        asked = Counter(n for one in self.derived.values() for n in one.names)
        for name in values.keys() - asked.keys() - named:
            del values[name]
        for name, derivation in self.derived.items():
            values[name] = derivation.compute(values)
            asked.subtract(derivation.names)
            for known in {name, *derivation.names} - named:
                if not asked[known]:
                    del values[known]
        return values

    def kernel(self, inputs: range, outputs: range) -> Kernel:
        """Specialise to some inputs and outputs, or find it done.

        Graph and module are a reference cycle, so they never hold constants: these
        are arguments, bound outside, and freed with the linearisation.
        """
        key = (inputs, outputs)
        if key not in self.kernels:
            self.kernels[key] = _kernel(fuse(without_zeros(self.graph, *key)))
        return self.kernels[key]

    def bind(
        self,
        inputs: range,
        outputs: range,
        constants: Mapping[str, Any],
        *,
        batched: bool,
    ) -> Call:
        """Fix the constants of a kernel.

        Args:
            inputs: Indices of the tangents that are not zero.
            outputs: Indices of the rows that are wanted.
            constants: The constants, by name.
            batched: Whether the tangents have a leading column axis.

        Returns:
            Tangents to rows.
        """
        kernel = self.kernel(inputs, outputs)
        known = [constants[name] for name in kernel.names]
        if not batched:
            return functools.partial(kernel.native or kernel.module.forward, *known)
        return _vectorised(functools.partial(kernel.module.forward, *known))

    def emitted(
        self,
        inputs: range,
        outputs: range,
        constants: Mapping[str, Any],
        tangents: Sequence[Tensor],
    ) -> Iterator[tuple[int, Tensor | None]]:
        """Run a kernel; yield index and value of each output as it is computed."""
        kernel = self.kernel(inputs, outputs)
        known = [constants[name] for name in kernel.names]
        return emitted(kernel.module.graph, (*known, *tangents), outputs)


@dataclass(frozen=True, slots=True)
class Program:
    """A traced operator and its linear part's simplified forms."""

    linear_graph: LinearGraph
    codes: dict[frozenset[str], SimplifiedGraph] = field(default_factory=dict)
    """By the constants that are zero: the only values that shape the code."""

    def code(self, constants: Mapping[str, Any]) -> SimplifiedGraph:
        """Simplify the linear part for these constants, or find it done."""
        linear = self.linear_graph.linear
        zeros = frozenset(n for n in addends(linear) if not constants[n].any())
        if zeros not in self.codes:
            self.codes[zeros] = SimplifiedGraph(*simplify(linear, zeros))
        return self.codes[zeros]


@runtime_checkable
class Compilable(Protocol):
    """A linearisation whose code can be compiled."""

    def tasks(self, block: range) -> list[CompileTask]:
        """List what can be compiled of one block's product."""
        ...


@runtime_checkable
class Emits(Protocol):
    """A linearisation that hands its rows out one by one."""

    def rows(
        self, tangents: Sequence[Tensor], block: range
    ) -> Iterator[tuple[int, Tensor | None]]:
        """Multiply one diagonal block; yield index of the parameter, and its row."""
        ...


@dataclass(frozen=True, slots=True, weakref_slot=True)
class HessianProgram:
    """Tangents in, rows out."""

    code: SimplifiedGraph
    constants: dict[str, Any]

    def product(
        self, tangents: Sequence[Tensor], block: range, *, batched: bool
    ) -> Rows:
        """Multiply one diagonal block; see `Linearisation`."""
        with torch.no_grad():
            run = self.code.bind(block, block, self.constants, batched=batched)
            return list(run(*tangents))

    def rows(
        self, tangents: Sequence[Tensor], block: range
    ) -> Iterator[tuple[int, Tensor | None]]:
        """Multiply one diagonal block; see `Emits`."""
        return self.code.emitted(block, block, self.constants, tangents)

    def tasks(self, block: range) -> list[CompileTask]:
        """List what can be compiled of one block's product."""
        return [_task(self, self.code.kernel(block, block))]

    def held(self) -> list[Any]:
        """List what is kept in memory."""
        return list(self.constants.values())


@dataclass(frozen=True, slots=True, weakref_slot=True)
class JacobianProgram:
    """Tangents to outputs, the metric, and cotangents back to rows."""

    code: SimplifiedGraph
    constants: dict[str, Any]
    metric: OutputMetric
    parameters: int

    def product(
        self, tangents: Sequence[Tensor], block: range, *, batched: bool
    ) -> Rows:
        """Multiply one diagonal block; see `Linearisation`."""
        outputs = range(self.parameters, self.parameters + 1)
        with torch.no_grad():
            push = self.code.bind(block, outputs, self.constants, batched=batched)
            (pushed,) = push(*tangents)
            if pushed is None:
                return [None] * len(block)
            # The program's views were traced for a contiguous cotangent.
            cotangent = self.metric(pushed).contiguous()
            pull = self.code.bind(outputs, block, self.constants, batched=batched)
            return list(pull(cotangent))

    def rows(
        self, tangents: Sequence[Tensor], block: range
    ) -> Iterator[tuple[int, Tensor | None]]:
        """Multiply one diagonal block; see `Emits`."""
        outputs = range(self.parameters, self.parameters + 1)
        with torch.no_grad():
            push = self.code.bind(block, outputs, self.constants, batched=False)
            (pushed,) = push(*tangents)
            if pushed is None:
                return ((index, None) for index in block)
            cotangent = self.metric(pushed).contiguous()
        return self.code.emitted(outputs, block, self.constants, (cotangent,))

    def tasks(self, block: range) -> list[CompileTask]:
        """List what can be compiled of one block's product."""
        outputs = range(self.parameters, self.parameters + 1)
        pairs = ((block, outputs), (outputs, block))
        return [_task(self, self.code.kernel(*pair)) for pair in pairs]

    def held(self) -> list[Any]:
        """List what is kept in memory."""
        return [*self.constants.values(), *_tensors(self.metric)]


def hessian_program(problem: Problem, batch: Batch) -> HessianProgram:
    """Linearise the gradient of a mini-batch's share of the objective."""
    code, constants, _ = _evaluated(problem, batch, hessian=True)
    return HessianProgram(code, constants)


def jacobian_program(
    problem: Problem, batch: Batch, metric_at: Callable[[Tensor], OutputMetric]
) -> JacobianProgram:
    """Linearise the outputs of a mini-batch in both directions.

    Args:
        problem: The objective.
        batch: The mini-batch.
        metric_at: Makes the metric between the two directions, given the outputs.

    Returns:
        The linear program of ``J^T M J``.
    """
    code, constants, outputs = _evaluated(problem, batch, hessian=False)
    return JacobianProgram(code, constants, metric_at(outputs), len(problem.parameters))


def _evaluated(
    problem: Problem, batch: Batch, *, hessian: bool
) -> tuple[SimplifiedGraph, dict[str, Any], Any]:
    """Run what needs no tangent.

    Returns:
        The linear code, its constants, and the outputs of a Jacobian's model.
    """
    whole = _program(problem, batch, hessian=hessian)
    yield_point()
    frozen = problem.model.constants.values()
    known = [*problem.parameters, *frozen, *batch.inputs, batch.targets]
    with torch.no_grad():
        values, outputs = evaluate(whole.linear_graph, known)
        yield_point()
        code = whole.code(values)
        return code, code.constants(values), outputs


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


def held_bytes(linear: HessianProgram | JacobianProgram, known: set[int]) -> int:
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


def _task(linear: HessianProgram | JacobianProgram, kernel: Kernel) -> CompileTask:
    """Say how a kernel is called, without keeping the session's memory."""
    shapes = [
        node.meta["val"]
        for node in kernel.module.graph.nodes
        if node.op == "placeholder" and "val" in node.meta
    ]
    there = weakref.ref(linear)

    def arguments() -> list[Tensor] | None:
        alive = there()
        if alive is None:
            return None
        constants = [alive.constants[name] for name in kernel.names]
        # As products cut them: out of one vector, so not all of them aligned.
        dtype, device = shapes[0].dtype, shapes[0].device
        vector = torch.randn(sum(s.numel() for s in shapes), dtype=dtype, device=device)
        parts = torch.split(vector, [s.numel() for s in shapes])
        tangents = [p.view(s.shape) for p, s in zip(parts, shapes, strict=True)]
        return [*constants, *tangents]

    return CompileTask(kernel, arguments)


def _vectorised(call: Call) -> Call:
    """Give a kernel's tangents and rows a leading column axis, [K, ...].

    Rows that are zeros for every tangent are None, which `torch.vmap` does not let through:
    those of a parameter that is not used.
    """

    def run(*tangents: Tensor) -> list[Tensor | None]:
        present: list[bool] = []

        def dense(*columns: Tensor) -> tuple[Tensor, ...]:
            rows = call(*columns)
            present[:] = [row is not None for row in rows]
            return tuple(row for row in rows if row is not None)

        found = iter(torch.vmap(dense)(*tangents))
        return [next(found) if there else None for there in present]

    return run


def _kernel(graph: fx.Graph) -> Kernel:
    """Make a graph callable, its constants the first arguments."""
    first = next(iter(graph.nodes))
    named: dict[str, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        if node.target not in named:
            with graph.inserting_before(first):
                named[node.target] = graph.placeholder(node.target)
        node.replace_all_uses_with(named[node.target])
        graph.erase_node(node)
    for node in graph.nodes:
        # A view was possible with the strides of the trace, which fused kernels and
        # other tangents do not always have.
        if node.target in _VIEWS:
            node.target = torch.ops.aten.reshape.default
    return Kernel(fx.GraphModule(nn.Module(), graph), tuple(named))


def _tensors(metric: OutputMetric) -> list[Any]:
    names = getattr(type(metric), "__slots__", ())
    return [getattr(metric, name) for name in names]
