"""Means of independent samples, one block of probes at a time, until they are good."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from curvd.contract import Distribution, Estimator, Stop
from curvd_server.linalg.base import Products, Progress, Query
from curvd_server.linalg.intervals import Mean, few, mean_of

LEAST_SAMPLES = 10
"""Below this many samples a standard error is too rough to stop on."""


class Accuracy(Protocol):
    """Options that say when an estimate is good enough."""

    @property
    def relative_error(self) -> float:
        """Standard error relative to the estimate's magnitude; 0: never."""

    @property
    def absolute_error(self) -> float:
        """Standard error; 0: never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """When an estimate is good enough."""

    relative: float = 0.0
    """Standard error relative to the estimate's magnitude."""
    absolute: float = 0.0
    """Standard error."""
    samples: int = 100
    """Samples after which to stop in any case."""

    @classmethod
    def of(cls, options: Accuracy, samples: int) -> Target:
        """Read a target off a query's options.

        Args:
            options: The options of a query that estimates.
            samples: What it may take, products or probes.

        Returns:
            The target.
        """
        return cls(
            relative=options.relative_error,
            absolute=options.absolute_error,
            samples=samples,
        )

    def reached(self, mean: Mean) -> bool:
        """Say whether the standard error is small enough."""
        return mean.standard_error <= max(
            self.absolute, self.relative * abs(mean.value)
        )


def vectors_of(estimator: Estimator, samples: int, block: int) -> int:
    """Count the vectors that an estimator holds.

    Args:
        estimator: The estimator.
        samples: Products at most.
        block: Probes at once.

    Returns:
        How many: two blocks, and for a sketch the probes, their products, an
        orthonormal basis and its products.
    """
    if estimator is Estimator.HUTCHINSON:
        return 2 * block + 2
    return 2 * block + 4 * (samples // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number, how uncertain it is, and what it cost."""

    value: float
    standard_error: float
    half_width: float
    """Half of the 95 % confidence interval."""
    samples: int
    products: int
    stopped: Stop


def sample_mean(
    products: Products,
    sample: Callable[[Tensor, Tensor], list[float]],
    *,
    target: Target,
    seed: int,
    block: int,
    draw: Callable[[range], Tensor] | None = None,
    shift: float = 0.0,
    first: int = 0,
) -> Query[Estimate]:
    """Average a function of probes and their products.

    Args:
        products: The map A.
        sample: Maps W: [k, P] and AW: [k, P] to k samples.
        target: When to stop; with no tolerance, after `target.samples`.
        seed: The seed of the probes.
        block: Probes multiplied together.
        draw: Makes the probes of some indices; None: Rademacher ones.
        shift: Added to the mean.
        first: Index of the first probe.

    Yields:
        The estimate and its standard error.

    Returns:
        The estimate; NaN if not even one product was allowed.
    """
    values: list[float] = []
    stopped = Stop.CONVERGED
    while len(values) < target.samples:
        wanted = min(block, target.samples - len(values))
        reason = products.refusal(wanted)
        if reason is Stop.PRODUCTS and (wanted := products.allowed(wanted)):
            reason = products.refusal(wanted)
        if reason is not None:
            stopped = reason
            break
        indices = range(first + len(values), first + len(values) + wanted)
        if draw is None:
            W = products.space.probes(Distribution.RADEMACHER, seed, indices)
        else:
            W = draw(indices)
        values += sample(W, products(W))
        mean = mean_of(values, products.rounding)
        yield Progress(
            iteration=len(values),
            products=products.done,
            estimates=(mean.value + shift,),
            residuals=(mean.standard_error,),
        )
        shifted = Mean(mean.value + shift, mean.standard_error, mean.half_width)
        if len(values) >= LEAST_SAMPLES and target.reached(shifted):
            break
    mean = (
        mean_of(values, products.rounding)
        if values
        else Mean(math.nan, math.inf, math.inf)
    )
    return Estimate(
        value=mean.value + shift,
        standard_error=mean.standard_error,
        half_width=mean.half_width * few(len(values)),
        samples=len(values),
        products=products.done,
        stopped=stopped,
    )
