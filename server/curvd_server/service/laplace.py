"""Laplace: variances of predictions, and draws, of a posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvd.contract import Distribution, PosteriorSamplesOptions, PredictiveOptions
from curvd.errors import InvalidSpec, InvalidVector
from curvd.v1 import query_service_pb2 as query_pb
from curvd_server.engine.data_points import Points
from curvd_server.engine.data_points.jacobian_products import together
from curvd_server.engine.data_points.laplace import noise_of, output_rows
from curvd_server.engine.data_points.output_rows import OutputRows
from curvd_server.engine.objective import Problem, class_axis, on_inputs
from curvd_server.linalg import as_type, probes
from curvd_server.service.given_points import named_as, received
from curvd_server.service.posterior import (
    Posterior,
    check_plain,
    check_prior,
    posterior_of,
)
from curvd_server.service.query_call import QueryCall, to_numpy
from curvd_server.service.streams import Chunks

_OF_SYSTEM = 15
"""Vectors that are held of a system: 11 of block CG, right-hand side, solution, copies."""


async def predictive(
    call: QueryCall,
    header: query_pb.PredictiveHeader,
    options: PredictiveOptions,
    chunks: Chunks,
) -> None:
    """Compute variances of linearised outputs at inputs that are given.

    Args:
        call: The call, about an operator.
        header: Which posterior.
        options: The options in it.
        chunks: The inputs.

    Raises:
        InvalidSpec: If the loss is no likelihood, or inputs do not fit the dataset.
        InvalidVector: If there are none, or one is not finite.
    """
    posterior = posterior_of(call, options, header)
    problem = posterior.problem
    tensors = await received(call, chunks)
    if not tensors:
        msg = "predictive needs inputs: send them as the dataset has them, without targets"
        raise InvalidVector(msg, tensors=0)
    named = named_as(problem.model.data.inputs, tensors)
    given: Problem = await call.drive(
        posterior.points.run(lambda cancelled: on_inputs(problem, named))
    )
    points = call.points_beside(given)
    shape = await _outputs_shape(call, points, given)
    table = _Table(len(points), shape, covariance=options.covariance)
    block = call.together(table.count * table.each, options.block)
    at_once = max(1, block // table.each)
    call.reserve((_OF_SYSTEM + 2) * at_once * table.each)
    call.reserve_bytes(table.nbytes)
    rows = OutputRows(given)
    for part in points.parts(at_once):
        if posterior.stopped is not None:
            break
        ends = part.start / table.count, (part.start + len(part)) / table.count
        call.begin_part(*ends, tolerance=options.tolerance)
        z, J = await call.drive(output_rows(points, rows, part))
        X, residuals = await posterior.solve(J.reshape(-1, J.shape[-1]))
        table.put(part.start, z, J, X.reshape(J.shape), residuals)
    await call.send_tensors(table.tensors(to_numpy(J).dtype))
    await call.finish(
        query_pb.PredictiveSummary(
            query=posterior.cost(),
            relative_residuals=table.residuals.tolist(),
            scale=posterior.likelihood.scale,
            class_axis=await _class_axis(call, posterior),
        )
    )


async def _class_axis(call: QueryCall, posterior: Posterior) -> int:
    """Find the axis of the outputs that has the classes, from the session's targets.

    Counted from the last; 0 if outputs are no logits.
    """
    problem = posterior.problem
    if not problem.loss.spec.name.has_classes:
        return 0

    def look(cancelled: Any) -> int:
        batch = problem.data[0]
        with torch.no_grad():
            return class_axis(problem.outputs(problem.parameters, batch), batch)

    axis: int = await call.drive(posterior.points.run(look))
    return axis


async def _outputs_shape(
    call: QueryCall, points: Points, problem: Problem
) -> tuple[int, ...]:
    """Find the shape of what the model makes of one input."""

    def look(cancelled: Any) -> tuple[int, ...]:
        with torch.no_grad():
            outputs = problem.outputs(problem.parameters, problem.data[0])
        return tuple(outputs.shape[1:])

    shape: tuple[int, ...] = await call.drive(points.run(look))
    return shape


class _Table:
    """Means and variances, input by input.

    Args:
        count: T.
        shape: Of the outputs of one input.
        covariance: Whether all of their covariance is kept.
    """

    def __init__(self, count: int, shape: tuple[int, ...], *, covariance: bool) -> None:
        self.count, self.each = count, math.prod(shape)
        self._mean = np.full((count, *shape), np.nan)
        self._covariance = covariance
        wide = (count, self.each, self.each) if covariance else (count, *shape)
        self._variance = np.full(wide, np.nan)
        self.residuals = np.full(count, np.nan)

    @property
    def nbytes(self) -> int:
        """What it takes, and a copy on the way out."""
        return 2 * (self._mean.nbytes + self._variance.nbytes)

    def put(
        self, start: int, z: Tensor, J: Tensor, X: Tensor, residuals: Sequence[float]
    ) -> None:
        """Fill in some inputs.

        Args:
            start: Index of the first.
            z: [b, *outputs].
            J: [b, C, P].
            X: [b, C, P] Solutions.
            residuals: [b C] Relative residuals; NaN of systems that were not begun.
        """
        here = slice(start, start + len(z))
        worst = np.reshape(residuals, (len(z), -1)).max(1)
        self._mean[here] = z.double().cpu().numpy()
        self._mean[here][np.isnan(worst)] = np.nan
        self.residuals[here] = worst
        if self._covariance:
            found = torch.einsum("bcp,bdp->bcd", J.double(), X.double())
            found = (found + found.mT) / 2
        else:
            found = (J.double() * X.double()).sum(2)
        self._variance[here] = found.cpu().numpy().reshape(self._variance[here].shape)

    def tensors(self, dtype: np.dtype[Any]) -> dict[str, Any]:
        """Name what is sent, in the type of the session's vectors.

        Raises:
            ScaleOutOfRange: If the largest variance is no number of it.
        """
        name = "covariance" if self._covariance else "variance"
        known = torch.from_numpy(np.nan_to_num(self._variance, nan=0.0))
        as_type(
            known,
            torch.from_numpy(np.empty(0, dtype)).dtype,
            what="the largest variance",
            remedy="scale the outputs or the prior, or make the session in 'F64'",
        )
        return {"mean": self._mean.astype(dtype), name: self._variance.astype(dtype)}


async def samples(
    call: QueryCall,
    request: query_pb.PosteriorSamplesRequest,
    options: PosteriorSamplesOptions,
) -> None:
    """Draw from the posterior, exactly but for the residuals.

    Args:
        call: The call, about a GGN.
        request: Which posterior.
        options: The options in it, and how many draws.

    Raises:
        InvalidSpec: If the operator is another, the loss has no root by formula, or the
            objective has a weight decay, or draws are to be stored that were not begun.
        LimitExceeded: If there is no room for the draws.
    """
    check_plain(call.spec)
    posterior = posterior_of(call, options, request)
    check_prior(posterior.problem)
    if options.store:
        call.lease.vectors.check_room(options.store, call.vectors_bytes(options.k))
    call.reserve(_OF_SYSTEM * options.k + 2 * together(call))
    call.begin_part(0.0, 1.0, tolerance=options.tolerance)
    scale, problem = posterior.likelihood.scale, posterior.problem
    noise: Tensor = await call.drive(
        noise_of(
            posterior.points,
            problem,
            range(options.k),
            seed=options.seed,
            rows=together(call),
        )
    )
    own = probes(
        Distribution.NORMAL,
        options.seed,
        range(options.k),
        call.products.size,
        dtype=call.products.dtype,
        device=call.products.device,
    )
    deviations = posterior.prior.deviations(own)
    own = own * posterior.prior.least**0.5 if deviations is None else own / deviations
    B = noise.mul_(math.sqrt(scale)).add_(own)
    X, residuals = await posterior.solve(B)
    cost = posterior.cost()
    if options.store:
        _check_drawn(residuals, options)
        call.put(options.store, to_numpy(X))
    else:
        await call.send_tensors({"samples": to_numpy(X)})
    await call.finish(
        query_pb.PosteriorSamplesSummary(
            query=cost, relative_residuals=residuals, scale=scale
        )
    )


def _check_drawn(residuals: Sequence[float], options: PosteriorSamplesOptions) -> None:
    """Refuse to store draws of which nothing was computed."""
    missing = sum(map(math.isnan, residuals))
    if missing:
        msg = (
            f"nothing was computed of {missing} of {options.k} draws when products or time "
            f"ran out, so {options.store!r} is not stored: raise max_products or "
            "time_limit_s"
        )
        raise InvalidSpec(msg, store=options.store, missing=missing)
