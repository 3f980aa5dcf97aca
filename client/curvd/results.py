"""What queries return: values, how good they are, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from curvd.contract import PlanReport, Stop, StoredVector

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryInfo:
    """Where a result comes from, why the query ended, and what it cost.

    Examples:
        >>> found = session.hessian().trace(samples=10)
        >>> found.products, found.version, found.info.stopped
        (10, 1, <Stop.CONVERGED: 'converged'>)
    """

    version: int
    """Parameter version that the result belongs to."""
    parameters_digest: str
    model_id: str
    dataset_id: str
    plan: PlanReport
    stopped: Stop
    products: int
    """Columns multiplied, exactly."""
    elapsed_s: float
    queue_s: float
    """Seconds that products waited for the device."""
    compute_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What all results have."""

    info: QueryInfo

    @property
    def converged(self) -> bool:
        """Whether the query reached what was asked for."""
        return self.info.stopped is Stop.CONVERGED

    @property
    def products(self) -> int:
        """Columns multiplied."""
        return self.info.products

    @property
    def version(self) -> int:
        """Parameter version that the result belongs to."""
        return self.info.version

    def lines(self) -> Iterator[str]:
        """Say what was found, for people; the command line prints it.

        Yields:
            The lines that `str` puts one below the other, but for what it cost.
        """
        yield from ()

    def __str__(self) -> str:
        i = self.info
        cost = f"{i.stopped}: {i.products} products in {i.elapsed_s:.2f} s at version"
        return "\n".join([*self.lines(), f"{cost} {i.version}"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Eigenpairs(Result):
    """Extremal eigenpairs, largest eigenvalue first."""

    values: Floats
    """[k]."""
    vectors: Floats | None
    """[P, k], orthonormal; None if only values were asked for."""
    stored: StoredVector | None
    """The vectors, if they stay in the session."""
    residuals: Floats
    """[k] ``|Ax - λx|``, of the products that were made."""
    tolerances: Floats
    """[k] What each residual was asked to reach; not below the operator's rounding."""
    asymmetry: float
    """Norm of the antisymmetric part of the projected operator: its rounding."""
    restarts: int
    warm: bool
    """Whether vectors of an earlier query, or stored ones, were the start."""

    def lines(self) -> Iterator[str]:
        """Say each eigenvalue with its residual."""
        for value, residual in zip(self.values, self.residuals, strict=True):
            yield f"{value: .9e}   residual {residual:.1e}"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the eigenvalues with their residuals as error bars.

        Args:
            axes: Where to; None makes a figure.

        Returns:
            The axes.

        Examples:
            >>> axes = session.hessian().eigsh(k=3).plot()
            >>> axes.get_ylabel()
            'eigenvalue'
        """
        axes = axes or _axes()
        rank = np.arange(1, len(self.values) + 1)
        # An interval of this half width around each value contains an eigenvalue.
        axes.errorbar(rank, self.values, yerr=self.residuals, fmt="o", capsize=3)
        axes.axhline(0.0, color="0.7", linewidth=0.8, zorder=0)
        axes.set(xlabel="rank", ylabel="eigenvalue")
        return axes


@dataclass(frozen=True, slots=True, kw_only=True)
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

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval."""
        return self.value - self.half_width, self.value + self.half_width

    def __float__(self) -> float:
        return self.value

    def lines(self) -> Iterator[str]:
        """Say the value with its interval."""
        low, high = self.interval
        yield f"{self.value:.6e}   95 % interval [{low:.6e}, {high:.6e}]"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the value with its 95 % interval.

        Args:
            axes: Where to; None makes a figure.

        Returns:
            The axes.
        """
        axes = axes or _axes()
        axes.errorbar([0], [self.value], yerr=[self.half_width], fmt="o", capsize=6)
        axes.set(xticks=[], ylabel="estimate, 95 % interval")
        return axes


@dataclass(frozen=True, slots=True, kw_only=True)
class LogDeterminant(Estimate):
    """A logarithm of a determinant; NaN where the operator is not positive definite."""

    smallest: float
    """Smallest Ritz value met, damping included."""

    def lines(self) -> Iterator[str]:
        """Say the value with its interval, and why there is none."""
        if math.isnan(self.value):
            yield f"not positive definite: a Ritz value is {self.smallest:.6e}"
        yield from Estimate.lines(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagonalEstimate(Result):
    """A diagonal, element by element with its uncertainty."""

    values: Floats
    """[P]."""
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
        axes = axes or _axes()
        axes.hist(self.values, bins=min(100, max(10, len(self.values) // 20)))
        axes.set(xlabel="diagonal element", ylabel="count", yscale="log")
        return axes


@dataclass(frozen=True, slots=True, kw_only=True)
class Density(Result):
    """A density of eigenvalues, and the quadratures it was made from."""

    grid: Floats
    """[G] Eigenvalues; on a logarithmic grid, their magnitudes."""
    density: Floats
    """[G] Per eigenvalue, or per decade of magnitude; integrates to one."""
    standard_error: Floats
    """[G] Over the probes; infinite for a single one."""
    half_width: Floats
    """[G] Half of the 95 % interval of the smoothed density."""
    nodes: Floats
    """[S, m] Ritz values of each probe; NaN where one needed fewer steps."""
    weights: Floats
    """[S, m] Their weights; they sum to one for each probe."""
    width: float
    """Standard deviation of the smoothing Gaussian, in the axis's units."""
    logarithmic: bool

    def lines(self) -> Iterator[str]:
        """Say where the eigenvalues lie."""
        low, high = np.nanmin(self.nodes), np.nanmax(self.nodes)
        yield f"Ritz values from {low:.6e} to {high:.6e}"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the density with its 95 % band.

        Args:
            axes: Where to; None makes a figure.

        Returns:
            The axes.
        """
        axes = axes or _axes()
        # What the tails of the smoothing leave is noise: hide it on the log axis.
        floor = 1e-6 * float(np.max(self.density, initial=1e-300))
        seen = np.where(self.density > floor, self.density, np.nan)
        axes.plot(self.grid, seen, linewidth=1.2)
        if np.isfinite(self.half_width).all():
            low = np.maximum(self.density - self.half_width, floor)
            high = np.where(seen > floor, self.density + self.half_width, np.nan)
            axes.fill_between(self.grid, low, high, alpha=0.25, linewidth=0)
        axes.set(yscale="log", ylabel="density")
        if self.logarithmic:
            axes.set(xscale="log", xlabel="magnitude of eigenvalue")
        else:
            axes.set(xlabel="eigenvalue")
        return axes


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution(Result):
    """Solutions of ``(A + damping * I) x = b``, column by column."""

    x: Any
    """In the layout and type of b."""
    residuals: Floats
    """[K] ``|b - (A + damping * I) x|``, from products, true to a percent."""
    relative_residuals: Floats
    """[K] The same relative to ``|b|``."""
    curvatures: Floats
    """[K] Smallest Rayleigh quotient of a search direction, damping included."""
    indefinite: tuple[bool, ...]
    """[K] Whether the damped operator was found not to be positive definite."""
    column_stops: tuple[Stop, ...]
    """[K] Why each column ended."""
    iterations: int

    def lines(self) -> Iterator[str]:
        """Say how true each solution is."""
        for column, residual in enumerate(self.relative_residuals):
            stop = self.column_stops[column]
            yield f"column {column}: {stop}, relative residual {residual:.1e}"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the relative residuals of the columns.

        Args:
            axes: Where to; None makes a figure.

        Returns:
            The axes.
        """
        axes = axes or _axes()
        rank = np.arange(len(self.relative_residuals))
        axes.bar(rank, self.relative_residuals)
        axes.set(xlabel="column", ylabel="relative residual", yscale="log")
        return axes


def _axes() -> Axes:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        msg = "plot() needs matplotlib: pip install 'curvd[plot]'"
        raise ModuleNotFoundError(msg, name="matplotlib") from error
    # Not pyplot: it keeps every figure alive and chooses a backend.
    axes: Axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    return axes
