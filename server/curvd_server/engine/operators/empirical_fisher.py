"""The empirical Fisher: the uncentred second moment of the data points' gradients.

Between the Jacobians stands ``g_n g_n^T``, with ``g_n`` the gradient of data point ``n``'s
own loss in the outputs; weight decay is no data point's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvd.contract import OperatorSpec
from curvd_server.engine.objective import Batch, OutputMetric, Problem
from curvd_server.engine.operators.jacobian_form import JacobianForm
from curvd_server.engine.operators.protocol import Definition


@dataclass(frozen=True, slots=True)
class _RankOne:
    """``g_n g_n^T`` per data point."""

    gradients: Tensor
    scale: float

    def __call__(self, u: Tensor) -> Tensor:
        axes = tuple(range(1 - self.gradients.ndim, 0))
        along = self.gradients * u
        if axes:
            along = along.sum(axes, keepdim=True)
        return (self.gradients * (self.scale * along)).to(u.dtype)


def _metric(
    problem: Problem, spec: OperatorSpec, z: Tensor, batch: Batch
) -> OutputMetric:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        (gradients,) = torch.autograd.grad(problem.loss.sum(leaf, batch.targets), leaf)
    return _RankOne(gradients, 1.0 / problem.normaliser_of(batch))


DEFINITION: Definition = JacobianForm(metric=_metric, adds_weight_decay=False)
