"""Laplace: variances of predictions, draws and marginal likelihoods of a posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvd.contract import (
    Distribution,
    MarginalLikelihoodOptions,
    OperatorKind,
    PosteriorSamplesOptions,
    PredictiveOptions,
    Stop,
)
from curvd.errors import DeadlineExceeded, InvalidSpec, InvalidVector
from curvd.v1 import query_service_pb2 as query_pb
from curvd_server.engine.data_points import Points
from curvd_server.engine.data_points.jacobian_products import together
from curvd_server.engine.data_points.laplace import (
    likelihood_of,
    log_likelihood,
    noise_of,
    output_rows,
)
from curvd_server.engine.data_points.output_rows import OutputRows
from curvd_server.engine.objective import Problem, class_axis, on_inputs
from curvd_server.linalg import (
    Products,
    Query,
    ShiftedDeterminants,
    as_type,
    likeliest_precisions,
    matrix,
    probes,
    shifted_determinants,
    weighted_determinants,
)
from curvd_server.service.given_points import named_as, received
from curvd_server.service.posterior import (
    Posterior,
    Prior,
    check_likelihood,
    check_plain,
    check_prior,
    check_scaled,
    posterior_of,
    prior_by_parameter,
    prior_of,
    refuse_indefinite,
)
from curvd_server.service.query_call import QueryCall, to_numpy
from curvd_server.service.streams import Chunks

_SEARCHED = 4096
"""Largest P of which a search has all columns: P^3 operations a step, and four matrices."""
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


async def marginal_likelihood(
    call: QueryCall,
    request: query_pb.MarginalLikelihoodRequest,
    options: MarginalLikelihoodOptions,
) -> None:
    """Compute Laplace's marginal likelihood for several priors.

    Args:
        call: The call, about an operator.
        request: The priors, D.
        options: How determinants are computed.

    Raises:
        InvalidSpec: If the loss is no likelihood, or the operator or the objective has a
            scale, a damping or a weight decay, or there is no posterior.
        InvalidVector: If what is stored is no vector of precisions.
    """
    assert call.spec is not None
    check_scaled(call.spec)
    points = call.points_beside()
    problem = points.problem.restricted(call.spec)
    check_likelihood(call.spec)
    if call.spec.kind in (OperatorKind.HESSIAN, OperatorKind.GGN):
        check_prior(problem)  # Fishers have no share of the weight decay
    likelihood = likelihood_of(points.problem, options.noise)
    scale, size = likelihood.scale, call.products.size
    priors, products = _priors(call, problem, request), call.products
    likeliest: list[query_pb.ParameterPriors] = []
    if options.search:
        products = await _dense(call, priors)
        priors = [
            await call.drive(_likeliest(products, problem, prior, scale, options))
            for prior in priors
        ]
        likeliest = [_said(prior) for prior in priors]
    found = await call.drive(_determinants(call, products, priors, scale, options))
    if found.stopped is Stop.NEGATIVE_CURVATURE:
        refuse_indefinite(call.spec, found, priors)
    own, _ = await call.drive(log_likelihood(points, likelihood, together(call)))
    squared = sum(float(p.double().square().sum()) for p in problem.parameters)
    # What was found is of `A + prior / scale`, or of `D A D + I / scale`.
    logs = [
        value
        + size * math.log(scale)
        + (prior.log_determinant(size) if isinstance(prior.precision, Tensor) else 0)
        for prior, value in zip(priors, found.values, strict=True)
    ]
    await call.finish(
        query_pb.MarginalLikelihoodSummary(
            query=call.summary(found.stopped),
            values=[
                own - (log - prior.log_determinant(size) + prior.square_of(problem)) / 2
                for prior, log in zip(priors, logs, strict=True)
            ],
            standard_errors=[error / 2 for error in found.standard_errors],
            log_determinants=logs,
            log_likelihood=own,
            squared_norm=squared,
            scale=scale,
            exact=found.exact,
            found=likeliest,
        )
    )


def _priors(
    call: QueryCall, problem: Problem, request: query_pb.MarginalLikelihoodRequest
) -> list[Prior]:
    """Read the priors of a request: numbers, or those that differ."""
    if not request.parameter_priors:
        return [Prior(prior) for prior in request.priors or (1.0,)]
    if request.priors:
        msg = (
            f"priors are numbers or parameter_priors, not both; got {len(request.priors)} "
            f"and {len(request.parameter_priors)}: write numbers as parameter_priors, too"
        )
        raise InvalidSpec(msg, priors=len(request.priors))
    return [prior_of(call, problem, 1.0, one) for one in request.parameter_priors]


async def _dense(call: QueryCall, priors: Sequence[Prior]) -> Products:
    """Multiply with every unit vector, for searches and determinants from then on.

    Raises:
        InvalidSpec: If P is too large, products too few, or a prior is a stored vector.
    """
    map_, size = call.products, call.products.size
    if size > _SEARCHED or map_.allowed(size) < size:
        msg = (
            f"search makes a product with each of the {size} unit vectors, at most "
            f"{_SEARCHED}, and {map_.allowed(size)} are left: choose parameters with "
            "params, raise max_products, or compare priors without search"
        )
        raise InvalidSpec(msg, size=size)
    if any(isinstance(p.precision, Tensor) and not p.by_parameter for p in priors):
        msg = (
            "search finds a number, or one for each parameter, and a prior is a stored "
            "vector [P]: give it by names, or leave search out"
        )
        raise InvalidSpec(msg, search=True)
    call.reserve_bytes(4 * 8 * size * size)
    A: Tensor | None = await call.drive(matrix(map_, call.block))
    if A is None:
        msg = (
            f"time was up after {map_.done} of the {size} products of a search: raise "
            "time_limit_s, or compare priors without search"
        )
        raise DeadlineExceeded(msg)
    whole = (A.double() + A.double().mT) / 2
    return Products(
        lambda V: V @ whole.to(V), size=size, dtype=torch.float64, device=A.device
    )


def _likeliest(
    products: Products,
    problem: Problem,
    prior: Prior,
    scale: float,
    options: MarginalLikelihoodOptions,
) -> Query[Prior]:
    """Search from a prior, in its structure."""
    squares = [float(p.double().square().sum()) for p in problem.parameters]
    sizes, start = [p.size for p in problem.layout.parameters], prior.by_parameter
    if not start:
        sizes, squares, start = [products.size], [sum(squares)], (prior.least,)
    A = scale * products(
        torch.eye(products.size, dtype=torch.float64, device=products.device)
    )
    best = yield from likeliest_precisions(
        A, sizes, squares, start, steps=options.search
    )
    return prior_by_parameter(problem, best) if prior.by_parameter else Prior(best[0])


def _said(prior: Prior) -> query_pb.ParameterPriors:
    return query_pb.ParameterPriors(by_parameter=prior.by_parameter or (prior.least,))


def _determinants(
    call: QueryCall,
    products: Products,
    priors: Sequence[Prior],
    scale: float,
    options: MarginalLikelihoodOptions,
) -> Query[ShiftedDeterminants]:
    """Begin what computes the determinants of posteriors, but for those of their priors."""
    size = products.size
    steps = min(options.steps, size)
    block = call.krylov_block(steps, options.probes)
    call.reserve(max(block * (steps + 3), 2 * size if size <= 4096 else 0))
    how = {
        # A search has all columns, so determinants are exact.
        "samples": max(options.probes, size if options.search else 0),
        "steps": steps,
        "seed": options.seed,
        "block": block,
    }
    numbers = [p.precision for p in priors if not isinstance(p.precision, Tensor)]
    if numbers:
        dampings = [number / scale for number in numbers]
        return products.begin(shifted_determinants, dampings, **how)
    call.reserve(len(priors))
    like = torch.empty(0, dtype=products.dtype, device=products.device)
    deviations = [prior.deviations(like) for prior in priors]
    weights = torch.stack([d for d in deviations if d is not None])
    return products.begin(weighted_determinants, weights, 1 / scale, **how)
