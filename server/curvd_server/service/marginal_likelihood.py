"""Laplace: marginal likelihoods of priors, and the search for the likeliest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from curvd.contract import MarginalLikelihoodOptions, OperatorKind, Stop
from curvd.errors import DeadlineExceeded, InvalidSpec
from curvd.v1 import query_service_pb2 as query_pb
from curvd_server.engine.data_points.jacobian_products import together
from curvd_server.engine.data_points.laplace import likelihood_of, log_likelihood
from curvd_server.engine.objective import Problem
from curvd_server.linalg import (
    Products,
    Query,
    ShiftedDeterminants,
    likeliest_precisions,
    matrix,
    shifted_determinants,
    weighted_determinants,
)
from curvd_server.service.posterior import (
    Prior,
    check_likelihood,
    check_prior,
    check_scaled,
    prior_by_parameter,
    prior_of,
    refuse_indefinite,
)
from curvd_server.service.query_call import QueryCall

_SEARCHED = 4096
"""Largest P of which a search has all columns: P^3 operations a step, and four matrices."""


async def compute(
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
