"""Operators of the form ``J^T M J``: one metric between two Jacobians of the outputs.

An operator of this form says its metric, whether weight decay belongs to it, and which
losses it refuses; every way to multiply it, and its truth, are here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvd.contract import LossName, OperatorSpec
from curvd_server.engine.objective import Batch, OutputMetric, Problem
from curvd_server.engine.operators.graphs import (
    edge,
    gradient_graph,
    pull,
    run_forward,
)
from curvd_server.engine.operators.protocol import Differences, Linearisation
from curvd_server.engine.program import JacobianProgram, Rows, jacobian_program


@dataclass(frozen=True, slots=True)
class _JacobianGraph:
    """The graphs of ``z`` and of ``u -> J^T u``, whose transpose is ``v -> J v``."""

    leaves: tuple[Tensor, ...]
    outputs: GradientEdge | None
    dummy: Tensor
    pulled: tuple[GradientEdge | None, ...]
    metric: OutputMetric

    def product(
        self, tangents: Sequence[Tensor], block: range, *, batched: bool
    ) -> Rows:
        leaves = [self.leaves[i] for i in block]
        pulled = [self.pulled[i] for i in block]
        (pushed,) = pull(pulled, [self.dummy], tangents, batched=batched)
        if pushed is None:
            return [None] * len(leaves)
        cotangent = self.metric(pushed)
        return pull([self.outputs], leaves, [cotangent], batched=batched)


@dataclass(frozen=True, slots=True)
class _ForwardThenReverse:
    """``jvp`` of the outputs, the metric, then ``vjp``."""

    problem: Problem
    batch: Batch
    metric_at: Callable[[Tensor], OutputMetric]

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
        metric = self.metric_at(z)

        def product(*columns: Tensor) -> tuple[Tensor, ...]:
            pushed = torch.func.jvp(outputs, (here,), (columns,))[1]
            pulled: Any = pull(metric(pushed))
            rows: tuple[Tensor, ...] = pulled[0]
            return rows

        return run_forward(product, tangents, batched=batched)


def _any_loss(loss: LossName, spec: OperatorSpec) -> None:
    """Refuse no loss."""


@dataclass(frozen=True, slots=True)
class JacobianForm:
    """The definition of an operator ``J^T M J``; a `Definition`."""

    metric: Callable[[Problem, OperatorSpec, Tensor, Batch], OutputMetric]
    """Makes ``M`` at the outputs ``z`` of a mini-batch, which have no graph and are in
    float32 at least. It acts on each data point by itself, is divided by the objective's
    normaliser if the objective is what it is made of, and is a dataclass with slots, so
    that its memory is counted."""
    adds_weight_decay: bool
    """Whether the penalty on parameters belongs to the function that ``M`` is of."""
    check_loss: Callable[[LossName, OperatorSpec], None] = _any_loss
    """Raises `InvalidSpec`, with what to use instead, for losses that have no ``M``."""

    def program(
        self, problem: Problem, spec: OperatorSpec, batch: Batch
    ) -> JacobianProgram:
        """Trace both directions; see `Definition`."""
        metric_at = functools.partial(self._metric_at, problem, spec, batch)
        return jacobian_program(problem, batch, metric_at)

    def double_backward(
        self, problem: Problem, spec: OperatorSpec, batch: Batch
    ) -> Linearisation:
        """Keep the graphs of both directions; see `Definition`."""
        with torch.enable_grad():
            leaves = tuple(p.detach().requires_grad_() for p in problem.parameters)
            z = problem.outputs(leaves, batch)
            metric = self._metric_at(problem, spec, batch, z)
            dummy = torch.zeros_like(z, requires_grad=True)
            pulled = gradient_graph(z, leaves, dummy)
            return _JacobianGraph(
                leaves, edge(z), dummy, tuple(map(edge, pulled)), metric
            )

    def forward_over_reverse(
        self, problem: Problem, spec: OperatorSpec, batch: Batch
    ) -> Linearisation:
        """Differentiate forwards, then backwards, at every product; see `Definition`."""
        metric_at = functools.partial(self._metric_at, problem, spec, batch)
        return _ForwardThenReverse(problem, batch, metric_at)

    def difference_quotient(
        self, differences: Differences, spec: OperatorSpec, step: float
    ) -> list[Tensor]:
        """Apply the metric to differences of the outputs; see `Definition`."""
        pushed = differences.of_outputs(step)

        def cotangent(outputs: Tensor, batch: Batch) -> Tensor:
            metric = self._metric_at(differences.problem, spec, batch, outputs)
            return metric(pushed)

        return differences.pulled_back(cotangent)

    def _metric_at(
        self, problem: Problem, spec: OperatorSpec, batch: Batch, outputs: Tensor
    ) -> OutputMetric:
        wide = torch.promote_types(outputs.dtype, torch.float32)
        return self.metric(problem, spec, outputs.detach().to(wide), batch)
