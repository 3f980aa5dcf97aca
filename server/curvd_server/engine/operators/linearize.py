"""Linearisations: a curvature operator's action at one mini-batch, made once.

`linearise` runs everything that does not depend on the multiplied vector, and what it
returns multiplies any number of vectors at the cost of the linear part alone. There
are several modes, equal in exact arithmetic:

* ``program``: ``jvp(grad)`` traced once and evaluated up to the tangents; see `program`.
* ``double_backward``: the graph of the gradient is kept; a product walks it backwards
  (Pearlmutter, Neural Computation 6, 1994, as reverse over reverse). It runs in C++
  without Python or the GIL, which wins where operations are tiny.
* ``forward_over_reverse``: ``jvp(grad)``; keeps nothing, recomputes all.

Restricted to a block, the first two visit only what lies between the block's layers
and the loss, so the blocks share forward and first backward work.

Rows come as one tensor per parameter, or None for zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvd.contract import OperatorKind, OperatorSpec
from curvd_server.engine.objective import Batch, Metric, Problem, metric
from curvd_server.engine.program import Rows, held_bytes, program
from curvd_server.system import yield_point


class Linearisation(Protocol):
    """One mini-batch's share of an operator at fixed parameters."""

    def product(
        self, tangents: Sequence[Tensor], block: range, *, batched: bool
    ) -> Rows:
        """Multiply the diagonal block of some consecutive parameters.

        Args:
            tangents: One tensor per parameter of the block; ``[K, ...]`` if batched.
            block: Indices of the parameters.
            batched: Whether tangents and rows have a leading column axis.

        Returns:
            One tensor per parameter of the block.
        """
        ...


Mode = Callable[[Problem, OperatorSpec, Batch], Linearisation]


@dataclass(frozen=True, slots=True)
class _HessianGraph:
    """The gradient's graph; edges, not tensors, so the gradient itself is freed."""

    leaves: tuple[Tensor, ...]
    edges: tuple[GradientEdge | None, ...]

    def product(
        self, tangents: Sequence[Tensor], block: range, *, batched: bool
    ) -> Rows:
        return _pull(
            [self.edges[i] for i in block],
            [self.leaves[i] for i in block],
            tangents,
            batched=batched,
        )


@dataclass(frozen=True, slots=True)
class _JacobianGraph:
    """The graphs of ``z`` and of ``u -> J^T u``, whose transpose is ``v -> J v``."""

    leaves: tuple[Tensor, ...]
    outputs: GradientEdge | None
    dummy: Tensor
    pulled: tuple[GradientEdge | None, ...]
    metric: Metric

    def product(
        self, tangents: Sequence[Tensor], block: range, *, batched: bool
    ) -> Rows:
        leaves = [self.leaves[i] for i in block]
        pulled = [self.pulled[i] for i in block]
        (pushed,) = _pull(pulled, [self.dummy], tangents, batched=batched)
        if pushed is None:
            return [None] * len(leaves)
        cotangent = self.metric(pushed)
        return _pull([self.outputs], leaves, [cotangent], batched=batched)


@dataclass(frozen=True, slots=True)
class _ForwardOverReverse:
    """``jvp(grad)`` of the objective, from scratch for every product."""

    problem: Problem
    batch: Batch

    def product(
        self, tangents: Sequence[Tensor], block: range, *, batched: bool
    ) -> Rows:
        fixed = self.problem.parameters

        def objective(inner: tuple[Tensor, ...]) -> Tensor:
            whole = (*fixed[: block.start], *inner, *fixed[block.stop :])
            return self.problem.objective(whole, self.batch)

        def product(*columns: Tensor) -> tuple[Tensor, ...]:
            here = fixed[block.start : block.stop]
            gradient = torch.func.grad(objective)
            rows: tuple[Tensor, ...] = torch.func.jvp(gradient, (here,), (columns,))[1]
            return rows

        return _run(product, tangents, batched=batched)


@dataclass(frozen=True, slots=True)
class _ForwardThenReverse:
    """``jvp`` of the outputs, the metric, then ``vjp``."""

    problem: Problem
    batch: Batch
    spec: OperatorSpec

    def product(
        self, tangents: Sequence[Tensor], block: range, *, batched: bool
    ) -> Rows:
        fixed = self.problem.parameters
        here = fixed[block.start : block.stop]

        def outputs(inner: tuple[Tensor, ...]) -> Tensor:
            whole = (*fixed[: block.start], *inner, *fixed[block.stop :])
            return self.problem.outputs(whole, self.batch)

        pair: Any = torch.func.vjp(outputs, here)
        z, pull = pair
        middle = metric(self.problem, self.spec, z, self.batch)

        def product(*columns: Tensor) -> tuple[Tensor, ...]:
            pushed = torch.func.jvp(outputs, (here,), (columns,))[1]
            pulled: Any = pull(middle(pushed))
            rows: tuple[Tensor, ...] = pulled[0]
            return rows

        return _run(product, tangents, batched=batched)


def double_backward(
    problem: Problem, spec: OperatorSpec, batch: Batch
) -> Linearisation:
    """Keep the graph whose backward pass is the product."""
    with torch.enable_grad():
        leaves = tuple(p.detach().requires_grad_() for p in problem.parameters)
        z = problem.outputs(leaves, batch)
        if spec.kind is OperatorKind.HESSIAN:
            gradient = _gradient(problem.batch_loss(z, batch), leaves)
            return _HessianGraph(leaves, tuple(map(_edge, gradient)))
        middle = metric(problem, spec, z, batch)
        dummy = torch.zeros_like(z, requires_grad=True)
        pulled = _gradient(z, leaves, dummy)
        return _JacobianGraph(
            leaves, _edge(z), dummy, tuple(map(_edge, pulled)), middle
        )


def forward_over_reverse(
    problem: Problem, spec: OperatorSpec, batch: Batch
) -> Linearisation:
    """Keep nothing; differentiate in forward mode at every product."""
    if spec.kind is OperatorKind.HESSIAN:
        return _ForwardOverReverse(problem, batch)
    return _ForwardThenReverse(problem, batch, spec)


def _gradient(
    outputs: Tensor, leaves: Sequence[Tensor], weights: Tensor | None = None
) -> Sequence[Tensor | None]:
    if not outputs.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(
        outputs, leaves, weights, create_graph=True, allow_unused=True
    )


def _edge(tensor: Tensor | None) -> GradientEdge | None:
    """Name a tensor's place in the graph without holding its memory."""
    if tensor is None or not tensor.requires_grad:
        return None
    return get_gradient_edge(tensor)


def _pull(
    edges: Sequence[GradientEdge | None],
    leaves: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    batched: bool,
) -> Rows:
    """Walk the kept graph backwards; edges that are None contribute nothing."""
    live = [(e, c) for e, c in zip(edges, cotangents, strict=True) if e is not None]
    if not live:
        return [None] * len(leaves)
    with torch.enable_grad():
        rows: Any = torch.autograd.grad(
            [e for e, _ in live],
            leaves,
            [c for _, c in live],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
    return list(rows)


def _run(
    product: Callable[..., tuple[Tensor, ...]],
    tangents: Sequence[Tensor],
    *,
    batched: bool,
) -> Rows:
    # note: with grad mode off torch picks fused backwards that have no forward mode.
    with torch.enable_grad():
        run = torch.func.vmap(product) if batched else product
        return [row.detach() for row in run(*tangents)]


def kept_bytes(mode: str, problem: Problem, spec: OperatorSpec, batch: Batch) -> int:
    """Measure the memory that keeping a linearisation holds.

    Counts the storages saved in the graph that are neither parameters nor data, in a
    graph made for the purpose: hooks would slow every later product down.

    Args:
        mode: Name in `MODES`.
        problem: The objective.
        spec: The operator.
        batch: The mini-batch to linearise.

    Returns:
        Bytes; 0 for a mode that keeps nothing.
    """
    if mode == "forward_over_reverse":
        return 0
    own = (*problem.parameters, *problem.model.constants.values(), *batch.inputs)
    known = {t.untyped_storage().data_ptr() for t in own}
    if mode == "program":
        return held_bytes(program(problem, spec, batch), known)
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would make a reference cycle

    yield_point()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        MODES[mode](problem, spec, batch)
    return sum(seen.values())


def block_ranges(spec: OperatorSpec, parameters: int) -> list[range]:
    """List the parameter indices of each diagonal block; one block if there is none."""
    if spec.block_sizes is None:
        return [range(parameters)]
    blocks, start = [], 0
    for size in spec.block_sizes:
        blocks.append(range(start, start + size))
        start += size
    return blocks


MODES: dict[str, Mode] = {
    "program": program,
    "double_backward": double_backward,
    "forward_over_reverse": forward_over_reverse,
}
"""By name, the usually fastest first."""
