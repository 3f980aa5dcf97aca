"""What a Gaussian posterior around the parameters is made of: likelihood, noise, moments.

Its precision is ``scale * G + prior * I``, G the Gauss-Newton matrix of the objective, and
``scale`` undoes the objective's division, so that ``scale * G`` is the second derivative
of the negative log-likelihood of all data (MacKay, Neural Computation 4, 1992; Immer,
Korzepa & Bauer, AISTATS 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvd.contract import Distribution, JacobianOf, LossName, Stop
from curvd.errors import InvalidSpec
from curvd_server.engine.data_points.jacobian import Jacobian
from curvd_server.engine.data_points.output_rows import OutputRows
from curvd_server.engine.data_points.points import Part, Points
from curvd_server.engine.objective import Batch, Problem, loss_hessian
from curvd_server.linalg import Query, probes

_OF_OUTPUTS = 1 << 40
"""Index of the first probe that is noise in the outputs; those below are in parameters."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How an objective is read as a negative log-likelihood."""

    scale: float
    """What the objective's curvature is multiplied by."""
    per_term: float
    """What the log-likelihood has for each term beside the loss."""
    per_loss: float
    """What a loss is multiplied by."""


def likelihood_of(problem: Problem, noise: float) -> Likelihood:
    """Read an objective as a negative log-likelihood.

    Args:
        problem: The objective.
        noise: Standard deviation of Gaussian targets; mse alone.

    Returns:
        The likelihood.

    Raises:
        InvalidSpec: If the loss is none, or has no noise.
    """
    name = problem.loss.spec.name
    if name is LossName.MSE:
        per_loss = 1 / (2 * noise**2)
        per_term = -math.log(noise * math.sqrt(2 * math.pi))
        return Likelihood(problem.normaliser * per_loss, per_term, per_loss)
    if name in (LossName.CROSS_ENTROPY, LossName.NLL, LossName.BCE_WITH_LOGITS):
        if noise != 1.0:
            msg = (
                f"noise is the deviation of targets that are numbers, of mse; targets of "
                f"{name} have a distribution of their own: leave noise={noise:g} out"
            )
            raise InvalidSpec(msg, loss=name, noise=noise)
        return Likelihood(problem.normaliser, 0.0, 1.0)
    msg = (
        f"{name} is no negative log-likelihood with a known scale: make the session with "
        "cross_entropy, bce_with_logits, or mse and its noise"
    )
    raise InvalidSpec(msg, loss=name)


def log_likelihood(
    points: Points, likelihood: Likelihood, rows: int
) -> Query[tuple[float, Stop]]:
    """Sum the log-likelihood of all data points.

    Args:
        points: The data points.
        likelihood: How their losses are read.
        rows: Data points of a part at most.

    Yields:
        Progress.

    Returns:
        The sum, and why it ended.
    """
    problem = points.problem
    total = 0.0

    def share(batch: Batch) -> Tensor:
        with torch.no_grad():
            outputs = problem.outputs(problem.parameters, batch)
            wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
            loss = problem.loss.sum(wide, batch.targets).double()
            terms = problem.loss.counts(batch.targets).double().sum()
        return (likelihood.per_term * terms - likelihood.per_loss * loss).cpu()

    def take(value: Tensor, part: Part) -> None:
        nonlocal total
        total += float(value)

    stopped = yield from points.walk(share, take, list(points.parts(rows)))
    return total, stopped


def noise_of(
    points: Points, problem: Problem, draws: Sequence[int], *, seed: int, rows: int
) -> Query[Tensor]:
    """Pull noise with the covariance of the loss's curvature back: covariance G.

    With L a root of the loss's Hessian in the outputs, ``J^T L e`` (Antoran et al., ICLR
    2023). The noise belongs to data points: it does not depend on how they are cut.

    Args:
        points: The data points.
        problem: The same, as a function of the parameters in question.
        draws: Numbers of the draws, K.
        seed: The seed.
        rows: Data points of a part at most.

    Yields:
        Progress.

    Returns:
        [K, P].

    Raises:
        InvalidSpec: If the loss's Hessian has no root by formula.
    """
    jacobian = Jacobian(problem, JacobianOf.OUTPUTS)
    shape = points.look(jacobian.outputs_shape)
    each, count = math.prod(shape), len(points)
    noise = probes(
        Distribution.NORMAL,
        seed,
        [_OF_OUTPUTS + draw for draw in draws],
        count * each,
        dtype=problem.result_dtype,
        device=problem.device,
    ).reshape(len(draws), count, *shape)
    total = noise.new_zeros(len(draws), problem.layout.size)

    def pulled(batch: Batch) -> Tensor:
        with torch.no_grad():
            z = problem.outputs(problem.parameters, batch)
            wide = z.to(torch.promote_types(z.dtype, torch.float32))
            metric = loss_hessian(problem, wide, batch)
        root = getattr(metric, "root", None)
        if root is None:
            msg = (
                f"no root of the Hessian of {problem.loss.spec.name} is known, so its "
                "posterior is not sampled: use cross_entropy, bce_with_logits or mse"
            )
            raise InvalidSpec(msg, loss=problem.loss.spec.name)
        e = noise[:, batch.start : batch.start + len(batch.targets)]
        return jacobian.pull(batch, root(e).movedim(1, 0))

    def take(value: Tensor, part: Part) -> None:
        total.add_(value)

    yield from points.walk(pulled, take, list(points.parts(rows)))
    return total


def output_rows(
    points: Points, rows: OutputRows, part: Part
) -> Query[tuple[Tensor, Tensor]]:
    """Differentiate the outputs of one part of some data points.

    Args:
        points: The data points.
        rows: What differentiates them.
        part: The part.

    Yields:
        Progress.

    Returns:
        Outputs [b, *outputs], and gradients [b, C, P].
    """
    found: list[tuple[Tensor, Tensor]] = []

    def compute(batch: Batch) -> Tensor:
        found.append(rows(batch))
        return found[0][0]

    yield from points.walk(compute, lambda value, part: None, [part])
    return found[0]
