"""Diagonals: Hutchinson and XDiag."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvd.contract import DiagonalOptions, Distribution, Estimator, Stop
from curvd.errors import InvalidSpec
from curvd_server.linalg.base import Products, Progress, Query
from curvd_server.linalg.definition import Definition, Room
from curvd_server.linalg.intervals import few, student_975
from curvd_server.linalg.sampling import LEAST_SAMPLES, Target, vectors_of
from curvd_server.linalg.sketch import Sketch
from curvd_server.linalg.space import Space
from curvd_server.linalg.whole import is_small, matrix, rounding_of


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagonalResult:
    """A diagonal, element by element with its uncertainty."""

    values: Tensor
    """[P]; NaN if not even one product was allowed."""
    standard_errors: Tensor
    """[P]."""
    samples: int
    products: int
    stopped: Stop

    @property
    def quantile(self) -> float:
        """The 95 % interval of an element in standard errors to either side."""
        if not self.standard_errors.isfinite().all():
            return math.inf
        return few(self.samples) * student_975(max(1, self.samples - 1))

    @property
    def relative_error(self) -> float:
        """Norm of the standard errors relative to the diagonal's."""
        norms = Space.of(self.values).norms
        length = float(norms(self.values))
        return float(norms(self.standard_errors)) / length if length > 0 else math.inf


_SHARED = math.sqrt(2)
"""XDiag's samples share their sketch, so their spread sees half of the variance that
interactions of two probes cause (see `xtrace`). Where probes do not interact, because
eigenvalues decay fast, this overstates the error."""


def diagonal(
    products: Products,
    *,
    estimator: Estimator = Estimator.EXCHANGEABLE,
    target: Target,
    seed: int = 0,
    block: int = 8,
) -> Query[DiagonalResult]:
    """Estimate the diagonal of a symmetric map.

    Args:
        products: The map.
        estimator: Hutchinson or exchangeable (XDiag).
        target: When to stop; the error is the norm of the standard errors, the
            estimate the norm of the diagonal.
        seed: The seed of the probes.
        block: Probes multiplied together.

    Returns:
        The diagonal.
    """
    if is_small(products, target):
        return _whole(products, block)
    method = xdiag if estimator is Estimator.EXCHANGEABLE else hutchinson_diagonal
    return method(products, target=target, seed=seed, block=block)


def _whole(products: Products, block: int) -> Query[DiagonalResult]:
    """Read the diagonal off all columns."""
    A = yield from matrix(products, block)
    moments = _Moments(products)
    if A is None:
        return moments.result(products.refusal() or Stop.TIME)
    moments.count = products.size
    own = products.space.own
    rounding = rounding_of(products, A)[own]
    moments.exact(A[own].diagonal().clone(), rounding.to(A))
    return moments.result(Stop.CONVERGED)


def hutchinson_diagonal(
    products: Products, *, target: Target, seed: int = 0, block: int = 8
) -> Query[DiagonalResult]:
    """Average ``w * Aw`` (Bekas, Kokiopoulou & Saad, Appl. Numer. Math. 57, 2007).

    Args:
        products: The map A.
        target: When to stop.
        seed: The seed of the probes.
        block: Probes multiplied together.

    Yields:
        Norm of the diagonal, and of its standard errors.

    Returns:
        The diagonal.
    """
    moments = _Moments(products)
    stopped = Stop.CONVERGED
    while moments.count < target.samples:
        wanted = min(block, target.samples - moments.count)
        wanted = max(1, products.allowed(wanted))
        reason = products.refusal(wanted)
        if reason is not None:
            stopped = reason
            break
        W = products.space.probes(
            Distribution.RADEMACHER, seed, range(moments.count, moments.count + wanted)
        )
        for row in W * products(W):
            moments.add(row)
        yield moments.progress()
        if moments.count >= LEAST_SAMPLES and moments.reached(target):
            break
    return moments.result(stopped)


def xdiag(
    products: Products, *, target: Target, seed: int = 0, block: int = 8
) -> Query[DiagonalResult]:
    """Use every probe for both terms (Epperly, Tropp & Webber, SIMAX 45, 2024).

    With ``P`` the projector on the sketch of all probes but w, an estimate is
    ``diag(PA) + w * (I - P)Aw``; the mean over probes is XDiag.

    Args:
        products: The map A.
        target: When to stop; ``samples`` counts products, two per probe.
        seed: The seed of the probes.
        block: Probes multiplied together.

    Yields:
        Norm of the diagonal, and of its standard errors.

    Returns:
        The diagonal.
    """
    sketch = Sketch(products, seed, signs=True)
    moments = _Moments(products)
    stopped = Stop.CONVERGED
    while products.done + 2 <= max(target.samples, 4) and not sketch.complete:
        wanted = min(block, (max(target.samples, 4) - products.done) // 2)
        wanted = max(1, products.allowed(2 * wanted) // 2)
        reason = products.refusal(2 * wanted)
        if reason is not None:
            stopped = reason
            break
        sketch.grow(wanted)
        moments = _exchanged(products, sketch)
        yield moments.progress()
        if moments.count >= LEAST_SAMPLES and moments.reached(target):
            break
    return moments.result(stopped)


def _exchanged(products: Products, sketch: Sketch) -> _Moments:
    moments = _Moments(products)
    moments.inflation = _SHARED
    # Two probes make two estimates that agree by symmetry.
    moments.needed = 3
    moments.least = sketch.missed
    whole = (sketch.q * sketch.z).sum(0)
    s = sketch.leave_one_out()
    # (I - ss')Q'y for y = QR's i-th column; s is orthogonal to all other columns of R.
    inner = (sketch.r - s * (s * sketch.r).sum(0)).to(whole)
    products.space.witness(s)
    turned = s.to(whole)
    for i in range(sketch.count):
        lost = (turned[:, i] @ sketch.q) * (turned[:, i] @ sketch.z)
        rest = sketch.y[i] - inner[:, i] @ sketch.q
        moments.add(whole - lost + sketch.w[i] * rest)
    if sketch.complete:
        moments.exact(whole, _rounding(products, sketch))
    return moments


def _rounding(products: Products, sketch: Sketch) -> Tensor:
    """Bound what rounding may do to the elements of ``diag(QQ'A)``: [P]."""
    return products.rounding * (
        sketch.q.abs() * products.space.norms(sketch.z).to(sketch.q)[:, None]
    ).sum(0)


class _Moments:
    """Mean and variance of vectors, one at a time (Welford, Technometrics 4, 1962)."""

    def __init__(self, products: Products) -> None:
        self._products = products
        self._norms = products.space.norms
        self._mean = products.space.empty().zero_()
        self._square = products.space.empty().zero_()
        self._exact_error: Tensor | None = None
        self.count = 0
        self.needed = 2
        """Samples below which their spread says nothing."""
        self.least: Tensor | None = None
        """[own] Errors are no smaller: what samples miss that agree by coincidence."""
        self.inflation = 1.0
        """What standard errors are multiplied by, for samples that are correlated."""

    def add(self, sample: Tensor) -> None:
        self.count += 1
        difference = sample - self._mean
        self._mean += difference / self.count
        self._square += difference * (sample - self._mean)

    def exact(self, values: Tensor, error: Tensor) -> None:
        self._mean, self._exact_error = values, error

    def errors(self) -> Tensor:
        if self._exact_error is not None:
            return self._exact_error
        if self.count < self.needed:
            return torch.full_like(self._mean, math.inf)
        variance = self._square / (self.count * (self.count - 1))
        found = self.inflation * variance.clamp_min(0).sqrt()
        return found if self.least is None else torch.maximum(found, self.least.abs())

    def reached(self, target: Target) -> bool:
        error = float(self._norms(self.errors()))
        return error <= max(
            target.absolute, target.relative * float(self._norms(self._mean))
        )

    def progress(self) -> Progress:
        return Progress(
            iteration=self.count,
            products=self._products.done,
            estimates=(float(self._norms(self._mean)),),
            residuals=(float(self._norms(self.errors())),),
        )

    def result(self, stopped: Stop) -> DiagonalResult:
        nothing = not self.count and self._exact_error is None
        return DiagonalResult(
            values=self._mean.fill_(math.nan) if nothing else self._mean,
            standard_errors=self.errors(),
            samples=self.count,
            products=self._products.done,
            stopped=stopped,
        )


def _begin(
    products: Products, options: DiagonalOptions, room: Room
) -> Query[DiagonalResult]:
    return products.begin(
        diagonal,
        estimator=Estimator(options.estimator),
        target=Target.of(options, options.samples),
        seed=options.seed,
        block=room.block,
    )


def _vectors(options: DiagonalOptions, room: Room) -> int:
    estimator = Estimator(options.estimator)
    if estimator is Estimator.HUTCHPP:
        msg = "hutch++ estimates traces only; use hutchinson or exchangeable (XDiag)"
        raise InvalidSpec(msg, estimator=estimator)
    return vectors_of(estimator, options.samples, room.block)


DEFINITION = Definition(
    options=DiagonalOptions,
    vectors=_vectors,
    begin=_begin,
    tensors=lambda result: {
        "diagonal": result.values,
        "standard_errors": result.standard_errors,
    },
)
