"""The density of eigenvalues: the query and its result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from curvd._calls import Answer, Queries, QueryCall
from curvd.contract import SpectralDensityOptions
from curvd.remote.asking import asks
from curvd.remote.queries.base import NOTHING, Floats, Result, drawn_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Density", "DensityQueries"]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
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
        if not self.nodes.size:
            yield NOTHING
            return
        low, high = np.nanmin(self.nodes), np.nanmax(self.nodes)
        yield f"Ritz values from {low:.6e} to {high:.6e}"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the density with its 95 % band.

        Args:
            axes: Where to; None makes a figure.

        Returns:
            The axes.
        """
        axes = drawn_on(axes)
        # What the tails of the smoothing leave is noise: hide it on the log axis.
        floor = 1e-6 * float(np.max(self.density, initial=1e-300))
        seen = np.where(self.density > floor, self.density, np.nan)
        probes, steps = self.nodes.shape
        axes.plot(self.grid, seen, linewidth=1.2, label=f"mean of {probes} probes")
        if np.isfinite(self.half_width).all():
            low = np.maximum(self.density - self.half_width, floor)
            high = np.where(seen > floor, self.density + self.half_width, np.nan)
            axes.fill_between(
                self.grid, low, high, alpha=0.25, linewidth=0, label="95 % interval"
            )
        title = f"density of eigenvalues, {steps} steps a probe, version {self.version}"
        axes.set(yscale="log", title=title)
        if self.logarithmic:
            axes.set(xscale="log", xlabel="magnitude of eigenvalue")
            axes.set(ylabel="density per decade")
        else:
            axes.set(xlabel="eigenvalue", ylabel="density")
        axes.legend()
        return axes


class DensityQueries:
    """The query for the density of eigenvalues."""

    _queries: Queries

    @asks(SpectralDensityOptions)
    def spectral_density(self, options: SpectralDensityOptions) -> QueryCall[Density]:
        """Estimate the density of eigenvalues.

        Returns:
            The density with its error.

        Examples:
            >>> found = session.hessian().spectral_density(probes=4, steps=20, points=200)
            >>> found.grid.shape, found.density.shape
            ((200,), (200,))
            >>> step = found.grid[1] - found.grid[0]
            >>> round(float(found.density.sum() * step), 2)
            1.0
        """

        def read(answer: Answer) -> Density:
            return answer.result(Density, logarithmic=options.logarithmic)

        nbytes = 8 * (4 * options.points + 2 * options.probes * options.steps)
        return self._queries.call("SpectralDensity", options, read, max_bytes=nbytes)
