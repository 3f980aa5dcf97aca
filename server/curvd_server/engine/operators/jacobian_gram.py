"""The Gram matrix ``J^T J`` of the outputs' Jacobian, whatever the loss.

It is the parameters' side of the neural tangent kernel ``J J^T`` (Jacot, Gabriel and
Hongler, NeurIPS 2018), with the same eigenvalues, and what a Laplace approximation sees
of a Gaussian likelihood. It is a sum over data points: no reduction, weight of a class
or ignored target of the loss is part of it.
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
class _Identity:
    def __call__(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True, slots=True)
class _Nothing:
    """That of a mini-batch that counts nothing; no normaliser makes it zero here."""

    def __call__(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u)


def _metric(
    problem: Problem, spec: OperatorSpec, z: Tensor, batch: Batch
) -> OutputMetric:
    return _Nothing() if batch.silent else _Identity()


DEFINITION: Definition = JacobianForm(metric=_metric, adds_weight_decay=False)
