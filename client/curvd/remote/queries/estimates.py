"""Numbers and diagonals from random probes: the queries and their results."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from curvd._calls import Answer, Queries, QueryCall
from curvd.contract import (
    DiagonalOptions,
    FrobeniusNormOptions,
    LogDetOptions,
    QueryProgress,
    Stop,
    TraceOptions,
)
from curvd.remote.asking import asks
from curvd.remote.queries.base import (
    NOTHING,
    Floats,
    Result,
    drawn_on,
    ranks_only,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DiagonalEstimate", "Estimate", "EstimateQueries", "LogDeterminant"]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Estimate(Result):
    """A number with its uncertainty.

    Examples:
        >>> found = session.ggn().trace(samples=12, seed=1)
        >>> float(found) == found.value
        True
        >>> low, high = found.interval
        >>> bool(np.isclose(high - low, 2 * found.half_width))
        True
    """

    value: float
    standard_error: float
    half_width: float
    """Half of the 95 % confidence interval."""
    samples: int
    history: tuple[QueryProgress, ...] = ()
    """What was known on the way, at most every 50 ms; empty for a quick query."""

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval."""
        return self.value - self.half_width, self.value + self.half_width

    def __float__(self) -> float:
        return self.value

    def lines(self) -> Iterator[str]:
        """Say the value with its interval."""
        low, high = self.interval
        if math.isnan(self.value) and not self.samples:
            yield NOTHING
            return
        yield f"{self.value:.6e}   95 % interval [{low:.6e}, {high:.6e}]"

    def brief(self) -> str:
        """Say the value with half of its interval."""
        if math.isnan(self.value):
            return next(iter(self.lines()))
        return f"{self.value:.6g} ± {self.half_width:.2g} (95 %)"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the estimate as its samples came in, and what it is in the end.

        Args:
            axes: Where to; None makes a figure.

        Returns:
            The axes.
        """
        axes = drawn_on(axes)
        known = [p for p in self.history if p.estimates and p.residuals]
        if known:
            axes.errorbar(
                [p.products for p in known],
                [p.estimates[0] for p in known],
                yerr=[p.residuals[0] for p in known],
                fmt=".",
                color="0.5",
                capsize=2,
                label="on the way, ± its standard error",
            )
        axes.errorbar(
            [self.products],
            [self.value],
            yerr=[self.half_width],
            fmt="o",
            capsize=6,
            label=f"{self.value:.6g}, 95 % interval",
        )
        axes.set(
            xlabel="products",
            ylabel="estimate",
            title=f"{self.samples} samples, version {self.version}",
        )
        ranks_only(axes)
        axes.legend()
        return axes


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class LogDeterminant(Estimate):
    """A logarithm of a determinant; NaN where the operator is not positive definite.

    Where it stagnated, the steps do not tell the operator from a singular one, of which it
    is -inf; the interval is that of an operator whose eigenvalues are above rounding.
    """

    smallest: float
    """Smallest Ritz value met, damping included."""

    def lines(self) -> Iterator[str]:
        """Say the value with its interval, and why there is none."""
        if self.info.stopped is Stop.NEGATIVE_CURVATURE:
            yield f"not positive definite: a Ritz value is {self.smallest:.6e}"
        yield from Estimate.lines(self)
        if self.info.stopped is Stop.STAGNATED:
            yield (
                "possibly singular, which would be -inf: the steps do not keep eigenvalues "
                "from zero; pass damping=, or more steps="
            )

    def brief(self) -> str:
        """Say the value, or why there is none."""
        if self.info.stopped is Stop.NEGATIVE_CURVATURE:
            return f"nan, as a Ritz value is {self.smallest:.6g}"
        if self.info.stopped is Stop.STAGNATED:
            return f"{Estimate.brief(self)}, or -inf: possibly singular"
        return Estimate.brief(self)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class DiagonalEstimate(Result):
    """A diagonal, element by element with its uncertainty."""

    values: Floats
    """[P]; NaN if products or time ran out before anything was computed."""
    standard_errors: Floats
    """[P]."""
    samples: int
    quantile: float
    """Standard errors that the 95 % interval of an element reaches to either side."""

    @property
    def half_widths(self) -> Floats:
        """[P] Half of each element's 95 % interval."""
        return self.quantile * self.standard_errors

    def lines(self) -> Iterator[str]:
        """Say where the elements lie."""
        if np.isnan(self.values).all():
            yield NOTHING
            return
        low, high = self.values.min(), self.values.max()
        error = self.half_widths.max()
        yield f"elements from {low:.6e} to {high:.6e}, each within {error:.1e}"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw a histogram of the elements.

        Args:
            axes: Where to; None makes a figure.

        Returns:
            The axes.
        """
        axes = drawn_on(axes)
        bins = min(100, max(10, len(self.values) // 20))
        known = self.values[np.isfinite(self.values)]
        axes.hist(known, bins=bins, label="elements")
        error = float(self.half_widths.max())
        axes.set(
            xlabel=f"diagonal element, each ± {error:.1g} or less",
            ylabel="count",
            yscale="log" if len(known) else "linear",
            title=f"diagonal, {len(self.values)} elements, version {self.version}",
        )
        axes.legend()
        return axes


class EstimateQueries:
    """Queries for what random probes tell."""

    _queries: Queries

    @asks(TraceOptions)
    def trace(self, options: TraceOptions) -> QueryCall[Estimate]:
        """Estimate the trace.

        Returns:
            The trace with its error.

        Examples:
            >>> found = session.ggn().trace(samples=43)
            >>> exact = np.trace(session.ggn() @ np.eye(43))
            >>> low, high = found.interval
            >>> bool(low - 1e-9 <= exact <= high + 1e-9)
            True
        """
        return self._queries.call("Trace", options, _estimate)

    @asks(DiagonalOptions)
    def diagonal(self, options: DiagonalOptions) -> QueryCall[DiagonalEstimate]:
        """Estimate the diagonal.

        Returns:
            The diagonal [P] with its errors.

        Examples:
            >>> found = session.ggn().diagonal(samples=20)
            >>> found.values.shape, found.half_widths.shape, found.products
            ((43,), (43,), 20)
        """

        def read(answer: Answer) -> DiagonalEstimate:
            return answer.result(DiagonalEstimate, values=answer.arrays["diagonal"])

        nbytes = 2 * self._queries.column_bytes
        return self._queries.call("Diagonal", options, read, max_bytes=nbytes)

    @asks(FrobeniusNormOptions)
    def frobenius_norm(self, options: FrobeniusNormOptions) -> QueryCall[Estimate]:
        """Estimate the Frobenius norm.

        Returns:
            The norm with its error.

        Examples:
            >>> found = session.hessian().frobenius_norm(relative_error=0.05, samples=400)
            >>> found.standard_error <= 0.05 * found.value, found.converged
            (True, True)
        """
        return self._queries.call("FrobeniusNorm", options, _estimate)

    norm = frobenius_norm
    """As torch calls it."""

    @asks(LogDetOptions)
    def logdet(self, options: LogDetOptions) -> QueryCall[LogDeterminant]:
        """Estimate ``log det(A + damping * I)``.

        Returns:
            The number with its error; NaN, with the Ritz value that proves it, if the
            operator is not positive definite.

        Examples:
            >>> found = session.ggn().logdet(damping=1.0, probes=20, steps=20)
            >>> exact = np.linalg.slogdet(session.ggn(damping=1.0) @ np.eye(43)).logabsdet
            >>> bool(abs(found.value - exact) <= found.half_width)
            True
            >>> session.hessian().logdet().value, session.hessian().logdet().smallest < 0
            (nan, True)
        """
        return self._queries.call(
            "LogDet", options, lambda answer: answer.result(LogDeterminant)
        )


def _estimate(answer: Answer) -> Estimate:
    return answer.result(Estimate)
