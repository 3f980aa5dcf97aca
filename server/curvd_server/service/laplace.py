"""Laplace: variances of predictions, draws and marginal likelihoods of a posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvd.contract import (
    Distribution,
    MarginalLikelihoodOptions,
    OperatorKind,
    OperatorSpec,
    PosteriorSamplesOptions,
    PredictiveOptions,
    Stop,
)
from curvd.errors import InvalidSpec, InvalidVector
from curvd.v1 import query_service_pb2 as query_pb
from curvd_server.engine.data_points import Points
from curvd_server.engine.data_points.jacobian_products import together
from curvd_server.engine.data_points.laplace import (
    Likelihood,
    likelihood_of,
    log_likelihood,
    noise_of,
    output_rows,
)
from curvd_server.engine.data_points.output_rows import OutputRows
from curvd_server.engine.objective import Problem, on_inputs
from curvd_server.linalg import (
    LowRank,
    ShiftedDeterminants,
    SolveResult,
    probes,
    shifted_determinants,
    solve,
)
from curvd_server.service.given_points import named_as, received
from curvd_server.service.query_call import QueryCall, to_numpy
from curvd_server.service.streams import Chunks

_OF_SYSTEM = 15
"""Vectors that are held of a system: 11 of block CG, right-hand side, solution, copies."""


@dataclass
class _Posterior:
    """A Gaussian of precision ``scale A + prior I``, and its systems."""

    call: QueryCall
    points: Points
    problem: Problem
    """As a function of the operator's parameters."""
    likelihood: Likelihood
    prior: float
    tolerance: float
    known: LowRank | None
    stops: list[Stop] = field(default_factory=list)
    stopped: Stop | None = None
    """Why no more systems are begun."""

    async def solve(self, B: Tensor) -> tuple[Tensor, Sequence[float]]:
        """Solve a block: the solutions [k, P], and their relative residuals."""
        scale = self.likelihood.scale
        result: SolveResult = await self.call.drive(
            self.call.products.begin(
                solve,
                B / scale,
                damping=self.prior / scale,
                tolerance=self.tolerance,
                preconditioner=self.known,
            )
        )
        self.stops += result.column_stops
        if result.stopped in (Stop.PRODUCTS, Stop.TIME):
            self.stopped = result.stopped
        return result.solution, result.relative_residuals

    def cost(self) -> query_pb.QuerySummary:
        """Say what it took, and the worst of why systems ended."""
        severity = list(Stop)
        worst = max(self.stops, key=severity.index, default=Stop.CONVERGED)
        if self.stopped is not None:
            worst = max(worst, self.stopped, key=severity.index)
        return self.call.summary(worst)


def _posterior(
    call: QueryCall, options: PredictiveOptions | PosteriorSamplesOptions
) -> _Posterior:
    assert call.spec is not None
    _check_scaled(call.spec)
    points = call.points_beside()
    name: Any = options.preconditioner
    return _Posterior(
        call=call,
        points=points,
        problem=points.problem.restricted(call.spec),
        likelihood=likelihood_of(points.problem, options.noise),
        prior=options.prior,
        tolerance=options.tolerance,
        known=call.known(name) if name else None,
    )


async def predictive(
    call: QueryCall, options: PredictiveOptions, chunks: Chunks
) -> None:
    """Compute variances of linearised outputs at inputs that are given.

    Args:
        call: The call, about an operator.
        options: Which posterior.
        chunks: The inputs.

    Raises:
        InvalidSpec: If the loss is no likelihood, or inputs do not fit the dataset.
        InvalidVector: If there are none, or one is not finite.
    """
    posterior = _posterior(call, options)
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
        )
    )


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
            residuals: [b C] Relative residuals.
        """
        here = slice(start, start + len(z))
        self._mean[here] = z.double().cpu().numpy()
        self.residuals[here] = np.reshape(residuals, (len(z), -1)).max(1)
        if self._covariance:
            found = torch.einsum("bcp,bdp->bcd", J.double(), X.double())
            found = (found + found.mT) / 2
        else:
            found = (J.double() * X.double()).sum(2)
        self._variance[here] = found.cpu().numpy().reshape(self._variance[here].shape)

    def tensors(self, dtype: np.dtype[Any]) -> dict[str, Any]:
        """Name what is sent, in the type of the session's vectors."""
        name = "covariance" if self._covariance else "variance"
        return {"mean": self._mean.astype(dtype), name: self._variance.astype(dtype)}


async def samples(call: QueryCall, options: PosteriorSamplesOptions) -> None:
    """Draw from the posterior, exactly but for the residuals.

    Args:
        call: The call, about a GGN.
        options: Which posterior, and how many draws.

    Raises:
        InvalidSpec: If the operator is another, the loss has no root by formula, or the
            objective has a weight decay.
        LimitExceeded: If there is no room for the draws.
    """
    _check_plain(call.spec)
    posterior = _posterior(call, options)
    _check_prior(posterior.problem)
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
    B = noise.mul_(math.sqrt(scale)).add_(own, alpha=math.sqrt(options.prior))
    X, residuals = await posterior.solve(B)
    cost = posterior.cost()
    if options.store:
        call.put(options.store, to_numpy(X))
    else:
        await call.send_tensors({"samples": to_numpy(X)})
    await call.finish(
        query_pb.PosteriorSamplesSummary(
            query=cost, relative_residuals=residuals, scale=scale
        )
    )


def _check_plain(spec: OperatorSpec | None) -> None:
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


def _check_scaled(spec: OperatorSpec) -> None:
    """Refuse operators that are not divided as the loss is: its scale is not theirs."""
    if spec.kind is OperatorKind.JACOBIAN_GRAM:
        msg = (
            "the curvature of a posterior is that of the loss, got jacobian_gram, which is "
            "of no loss: ask the ggn, which is the same but for its scale where the loss "
            "is mse"
        )
        raise InvalidSpec(msg, operator=spec.kind)


def _check_likelihood(spec: OperatorSpec) -> None:
    """Refuse operators whose determinant is not that of the likelihood and the prior."""
    if spec.damping or spec.scale != 1.0:
        msg = (
            f"a marginal likelihood is of the loss and one prior, got an operator with "
            f"scale {spec.scale} and damping {spec.damping}: leave them out, and say prior "
            "instead of damping"
        )
        raise InvalidSpec(msg, scale=spec.scale, damping=spec.damping)


def _check_prior(problem: Problem) -> None:
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


def _refuse_indefinite(
    spec: OperatorSpec, found: ShiftedDeterminants, priors: Sequence[float]
) -> None:
    """Refuse priors at which there is no posterior, with what to use instead."""
    pairs = zip(priors, found.values, strict=True)
    wrong = [prior for prior, value in pairs if math.isnan(value)]
    instead = ""
    if spec.kind is OperatorKind.HESSIAN:
        instead = "ask the ggn, which has no negative curvature, or "
    msg = (
        f"the precision scale * {spec.kind} + prior * I is not positive definite at a prior "
        f"of {', '.join(f'{prior:g}' for prior in wrong[:3])}, so there is no Gaussian of "
        f"it: {instead}take larger priors"
    )
    raise InvalidSpec(msg, operator=spec.kind, prior=wrong[0] if wrong else priors[0])


async def marginal_likelihood(
    call: QueryCall, options: MarginalLikelihoodOptions, priors: Sequence[float]
) -> None:
    """Compute Laplace's marginal likelihood for several priors.

    Args:
        call: The call, about an operator.
        options: How determinants are computed.
        priors: Precisions, D.

    Raises:
        InvalidSpec: If the loss is no likelihood, or the operator or the objective has a
            scale, a damping or a weight decay, or there is no posterior.
    """
    assert call.spec is not None
    _check_scaled(call.spec)
    points = call.points_beside()
    problem = points.problem.restricted(call.spec)
    _check_likelihood(call.spec)
    if call.spec.kind in (OperatorKind.HESSIAN, OperatorKind.GGN):
        _check_prior(problem)  # Fishers have no share of the weight decay
    likelihood = likelihood_of(points.problem, options.noise)
    scale, size = likelihood.scale, call.products.size
    steps = min(options.steps, size)
    block = call.krylov_block(steps, options.probes)
    call.reserve(max(block * (steps + 3), 2 * size if size <= 4096 else 0))
    found: ShiftedDeterminants = await call.drive(
        call.products.begin(
            shifted_determinants,
            [prior / scale for prior in priors],
            samples=options.probes,
            steps=steps,
            seed=options.seed,
            block=block,
        )
    )
    if found.stopped is Stop.NEGATIVE_CURVATURE:
        _refuse_indefinite(call.spec, found, priors)
    own, _ = await call.drive(log_likelihood(points, likelihood, together(call)))
    squared = sum(float(p.double().square().sum()) for p in problem.parameters)
    logs = [value + size * math.log(scale) for value in found.values]
    pairs = list(zip(logs, priors, strict=True))
    await call.finish(
        query_pb.MarginalLikelihoodSummary(
            query=call.summary(found.stopped),
            values=[
                own - (log - size * math.log(prior) + prior * squared) / 2
                for log, prior in pairs
            ],
            standard_errors=[error / 2 for error in found.standard_errors],
            log_determinants=logs,
            log_likelihood=own,
            squared_norm=squared,
            scale=scale,
            exact=found.exact,
        )
    )
