"""The sampled Hessian of the loss in the model's outputs.

``(1/S) sum_s g_s g_s^T`` over targets drawn from the model's distribution at each loss
term, the gradients ``g_s`` scaled like the true term's weight, so that the expectation is
the exact Hessian (type-1 Fisher; Kunstner et al., NeurIPS 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvd.contract import LossName, OperatorSpec
from curvd.errors import InvalidSpec
from curvd_server.engine.objective.data import Batch
from curvd_server.engine.objective.objective import Problem
from curvd_server.engine.objective.output_metrics import (
    Diagonal,
    OutputMetric,
    class_axis,
    class_weight,
    elementwise,
)


def sampled_loss_hessian(
    problem: Problem, spec: OperatorSpec, z: Tensor, batch: Batch
) -> OutputMetric:
    """Make the second moment of the gradients of sampled targets in the outputs.

    Args:
        problem: Gives the loss and the normaliser.
        spec: Gives the seed and the samples per loss term.
        z: The outputs, without a graph, in float32 at least.
        batch: The batch whose outputs they are.

    Returns:
        The metric; it holds tensors of the size of the outputs only.
    """
    if not problem.loss.spec.name.has_classes:
        curvature = elementwise(problem, z, batch) / problem.normaliser_of(batch)
        return Diagonal(curvature * _sampled_square(problem, z, spec, batch))
    axis = class_axis(z, batch)
    p = z.softmax(axis)
    weight = class_weight(problem, z, batch, axis) / problem.normaliser_of(batch)
    drawn = drawn_classes(p, axis, spec, batch)
    if problem.loss.spec.name is LossName.NLL:
        # The score of log-probabilities is minus one at the class drawn.
        one = p.new_ones(()).expand(drawn.shape)
        seen = torch.zeros_like(p).scatter_add(axis, drawn, one)
        return Diagonal(weight * seen / spec.mc_samples)
    return _SampledSoftmax(p, weight, drawn, axis)


def check_samples(loss: LossName, spec: OperatorSpec) -> None:
    """Refuse to sample targets of a loss that is no distribution's.

    Args:
        loss: The loss.
        spec: The operator.

    Raises:
        InvalidSpec: If targets are to be sampled, and cannot be.
    """
    if loss in (LossName.SMOOTH_L1, LossName.CUSTOM) and spec.mc_samples:
        msg = (
            f"{spec.kind} with mc_samples={spec.mc_samples} draws targets from the "
            f"loss's distribution, and {loss} stands for none: use the exact ggn or "
            "the empirical Fisher"
        )
        raise InvalidSpec(msg, loss=loss, operator=spec.kind)


@dataclass(frozen=True, slots=True)
class _SampledSoftmax:
    """``(q/S) sum_s (p - e_s)(p - e_s)^T`` per term."""

    p: Tensor
    weight: Tensor
    drawn: Tensor
    """Class indices; the samples lie along `axis`."""
    axis: int

    def __call__(self, u: Tensor) -> Tensor:
        drawn = self.drawn.expand(*u.shape[: u.ndim - self.p.ndim], *self.drawn.shape)
        along = (self.p * u).sum(self.axis, keepdim=True) - u.gather(self.axis, drawn)
        along = along * (self.weight / self.drawn.shape[self.axis])
        rows = self.p * along.sum(self.axis, keepdim=True)
        return rows.scatter_add(self.axis, drawn, -along).to(u.dtype)


def uniforms(spec: OperatorSpec, batch: Batch, terms: int) -> Tensor:
    """Draw uniform numbers that belong to data points, not to mini-batches.

    Philox is counter based: data point ``n`` owns a fixed stretch of the stream, so
    neither the cut into mini-batches nor the device changes what it gets.

    Args:
        spec: Gives the seed and the samples ``S`` per term.
        batch: The batch whose targets are sampled.
        terms: Loss terms per data point.

    Returns:
        ``[B, terms, S]`` in float64 on the CPU, inside (0, 1).
    """
    rows, need = len(batch.targets), terms * spec.mc_samples
    blocks = -(-need // 4)  # one step of Philox makes four numbers
    stream = np.random.Philox(key=spec.seed)
    stream.advance(batch.start * blocks)
    drawn = np.random.Generator(stream).random((rows, 4 * blocks))[:, :need]
    tiny = np.finfo(np.float64).tiny
    return torch.from_numpy(np.maximum(drawn, tiny)).reshape(
        rows, terms, spec.mc_samples
    )


def drawn_classes(p: Tensor, axis: int, spec: OperatorSpec, batch: Batch) -> Tensor:
    """Draw classes by inverting the distribution function in float64 on the CPU.

    Returns:
        Class indices in the shape of `p`, with the samples along `axis`.
    """
    last = p.movedim(axis, -1)
    terms = last[0].numel() // last.shape[-1]
    uniform = uniforms(spec, batch, terms)
    edges = last.cpu().double().cumsum(-1).reshape(len(p), terms, -1)
    drawn = torch.searchsorted(edges, uniform * edges[..., -1:], right=True)
    drawn = drawn.clamp_(max=last.shape[-1] - 1).to(p.device)
    return drawn.reshape(*last.shape[:-1], spec.mc_samples).movedim(-1, axis)


def _sampled_square(
    problem: Problem, z: Tensor, spec: OperatorSpec, batch: Batch
) -> Tensor:
    """Average the squared score over its expectation, for each output.

    mse is the negative log-likelihood of a normal distribution with variance 1/2,
    whose squared score is ``2 * (2 * eps^2 / 2) = 2 eps^2``: ``eps^2`` relative to
    the exact curvature 2. A Bernoulli's is ``(p - y)^2 / (p (1 - p))``.
    """
    uniform = uniforms(spec, batch, z[0].numel())
    if problem.loss.spec.name is LossName.MSE:
        square = torch.special.ndtri(uniform).square()
    else:
        p = z.cpu().double().sigmoid().reshape(len(z), -1, 1)
        square = torch.where(uniform < p, (1 - p) / p, p / (1 - p))
    mean: Tensor = square.mean(-1)
    return mean.reshape(z.shape).to(z)
