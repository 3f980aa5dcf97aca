"""Gradients of the loss in the outputs, whose second moment is what factors are made of.

``sum_k c_k c_k^T`` over the columns k is the Hessian of the loss in the outputs (type-2),
its sample (mc), or the outer product of the data points' own gradients (empirical). All
loss terms of a data point, such as the positions of a sequence, share a column, as in
curvlinops and kronfluence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from curvd.contract import FisherType, LossName, OperatorSpec
from curvd.errors import InvalidSpec
from curvd_server.engine.objective import Batch, Problem, check_samples
from curvd_server.engine.objective.output_metrics import (
    bce_weight,
    class_axis,
    class_weight,
    elementwise,
)
from curvd_server.engine.objective.sampled_metrics import drawn_classes, uniforms


def check_fisher(loss: LossName, spec: OperatorSpec) -> None:
    """Refuse losses that have no such gradients.

    Args:
        loss: The loss.
        spec: The operator.

    Raises:
        InvalidSpec: With what to use instead.
    """
    check_samples(loss, spec)
    if spec.fisher is not FisherType.TYPE2:
        return
    if loss in (LossName.NLL, LossName.CUSTOM):
        why = (
            "is linear in the model's outputs, so its Hessian there is zero"
            if loss is LossName.NLL
            else "has no square root by formula"
        )
        other = "mc or empirical" if loss is LossName.NLL else "empirical"
        msg = (
            f"{spec.kind} of fisher type type-2 needs a square root of the loss's Hessian "
            f"in the outputs; {loss} {why}: use fisher type {other}"
        )
        raise InvalidSpec(msg, loss=loss, operator=spec.kind)


def cotangents(
    problem: Problem, spec: OperatorSpec, z: Tensor, batch: Batch
) -> Iterator[Tensor]:
    """Make the columns of a mini-batch, one after the other.

    Args:
        problem: Gives the loss.
        spec: Gives the Fisher's type, samples and seed.
        z: The outputs, without a graph.
        batch: The mini-batch whose outputs they are.

    Yields:
        Columns in the shape and type of `z`, of the sum of losses: not divided by the
        normaliser.
    """
    wide = z.detach().to(torch.promote_types(z.dtype, torch.float32))
    columns = {
        FisherType.TYPE2: _root_columns,
        FisherType.MC: _sampled,
        FisherType.EMPIRICAL: _own,
    }
    assert spec.fisher is not None
    for column in columns[spec.fisher](problem, spec, wide, batch):
        yield column.to(z.dtype)


def _own(
    problem: Problem, spec: OperatorSpec, z: Tensor, batch: Batch
) -> Iterator[Tensor]:
    with torch.enable_grad():
        leaf = z.requires_grad_()
        (found,) = torch.autograd.grad(problem.loss.sum(leaf, batch.targets), leaf)
    yield found


def _root_columns(
    problem: Problem, spec: OperatorSpec, z: Tensor, batch: Batch
) -> Iterator[Tensor]:
    """Yield ``S`` column by column, with ``S S^T`` the Hessian of each loss term.

    Of a softmax ``S = sqrt(w) (diag(sqrt p) - p sqrt(p)^T)``.
    """
    if not problem.loss.spec.name.has_classes:
        root = elementwise(problem, z, batch).sqrt()
        axis = -1 if z.ndim > 1 else None
        if axis is None:  # one output, without an axis of its own
            yield root
            return
        for k in range(z.shape[axis]):
            column = torch.zeros_like(z)
            column.select(axis, k).copy_(root.select(axis, k))
            yield column
        return
    axis = class_axis(z, batch)
    p = z.softmax(axis)
    weight = class_weight(problem, z, batch, axis).sqrt()
    for k in range(z.shape[axis]):
        along = weight * p.narrow(axis, k, 1).sqrt()
        column = -p * along
        column.narrow(axis, k, 1).add_(along)
        yield column


def _sampled(
    problem: Problem, spec: OperatorSpec, z: Tensor, batch: Batch
) -> Iterator[Tensor]:
    """Yield gradients of targets drawn from the model's distribution, one per term."""
    name, samples = problem.loss.spec.name, spec.mc_samples
    if not name.has_classes:
        yield from _sampled_numbers(problem, spec, z, batch)
        return
    axis = class_axis(z, batch)
    p = z.softmax(axis)
    weight = (class_weight(problem, z, batch, axis) / samples).sqrt()
    # The score of log-probabilities is minus one at the class drawn.
    mean = torch.zeros_like(p) if name is LossName.NLL else weight * p
    every = drawn_classes(p, axis, spec, batch)
    for k in range(samples):
        yield mean.scatter_add(axis, every.narrow(axis, k, 1), -weight)


def _sampled_numbers(
    problem: Problem, spec: OperatorSpec, z: Tensor, batch: Batch
) -> Iterator[Tensor]:
    """Yield scores of normal (mse, of variance 1/2) or Bernoulli targets."""
    uniform = uniforms(spec, batch, z[0].numel())
    for k in range(spec.mc_samples):
        one = uniform[..., k].reshape(z.shape)
        if problem.loss.spec.name is LossName.MSE:
            score = math.sqrt(2.0) * torch.special.ndtri(one).to(z)
        else:
            p = z.cpu().double().sigmoid()
            root = bce_weight(problem, batch.targets, z).sqrt()
            score = root * (p - (one < p).double()).to(z)
        yield score / math.sqrt(spec.mc_samples)
