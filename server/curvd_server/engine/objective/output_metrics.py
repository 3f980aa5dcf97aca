"""Metrics on the model's outputs: the middle of every ``J^T M J``.

With ``z`` the outputs of a mini-batch, each metric is a symmetric positive
semi-definite map ``M: u -> M u`` that acts on each data point by itself:

* exact: ``M = d²loss / dz²`` (Schraudolph, Neural Computation 14, 2002), positive
  semi-definite as far as the loss is convex in ``z``;
* sampled: ``(1/S) sum_s g_s g_s^T`` over targets drawn from the model's distribution
  at each loss term, the gradients ``g_s`` scaled like the true term's weight, so that
  the expectation is the exact one (type-1 Fisher; Kunstner et al., NeurIPS 2019);
* empirical: ``g_n g_n^T`` with ``g_n`` the gradient of data point ``n``'s own loss.

All are divided by the objective's normaliser. Nothing of size outputs x outputs or
outputs x parameters is ever formed. Tangents may carry extra leading axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvd.contract import LossName, OperatorKind, OperatorSpec
from curvd.errors import InvalidSpec
from curvd_server.engine.objective.data import Batch
from curvd_server.engine.objective.losses import classes_last
from curvd_server.engine.objective.objective import Problem

Metric = Callable[[Tensor], Tensor]
"""``u: [..., *outputs] -> M u``, same shape."""


def metric(
    problem: Problem, spec: OperatorSpec, outputs: Tensor, batch: Batch
) -> Metric:
    """Make the metric of an operator at the outputs of a mini-batch.

    Args:
        problem: Gives the loss and the normaliser.
        spec: Which operator.
        outputs: ``z``, without a graph.
        batch: Whose outputs they are.

    Returns:
        The metric; it holds tensors of the size of the outputs only.

    Raises:
        InvalidSpec: If this loss has no such metric.
    """
    _check_defined(problem.loss.spec.name, spec)
    wide = torch.promote_types(outputs.dtype, torch.float32)
    z = outputs.detach().to(wide)
    if spec.kind is OperatorKind.EMPIRICAL_FISHER:
        return _empirical(problem, z, batch)
    if problem.loss.custom is not None:
        return _differentiated(problem, z, batch)
    if problem.loss.spec.name.has_classes:
        last = classes_last(outputs, batch.targets)
        axis = -1 if last else 1 - outputs.ndim
        p = z.softmax(axis)
        weight = _class_weight(problem, z, batch, axis) / problem.normaliser
        if not spec.mc_samples:
            return _Softmax(p, weight, axis)
        drawn = _drawn_classes(p, axis, spec, batch)
        if problem.loss.spec.name is LossName.NLL:
            # The score of log-probabilities is minus one at the class drawn.
            one = p.new_ones(()).expand(drawn.shape)
            seen = torch.zeros_like(p).scatter_add(axis, drawn, one)
            return _Diagonal(weight * seen / spec.mc_samples)
        return _SampledSoftmax(p, weight, drawn, axis)
    curvature = _elementwise(problem, z, batch) / problem.normaliser
    if spec.mc_samples:
        curvature = curvature * _sampled_square(problem, z, spec, batch)
    return _Diagonal(curvature)


def _check_defined(loss: LossName, spec: OperatorSpec) -> None:
    """Refuse what would be zero, or a sample of no distribution."""
    if loss is LossName.NLL and spec.kind is OperatorKind.GGN:
        msg = (
            "nll is linear in the model's outputs, so its Gauss-Newton matrix is zero: "
            "use cross_entropy on logits, or the Fisher, which samples it"
        )
        raise InvalidSpec(msg, loss=loss, operator=spec.kind)
    if loss in (LossName.SMOOTH_L1, LossName.CUSTOM) and spec.mc_samples:
        msg = (
            f"{spec.kind} with mc_samples={spec.mc_samples} draws targets from the "
            f"loss's distribution, and {loss} stands for none: use the exact ggn or "
            "the empirical Fisher"
        )
        raise InvalidSpec(msg, loss=loss, operator=spec.kind)


@dataclass(frozen=True, slots=True)
class _Diagonal:
    entries: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        return (self.entries * u).to(u.dtype)


@dataclass(frozen=True, slots=True)
class _Softmax:
    """``q (diag(p) - p p^T)`` per term."""

    p: Tensor
    weight: Tensor
    axis: int

    def __call__(self, u: Tensor) -> Tensor:
        q = self.weight * self.p
        pu = self.p * u
        return (self.weight * pu - q * pu.sum(self.axis, keepdim=True)).to(u.dtype)


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


@dataclass(frozen=True, slots=True)
class _Differentiated:
    """``d²loss / dz²`` by automatic differentiation, for losses without a formula."""

    outputs: Tensor
    pull: Callable[[Tensor], tuple[Tensor]]
    """``u -> (M u,)`` for one ``u``; M is symmetric."""

    def __call__(self, u: Tensor) -> Tensor:
        pull: Callable[[Tensor], tuple[Tensor]] = self.pull
        for _ in range(u.ndim - self.outputs.ndim):
            pull = torch.func.vmap(pull)
        return pull(u.to(self.outputs.dtype))[0].to(u.dtype)


def _differentiated(problem: Problem, z: Tensor, batch: Batch) -> Metric:
    def share(outputs: Tensor) -> Tensor:
        return problem.batch_loss(outputs, batch)

    # Reverse over reverse: not every operator of a loss has a forward mode.
    with torch.enable_grad():
        pair: Any = torch.func.vjp(torch.func.grad(share), z)
    return _Differentiated(z, pair[1])


def _empirical(problem: Problem, z: Tensor, batch: Batch) -> Metric:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        (gradients,) = torch.autograd.grad(problem.loss.sum(leaf, batch.targets), leaf)
    return _RankOne(gradients, 1.0 / problem.normaliser)


def _class_weight(problem: Problem, z: Tensor, batch: Batch, axis: int) -> Tensor:
    """Sum the weights that a target spreads over the classes; 0 where ignored.

    Returns:
        The shape of `z` with one entry along `axis`.
    """
    loss, targets = problem.loss, batch.targets
    classes = z.shape[axis]
    smooth = loss.spec.label_smoothing
    each = z.new_ones(classes) if loss.weights is None else loss.weights
    if targets.is_floating_point():
        spread = (1 - smooth) * targets.to(z.dtype) + smooth / classes
        shaped = each.reshape(-1, *(1 for _ in range(-axis - 1)))
        return (shaped * spread).sum(axis, keepdim=True)
    counted = targets != loss.ignore_index
    own = each[targets.where(counted, 0)]
    weight = (1 - smooth) * own + smooth * each.mean()
    return weight.where(counted, 0.0).unsqueeze(axis)


def _elementwise(problem: Problem, z: Tensor, batch: Batch) -> Tensor:
    """Give the second derivative of a loss without classes in each output."""
    if problem.loss.spec.name is LossName.MSE:
        return torch.full_like(z, 2.0)
    if problem.loss.spec.name is LossName.SMOOTH_L1:
        beta = problem.loss.spec.beta
        return ((z - batch.targets).abs() < beta).to(z) / beta
    p = z.sigmoid()
    return _bce_weight(problem, batch.targets, z) * p * (1 - p)


def _bce_weight(problem: Problem, targets: Tensor, z: Tensor) -> Tensor:
    t = targets.to(z.dtype)
    positive = 1.0 if problem.loss.weights is None else problem.loss.weights
    return positive * t + (1 - t)


def _uniforms(spec: OperatorSpec, batch: Batch, terms: int) -> Tensor:
    """Draw uniform numbers that belong to data points, not to mini-batches.

    Philox is counter based: data point ``n`` owns a fixed stretch of the stream, so
    neither the cut into mini-batches nor the device changes what it gets.

    Args:
        spec: Gives the seed and the samples ``S`` per term.
        batch: Whose data points.
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


def _drawn_classes(p: Tensor, axis: int, spec: OperatorSpec, batch: Batch) -> Tensor:
    """Draw classes by inverting the distribution function in float64 on the CPU.

    Returns:
        Class indices in the shape of `p`, with the samples along `axis`.
    """
    last = p.movedim(axis, -1)
    terms = last[0].numel() // last.shape[-1]
    uniform = _uniforms(spec, batch, terms)
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
    uniform = _uniforms(spec, batch, z[0].numel())
    if problem.loss.spec.name is LossName.MSE:
        square = torch.special.ndtri(uniform).square()
    else:
        p = z.cpu().double().sigmoid().reshape(len(z), -1, 1)
        square = torch.where(uniform < p, (1 - p) / p, p / (1 - p))
    mean: Tensor = square.mean(-1)
    return mean.reshape(z.shape).to(z)
