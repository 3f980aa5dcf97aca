"""What a session's data points are like, one by one: the queries and their results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from curvd._calls import Answer, Queries, QueryCall
from curvd.contract import SessionInfo, query_options
from curvd.remote.asking import asks
from curvd.remote.queries.base import Floats, Result, drawn_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DataPointQueries", "GradientNorms"]

_SHOWN = 10
"""Data points that are named on a terminal."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class GradientNorms(Result):
    """Norms of the gradients of the data points' own losses, in the data's order."""

    norms: Floats
    """[N]; the first ones alone if the query was stopped."""
    parameter_norms: Floats | None
    """[N, T] of each parameter's part, in the layout's order; None if not asked for."""

    def lines(self) -> Iterator[str]:
        """Say how the norms are spread, and which data points have the largest."""
        low, middle, high = np.quantile(self.norms, [0, 0.5, 1])
        yield f"{len(self.norms)} norms: {low:.6e} to {high:.6e}, median {middle:.6e}"
        for n in np.argsort(-self.norms, kind="stable")[:_SHOWN]:
            yield f"data point {n}: {self.norms[n]:.6e}"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw a histogram of the norms.

        Args:
            axes: Where to; None makes a figure.

        Returns:
            The axes.
        """
        axes = drawn_on(axes)
        bins = min(100, max(10, len(self.norms) // 20))
        axes.hist(self.norms, bins=bins, label="data points")
        axes.axvline(
            float(np.median(self.norms)), color="0.3", linestyle="--", label="median"
        )
        axes.set(
            xlabel="norm of a data point's gradient",
            ylabel="count",
            yscale="log",
            title=f"gradients of {len(self.norms)} data points, version {self.version}",
        )
        axes.legend()
        return axes


class DataPointQueries:
    """Queries about data points; a base of `curvd.Session`."""

    _info: SessionInfo

    @property
    def _queries(self) -> Queries:
        return Queries(self._info)

    @asks(query_options.GradientNormsOptions)
    def gradient_norms(
        self, options: query_options.GradientNormsOptions
    ) -> QueryCall[GradientNorms]:
        """Compute the norm of the gradient of each data point's own loss.

        The loss of data point n is the sum of its terms, as in the empirical Fisher: the
        gradient of a mean is the sum of these gradients, divided by all counted targets,
        and weight decay is no data point's. The norms are exact, and no gradient travels.

        Returns:
            The norms, in the order of the data.

        Examples:
            >>> found = session.gradient_norms(by_parameter=True)
            >>> found.norms.shape, found.parameter_norms.shape
            ((60,), (60, 4))
            >>> fisher = session.empirical_fisher() @ np.eye(43)
            >>> bool(np.isclose((found.norms**2).mean(), np.trace(fisher)))
            True
            >>> hardest = np.argsort(-found.norms)[:3]  # of the data points, by index
        """

        def read(answer: Answer) -> GradientNorms:
            parts = answer.arrays.get("parameter_norms")
            return answer.result(GradientNorms, parameter_norms=parts)

        numbers = 1 + len(self._info.layout.parameters) * options.by_parameter
        nbytes = 8 * self._info.data_points * numbers
        return self._queries.call("GradientNorms", options, read, max_bytes=nbytes)
