"""A Gaussian around the parameters: its prior, its systems, and what has none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvd.contract import (
    OperatorKind,
    OperatorSpec,
    PosteriorSamplesOptions,
    PredictiveOptions,
    Stop,
)
from curvd.contract.query_options.laplace import PRIOR, check_one_prior
from curvd.errors import InvalidSpec, InvalidVector
from curvd.v1 import query_service_pb2 as query_pb
from curvd_server.engine.data_points import Points
from curvd_server.engine.data_points.laplace import Likelihood, likelihood_of
from curvd_server.engine.objective import Problem
from curvd_server.linalg import LowRank, ShiftedDeterminants, SolveResult, solve
from curvd_server.service.query_call import QueryCall

_LEAST, _MOST = 1e-100, 1e100
"""Of precisions, as of those that are one number."""


@dataclass(frozen=True, slots=True)
class Prior:
    """Precision of the parameters before any data: one number, or one for each element."""

    precision: float | Tensor
    """[P] of the operator's parameters, float64, if they differ."""
    by_parameter: tuple[float, ...] = ()
    """One for each parameter, where they differ between these alone."""

    @property
    def least(self) -> float:
        """The smallest."""
        p = self.precision
        return float(p.min()) if isinstance(p, Tensor) else p

    def deviations(self, like: Tensor) -> Tensor | None:
        """Give ``1 / sqrt(precision)``, in type and place of vectors; None: all are alike.

        With ``D`` the diagonal matrix of these, ``scale A + prior`` is ``D^-1 (scale D A D
        + I) D^-1``: what knows a damping that is a multiple of the identity knows this one.
        """
        p = self.precision
        return p.rsqrt().to(like) if isinstance(p, Tensor) else None

    def log_determinant(self, size: int) -> float:
        """Compute that of the diagonal matrix of all P precisions."""
        p = self.precision
        return float(p.log().sum()) if isinstance(p, Tensor) else size * math.log(p)

    def square_of(self, problem: Problem) -> float:
        """Sum ``precision θ^2`` over the parameters."""
        theta = torch.cat([q.double().reshape(-1).cpu() for q in problem.parameters])
        return float((self.precision * theta.square()).sum())


def prior_of(
    call: QueryCall,
    problem: Problem,
    number: float,
    given: query_pb.ParameterPriors | None,
) -> Prior:
    """Read a prior off a request.

    Args:
        call: The call, about an operator.
        problem: The objective, as a function of the operator's parameters.
        number: Precision, if all are alike.
        given: Precisions, if they are not; None: they are.

    Returns:
        The prior.

    Raises:
        InvalidSpec: If there are not as many numbers as parameters, or they are named in
            two ways.
        InvalidVector: If what is stored is no vector of precisions.
    """
    if given is None:
        return Prior(number)
    parameters = problem.layout.parameters
    if bool(given.by_parameter) == bool(given.stored):
        ways = "both" if given.stored else "neither"
        msg = f"priors are by_parameter or stored, one of the two, got {ways}"
        raise InvalidSpec(msg, stored=given.stored)
    if given.stored:
        return Prior(_stored(call, given.stored))
    if len(given.by_parameter) != len(parameters):
        msg = (
            f"priors by_parameter are a number for each of the operator's "
            f"{len(parameters)} parameters, got {len(given.by_parameter)}"
        )
        raise InvalidSpec(msg, parameters=len(parameters), got=len(given.by_parameter))
    call.reserve_bytes(8 * problem.layout.size)
    return prior_by_parameter(problem, given.by_parameter)


def prior_by_parameter(problem: Problem, precisions: Sequence[float]) -> Prior:
    """Make a prior of a precision for each parameter."""
    sizes = torch.tensor([p.size for p in problem.layout.parameters])
    each = torch.tensor([*precisions], dtype=torch.float64)
    return Prior(each.repeat_interleave(sizes), tuple(precisions))


def _stored(call: QueryCall, name: str) -> Tensor:
    vectors = call.stored(name).double().cpu()
    if len(vectors) != 1:
        msg = f"priors are one vector [P], and {name!r} has {len(vectors)} columns"
        raise InvalidVector(msg, name=name, columns=len(vectors))
    least, most = float(vectors.min()), float(vectors.max())
    if not (least >= _LEAST and most <= _MOST):
        msg = (
            f"precisions of a prior are in [{_LEAST:g}, {_MOST:g}], and {name!r} has "
            f"elements from {least:g} to {most:g}"
        )
        raise InvalidVector(msg, name=name, least=least, most=most)
    call.reserve_bytes(vectors.nbytes)
    return vectors[0]


@dataclass
class Posterior:
    """A Gaussian of precision ``scale A + prior``, and its systems."""

    call: QueryCall
    points: Points
    problem: Problem
    """As a function of the operator's parameters."""
    likelihood: Likelihood
    prior: Prior
    tolerance: float
    known: LowRank | None
    stops: list[Stop] = field(default_factory=list)
    stopped: Stop | None = None
    """Why no more systems are begun."""

    async def solve(self, B: Tensor) -> tuple[Tensor, Sequence[float]]:
        """Solve a block: the solutions [k, P], and their relative residuals.

        Both are NaN of a system of which nothing was computed. Where precisions differ, in
        the variables in which the prior is the identity: there all eigenvalues are 1 and
        more, so that an error is no longer than its residual.
        """
        scale, prior = self.likelihood.scale, self.prior.precision
        products, known = self.call.products, self.known
        deviations = self.prior.deviations(B)
        damping = prior / scale if isinstance(prior, float) else 1 / scale
        if deviations is not None:
            products, B = products.congruent(deviations), B * deviations
            if known is not None:
                known = known.congruent(deviations, products.space)
        result: SolveResult = await self.call.drive(
            products.begin(
                solve,
                B / scale,
                damping=damping,
                tolerance=self.tolerance,
                preconditioner=known,
            )
        )
        self.stops += result.column_stops
        if result.stopped in (Stop.PRODUCTS, Stop.TIME):
            self.stopped = result.stopped
        X = result.solution if deviations is None else result.solution * deviations
        unknown = result.unknown
        X[unknown] = math.nan
        missing = zip(result.relative_residuals, unknown.tolist(), strict=True)
        return X, [math.nan if none else residual for residual, none in missing]

    def cost(self) -> query_pb.QuerySummary:
        """Say what it took, and the worst of why systems ended."""
        severity = list(Stop)
        worst = max(self.stops, key=severity.index, default=Stop.CONVERGED)
        if self.stopped is not None:
            worst = max(worst, self.stopped, key=severity.index)
        return self.call.summary(worst)


def posterior_of(
    call: QueryCall,
    options: PredictiveOptions | PosteriorSamplesOptions,
    request: query_pb.PredictiveHeader | query_pb.PosteriorSamplesRequest,
) -> Posterior:
    """Make the posterior that a request describes.

    Args:
        call: The call, about an operator.
        options: The options in it.
        request: Its message, which has the priors.

    Returns:
        The posterior.

    Raises:
        InvalidSpec: If the loss is no likelihood, the operator none of its curvature, or the
            prior is given twice.
        InvalidVector: If what is stored is no vector of precisions.
    """
    assert call.spec is not None
    check_scaled(call.spec)
    points = call.points_beside()
    problem = points.problem.restricted(call.spec)
    name: Any = options.preconditioner
    given = request.priors if request.HasField("priors") else None
    check_one_prior(options.prior, given)
    number = PRIOR if options.prior is None else options.prior
    return Posterior(
        call=call,
        points=points,
        problem=problem,
        likelihood=likelihood_of(points.problem, options.noise),
        prior=prior_of(call, problem, number, given),
        tolerance=options.tolerance,
        known=call.known(name) if name else None,
    )


def check_plain(spec: OperatorSpec | None) -> None:
    """Refuse operators whose root is not known."""
    assert spec is not None
    plain = OperatorSpec(kind=OperatorKind.GGN, parameters=spec.parameters)
    if spec != plain:
        msg = (
            f"draws are from the posterior of the exact ggn, without blocks, scale, damping "
            f"and mc_samples, got {spec.kind} with scale {spec.scale} and damping "
            f"{spec.damping}: say prior instead of damping"
        )
        raise InvalidSpec(msg, operator=spec.kind)


def check_scaled(spec: OperatorSpec) -> None:
    """Refuse operators that are not divided as the loss is: its scale is not theirs."""
    if spec.kind is OperatorKind.JACOBIAN_GRAM:
        msg = (
            "the curvature of a posterior is that of the loss, got jacobian_gram, which is "
            "of no loss: ask the ggn, which is the same but for its scale where the loss "
            "is mse"
        )
        raise InvalidSpec(msg, operator=spec.kind)


def check_likelihood(spec: OperatorSpec) -> None:
    """Refuse operators whose determinant is not that of the likelihood and the prior."""
    if spec.damping or spec.scale != 1.0:
        msg = (
            f"a marginal likelihood is of the loss and one prior, got an operator with "
            f"scale {spec.scale} and damping {spec.damping}: leave them out, and say prior "
            "instead of damping"
        )
        raise InvalidSpec(msg, scale=spec.scale, damping=spec.damping)


def check_prior(problem: Problem) -> None:
    """Refuse a weight decay, which would be a second prior that draws and values lack."""
    largest = max(problem.decay.coefficients, default=0.0)
    if largest:
        msg = (
            f"the objective has a weight_decay of up to {largest}, a prior of its own, "
            "beside the one of the call: make the session without weight_decay, and add "
            f"scale * weight_decay to the prior (here {largest} times what a predictive "
            "calls its scale)"
        )
        raise InvalidSpec(msg, weight_decay=largest)


def refuse_indefinite(
    spec: OperatorSpec, found: ShiftedDeterminants, priors: Sequence[Prior]
) -> None:
    """Refuse priors at which there is no posterior, with what to use instead."""
    pairs = zip(priors, found.values, strict=True)
    wrong = [prior.least for prior, value in pairs if math.isnan(value)]
    instead = ""
    if spec.kind is OperatorKind.HESSIAN:
        instead = "ask the ggn, which has no negative curvature, or "
    msg = (
        f"the precision scale * {spec.kind} + prior * I is not positive definite at a prior "
        f"of {', '.join(f'{prior:g}' for prior in wrong[:3])}, so there is no Gaussian of "
        f"it: {instead}take larger priors"
    )
    raise InvalidSpec(
        msg, operator=spec.kind, prior=wrong[0] if wrong else priors[0].least
    )
