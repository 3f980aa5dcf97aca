"""Logarithms of determinants by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from curvd.contract import Distribution, LogDetOptions, Stop
from curvd.errors import ScaleOutOfRange
from curvd_server.linalg.base import Multiply, Products, Progress, Query
from curvd_server.linalg.definition import Definition, Room
from curvd_server.linalg.intervals import Mean, mean_of, widened
from curvd_server.linalg.lanczos import Quadrature, quadratures
from curvd_server.linalg.low_rank import LowRank, Preconditioner
from curvd_server.linalg.sampling import LEAST_SAMPLES, Estimate, Target
from curvd_server.linalg.whole import summed

_HIDDEN = 4
"""Roundings of the largest eigenvalue by which products move the others."""
_NULL = 0.5
"""Eigenvalues that may be zero, on average over the probes, for a map that may be singular."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogDetResult(Estimate):
    """A logarithm of a determinant; NaN where the map is not positive definite."""

    smallest: float
    """Smallest Ritz value met, damping included, of the preconditioned map if there is a
    preconditioner; positive unless curvature stopped."""


def logdet(
    products: Products,
    *,
    damping: float = 0.0,
    steps: int = 32,
    target: Target,
    seed: int = 0,
    block: int = 1,
    known: LowRank | None = None,
) -> Query[LogDetResult]:
    """Estimate ``log det(A + damping * I)`` of a positive definite map.

    ``P`` times the mean over probes of the quadrature of ``log(λ + damping)`` (Ubaru,
    Chen & Saad, SIAM J. Matrix Anal. Appl. 38, 2017). Rademacher probes have length
    ``sqrt(P)`` exactly, which removes the variance of a constant shift. What is known of
    the largest eigenvalues is exact: ``log det P + log det(P^-1/2 (A + damping * I)
    P^-1/2)`` with its preconditioner P (Wenger et al., ICML 2022). What the steps leave open
    is part of the error (`Logarithms`).

    Args:
        products: The map A.
        damping: Added to every eigenvalue.
        steps: Lanczos steps per probe.
        target: When to stop; ``samples`` counts probes.
        seed: The seed of the probes.
        block: Probes that take each step together.
        known: Of the largest eigenvalues of A, or of a map like it.

    Yields:
        The estimate and its standard error, after each block.

    Returns:
        The estimate. A Ritz value that is not positive ends the query: it proves that
        the damped map is not positive definite. It is `Stop.STAGNATED` where zero is no
        eigenvalue that the steps exclude: the interval is that of a map without.
    """
    eigenvalues = products.eigenvalues()
    if eigenvalues is not None:
        return _of_eigenvalues(products, eigenvalues + damping)

    def estimate(map_: Products, damping: float) -> Query[LogDetResult]:
        return _estimate(map_, damping, steps, target, seed, block, known)

    try:
        return (yield from estimate(products, damping))
    except ScaleOutOfRange:
        if not damping > 0:
            raise
    # What is too small to be multiplied alone is not, beside its damping.
    found = yield from estimate(products.shifted(damping), 0.0)
    return replace(found, products=products.done)


def _estimate(
    products: Products,
    damping: float,
    steps: int,
    target: Target,
    seed: int,
    block: int,
    known: LowRank | None,
) -> Query[LogDetResult]:
    """Estimate it from products; see `logdet`."""
    at = None if known is None else known.at(damping, products.space)
    exact = 0.0 if at is None else at.log_determinant
    seen = _seen(products, damping, at)
    shift = damping if at is None else 0.0
    logs = Logarithms(shift, torch.finfo(products.dtype).eps)
    mean = logs.mean(products.size)
    smallest, rounding = math.inf, 0.0
    stopped = Stop.CONVERGED
    while len(logs) < target.samples:
        indices = range(len(logs), min(target.samples, len(logs) + block))
        W = products.space.probes(Distribution.RADEMACHER, seed, indices)
        found = yield from quadratures(
            products, W, steps, iteration=products.done, multiply=seen
        )
        if found is None:
            stopped = products.refusal(len(indices)) or Stop.TIME
            break
        smallest = min(smallest, *(float(q.nodes[0]) + shift for q in found))
        if smallest <= 0:
            stopped, logs = Stop.NEGATIVE_CURVATURE, Logarithms(shift, 0.0)
            mean = logs.mean(products.size)
            break
        # Relative to the largest logarithm, which others may cancel.
        rounding = max(
            rounding,
            products.rounding
            * products.size
            * max(float(np.abs(np.log(q.nodes + shift)).max()) for q in found),
        )
        logs.add(found)
        mean = widened(logs.mean(products.size, exact), rounding)
        yield Progress(
            iteration=len(logs),
            products=products.done,
            estimates=(mean.value,),
            residuals=(mean.standard_error,),
        )
        if len(logs) >= LEAST_SAMPLES and target.reached(mean):
            break
    if (
        stopped is Stop.CONVERGED
        and (damping <= 0 or at is None)
        and logs.may_be_singular(products.size)
    ):
        stopped = Stop.STAGNATED
    return LogDetResult(
        value=mean.value,
        standard_error=mean.standard_error,
        half_width=mean.half_width,
        samples=len(logs),
        products=products.done,
        stopped=stopped,
        smallest=smallest,
    )


class Logarithms:
    """Integrals of ``log(λ + shift)`` over the measures of probes, between their bounds.

    A run of m steps does not tell eigenvalues apart that are close together at the lower end of
    a wide spectrum. How far its quadrature may be from the integral is known for each probe,
    and belongs to the error of the mean.
    """

    def __init__(self, shift: float, eps: float) -> None:
        """Begin without probes.

        Args:
            shift: Added to every eigenvalue. None of the sums is smaller, as long as no Ritz
                value is negative; else none is smaller than rounding of the largest.
            eps: Rounding of the map's products.
        """
        self._shift, self._eps = shift, eps
        self._quadratures: list[Quadrature] = []
        self._bounds: list[tuple[float, float]] = []
        self._null: list[float] = []
        self._is_definite = shift > 0

    def __len__(self) -> int:
        """Count the probes."""
        return len(self._bounds)

    def add(self, found: Sequence[Quadrature]) -> None:
        """Take more probes in.

        Args:
            found: Their quadratures; no node plus shift is negative or zero.
        """
        self._quadratures += found
        known = self._shift * (1 - math.sqrt(self._eps))
        if self._is_definite and any(
            q.nodes[0] < 0 or _below(q) >= known for q in found
        ):
            self._is_definite, self._bounds, self._null = False, [], []
        for q in self._quadratures[len(self._bounds) :]:
            largest = float(q.nodes[-1]) + self._shift
            hidden = _HIDDEN * self._eps * largest
            least = self._eps * largest
            if self._is_definite:
                least = self._shift - _below(q)
            low, high = q.of_logarithms(self._shift, least)
            # Where products were rounded, eigenvalues are so much smaller or larger.
            shifted = q.nodes + self._shift
            smaller = np.maximum(shifted - hidden, np.minimum(least, shifted))
            low -= float(q.weights @ np.log(shifted / smaller))
            high += float(q.weights @ np.log1p(hidden / shifted))
            self._bounds.append((low, high))
            self._null.append(self._weight_below(q, least, hidden))

    def _weight_below(self, q: Quadrature, least: float, hidden: float) -> float:
        """Bound the weight of what rounding may hide."""
        below = min(least, float(q.nodes[0]) + self._shift) / 2
        nodes, weights = q.with_node(below - self._shift)
        return float(weights[nodes + self._shift <= hidden].sum())

    def may_be_singular(self, size: int) -> bool:
        """Tell whether zero may be an eigenvalue, as far as the steps went.

        The weight of a null space of dimension d is d / P, on average over the probes.

        Args:
            size: P.

        Returns:
            Whether the moments are also those of a map with a null space.
        """
        if self._is_definite or not self._null:
            return False
        return size * math.fsum(self._null) / len(self._null) >= _NULL

    def mean(self, size: int, known: float = 0.0) -> Mean:
        """Average, with the errors of sampling and of the quadratures together.

        Args:
            size: P, by which the mean is multiplied.
            known: Added to it.

        Returns:
            An estimate of a logarithm of a determinant.
        """
        if not self._bounds:
            return Mean(math.nan, math.inf, math.inf)
        mean = mean_of([known + size * (low + high) / 2 for low, high in self._bounds])
        gap = size * math.fsum(high - low for low, high in self._bounds) / 2
        gap /= len(self._bounds)
        return Mean(mean.value, mean.standard_error + gap, mean.half_width + gap)


def _below(q: Quadrature) -> float:
    """Tell how far below zero eigenvalues may be where no Ritz value is.

    One step shows no sign: what it leaves open may be on either side.
    """
    return abs(float(q.nodes[0])) + q.residual if len(q.nodes) == 1 else 0.0


def _of_eigenvalues(products: Products, eigenvalues: Tensor) -> LogDetResult:
    """Add up the logarithms of all eigenvalues, [P], where all of them are positive.

    One that rounding of the largest would hide may as well be zero, or negative.
    """
    smallest = float(eigenvalues.min())
    hidden = torch.finfo(eigenvalues.dtype).eps * float(eigenvalues.max())
    if smallest <= max(hidden, 0.0):
        value, rounding, stopped = math.nan, math.inf, Stop.NEGATIVE_CURVATURE
    else:
        value, rounding = summed(products, eigenvalues.log())
        stopped = Stop.CONVERGED
    return LogDetResult(
        value=value,
        standard_error=rounding,
        half_width=rounding,
        samples=0,
        products=products.done,
        stopped=stopped,
        smallest=smallest,
    )


def _seen(
    products: Products, damping: float, at: Preconditioner | None
) -> Multiply | None:
    """Make the map whose logarithm is estimated, if it is not the map itself."""
    if at is None:
        return None

    def multiply(V: Tensor) -> Tensor:
        W = at.root(V)
        return at.root(products.damped(W, damping))

    return multiply


def _begin(
    products: Products, options: LogDetOptions, room: Room
) -> Query[LogDetResult]:
    steps = min(options.steps, products.size)
    return products.begin(
        logdet,
        damping=options.damping,
        steps=steps,
        target=Target.of(options, options.probes),
        seed=options.seed,
        block=room.krylov_block(steps, options.probes),
        known=room.known(options.preconditioner) if options.preconditioner else None,
    )


def _vectors(options: LogDetOptions, room: Room) -> int:
    steps = min(options.steps, room.size)
    return room.krylov_block(steps, options.probes) * (steps + 3)


DEFINITION = Definition(options=LogDetOptions, vectors=_vectors, begin=_begin)
