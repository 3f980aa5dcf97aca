"""The Hessian: second derivative of the whole objective, weight decay included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvd.contract import LossName, OperatorSpec
from curvd_server.engine.objective import Batch, Problem
from curvd_server.engine.operators.graphs import (
    edge,
    gradient_graph,
    pull,
    run_forward,
)
from curvd_server.engine.operators.protocol import (
    Definition,
    Differences,
    Linearisation,
)
from curvd_server.engine.program import HessianProgram, Rows, hessian_program


@dataclass(frozen=True, slots=True)
class _HessianGraph:
    """The gradient's graph; edges, not tensors, so the gradient itself is freed."""

    leaves: tuple[Tensor, ...]
    edges: tuple[GradientEdge | None, ...]

    def product(
        self, tangents: Sequence[Tensor], block: range, *, batched: bool
    ) -> Rows:
        return pull(
            [self.edges[i] for i in block],
            [self.leaves[i] for i in block],
            tangents,
            batched=batched,
        )


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

        return run_forward(product, tangents, batched=batched)


class _Hessian:
    adds_weight_decay = True

    def check_loss(self, loss: LossName, spec: OperatorSpec) -> None:
        """Every loss has one."""

    def program(
        self, problem: Problem, spec: OperatorSpec, batch: Batch
    ) -> HessianProgram:
        return hessian_program(problem, batch)

    def double_backward(
        self, problem: Problem, spec: OperatorSpec, batch: Batch
    ) -> Linearisation:
        with torch.enable_grad():
            leaves = tuple(p.detach().requires_grad_() for p in problem.parameters)
            gradient = gradient_graph(problem.objective(leaves, batch), leaves)
            return _HessianGraph(leaves, tuple(map(edge, gradient)))

    def forward_over_reverse(
        self, problem: Problem, spec: OperatorSpec, batch: Batch
    ) -> Linearisation:
        return _ForwardOverReverse(problem, batch)

    def difference_quotient(
        self, differences: Differences, spec: OperatorSpec, step: float
    ) -> list[Tensor]:
        return differences.of_gradient(step)


DEFINITION: Definition = _Hessian()
