"""The Hessian of the loss in the model's outputs: the middle of the exact ``J^T M J``.

With ``z`` the outputs of a mini-batch, an output-space metric is a symmetric map
``M: u -> M u`` that acts on each data point by itself. The Hessian ``M = d²loss / dz²``
(Schraudolph, Neural Computation 14, 2002), divided by the objective's normaliser, is
positive semi-definite as far as the loss is convex in ``z``. Nothing of size outputs x
outputs or outputs x parameters is ever formed. Tangents may carry extra leading axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvd.contract import LossName
from curvd_server.engine.objective.data import Batch
from curvd_server.engine.objective.losses import classes_last
from curvd_server.engine.objective.objective import Problem

OutputMetric = Callable[[Tensor], Tensor]
"""``u: [..., *outputs] -> M u``, same shape; a dataclass with slots, so that the memory
it holds is counted."""


def loss_hessian(problem: Problem, z: Tensor, batch: Batch) -> OutputMetric:
    """Make the second derivative of a mini-batch's share of the objective in its outputs.

    Args:
        problem: Gives the loss and the normaliser.
        z: The outputs, without a graph, in float32 at least.
        batch: The batch whose outputs they are.

    Returns:
        The metric; it holds tensors of the size of the outputs only.
    """
    if problem.loss.custom is not None:
        return _differentiated(problem, z, batch)
    if problem.loss.spec.name.has_classes:
        axis = class_axis(z, batch)
        weight = class_weight(problem, z, batch, axis) / problem.normaliser_of(batch)
        return _Softmax(z.softmax(axis), weight, axis)
    return Diagonal(elementwise(problem, z, batch) / problem.normaliser_of(batch))


@dataclass(frozen=True, slots=True)
class Diagonal:
    """One number per output."""

    entries: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        """Multiply each output."""
        return (self.entries * u).to(u.dtype)

    def root(self, e: Tensor) -> Tensor:
        """Multiply by a root: of noise with covariance I makes noise with covariance M."""
        return (self.entries.sqrt() * e).to(e.dtype)


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

    def root(self, e: Tensor) -> Tensor:
        """Multiply by a root: of noise with covariance I makes noise with covariance M.

        ``L e = sqrt(q) (sqrt(p) e - p sum(sqrt(p) e))``, and ``L L^T = M``.
        """
        root = self.p.sqrt() * e
        root = root - self.p * root.sum(self.axis, keepdim=True)
        return (self.weight.sqrt() * root).to(e.dtype)


@dataclass(frozen=True, slots=True)
class _Differentiated:
    """``d²loss / dz²`` by automatic differentiation, for losses without a formula.

    The loss is differentiated at each product, not once: functional transforms may not
    begin while saved tensors are counted, which is when a metric is made.
    """

    outputs: Tensor
    share: Callable[[Tensor], Tensor]
    """The mini-batch's share of the objective, of its outputs."""

    def __call__(self, u: Tensor) -> Tensor:
        pull: Callable[[Tensor], Tensor] = self._pull
        for _ in range(u.ndim - self.outputs.ndim):
            pull = torch.func.vmap(pull)
        return pull(u.to(self.outputs.dtype)).to(u.dtype)

    def _pull(self, u: Tensor) -> Tensor:
        """Multiply one ``u``; the matrix is symmetric."""
        # Reverse over reverse: not every operator of a loss has a forward mode.
        with torch.enable_grad():
            pair: Any = torch.func.vjp(torch.func.grad(self.share), self.outputs)
        found: Tensor = pair[1](u)[0]
        return found


def _differentiated(problem: Problem, z: Tensor, batch: Batch) -> OutputMetric:
    def share(outputs: Tensor) -> Tensor:
        return problem.batch_loss(outputs, batch)

    return _Differentiated(z, share)


def class_axis(z: Tensor, batch: Batch) -> int:
    """Find the axis of the classes, counted from the last."""
    return -1 if classes_last(z, batch.targets) else 1 - z.ndim


def class_weight(problem: Problem, z: Tensor, batch: Batch, axis: int) -> Tensor:
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


def elementwise(problem: Problem, z: Tensor, batch: Batch) -> Tensor:
    """Give the second derivative of a loss without classes in each output."""
    if problem.loss.spec.name is LossName.MSE:
        return torch.full_like(z, 2.0)
    if problem.loss.spec.name is LossName.SMOOTH_L1:
        beta = problem.loss.spec.beta
        return ((z - batch.targets).abs() < beta).to(z) / beta
    p = z.sigmoid()
    return bce_weight(problem, batch.targets, z) * p * (1 - p)


def bce_weight(problem: Problem, targets: Tensor, z: Tensor) -> Tensor:
    """Weigh each target of a binary cross-entropy, in the shape of `z`."""
    t = targets.to(z.dtype)
    positive = 1.0 if problem.loss.weights is None else problem.loss.weights
    return positive * t + (1 - t)
