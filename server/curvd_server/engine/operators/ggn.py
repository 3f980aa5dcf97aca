"""The generalised Gauss-Newton: the Hessian of the loss between two Jacobians."""

from __future__ import annotations

from torch import Tensor

from curvd.contract import LossName, OperatorSpec
from curvd.errors import InvalidSpec
from curvd_server.engine.objective import (
    Batch,
    OutputMetric,
    Problem,
    check_samples,
    loss_hessian,
    sampled_loss_hessian,
)
from curvd_server.engine.operators.jacobian_form import JacobianForm
from curvd_server.engine.operators.protocol import Definition


def _metric(
    problem: Problem, spec: OperatorSpec, z: Tensor, batch: Batch
) -> OutputMetric:
    if spec.mc_samples:
        return sampled_loss_hessian(problem, spec, z, batch)
    return loss_hessian(problem, z, batch)


def _check_loss(loss: LossName, spec: OperatorSpec) -> None:
    if loss is LossName.NLL:
        msg = (
            "nll is linear in the model's outputs, so its Gauss-Newton matrix is zero: "
            "use cross_entropy on logits, or the Fisher, which samples it"
        )
        raise InvalidSpec(msg, loss=loss, operator=spec.kind)
    check_samples(loss, spec)


DEFINITION: Definition = JacobianForm(
    metric=_metric, adds_weight_decay=True, check_loss=_check_loss
)
