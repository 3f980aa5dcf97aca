"""What a session's data points are like, one by one: the queries and their results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from curvd._calls import Answer, QueryCall
from curvd.contract.query_options.data_points import (
    GradientGramOptions,
    GradientNormsOptions,
    GradientSquaresOptions,
)
from curvd.remote.asking import asks
from curvd.remote.queries.base import Floats, Result, drawn_on
from curvd.remote.queries.jacobians import JacobianQueries

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "DataPointQueries",
    "GradientGram",
    "GradientNorms",
    "GradientSquares",
]

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


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class GradientGram(Result):
    """Inner products of the gradients of each two data points' own losses."""

    gram: Floats
    """[N, N], in the data's order; of the first ones alone if the query was stopped."""

    @property
    def cosines(self) -> Floats:
        """[N, N] Cosines between the gradients; 0 where one is zero."""
        norms = np.sqrt(np.diag(self.gram))
        sizes = norms[:, None] * norms
        found: Floats = np.zeros_like(sizes)
        np.divide(self.gram, sizes, out=found, where=sizes > 0)
        return found

    def lines(self) -> Iterator[str]:
        """Say how the gradients lie to each other."""
        count = len(self.gram)
        apart = self.cosines[~np.eye(count, dtype=bool)]
        middle = f"{np.median(apart):.3f}" if apart.size else "none"
        yield f"{count} gradients, median cosine of two {middle}"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw a histogram of the cosines between gradients.

        Args:
            axes: Where to; None makes a figure.

        Returns:
            The axes.
        """
        axes = drawn_on(axes)
        count = len(self.gram)
        axes.hist(
            self.cosines[np.triu_indices(count, 1)],
            bins=50,
            label="pairs of data points",
        )
        axes.set(
            xlabel="cosine between two gradients",
            ylabel="count",
            title=f"gradients of {count} data points, version {self.version}",
        )
        axes.legend()
        return axes


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class GradientSquares(Result):
    """Sums over the data points of the squared elements of their losses' gradients."""

    squares: Floats
    """[P]"""
    data_points: int
    """How many were summed over."""
    normaliser: float
    """What the objective divides by: `squares` over it is the diagonal of the empirical
    Fisher."""

    def lines(self) -> Iterator[str]:
        """Say how large the squares are."""
        low, high = self.squares.min(), self.squares.max()
        yield f"{len(self.squares)} sums of {self.data_points}: {low:.6e} to {high:.6e}"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the sums, sorted.

        Args:
            axes: Where to; None makes a figure.

        Returns:
            The axes.
        """
        axes = drawn_on(axes)
        axes.plot(np.sort(self.squares)[::-1], label="sum of squares")
        axes.set(
            xlabel="parameter, by rank",
            ylabel="sum of squared gradients",
            yscale="symlog",
            title=f"squares of {self.data_points} gradients, version {self.version}",
        )
        axes.legend()
        return axes


class DataPointQueries(JacobianQueries):
    """Queries about data points; a base of `curvd.Session`."""

    @asks(GradientNormsOptions)
    def gradient_norms(self, options: GradientNormsOptions) -> QueryCall[GradientNorms]:
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

    @asks(GradientGramOptions)
    def gradient_gram(self, options: GradientGramOptions) -> QueryCall[GradientGram]:
        """Compute the inner products of the gradients of each two data points' losses.

        They are what gradient descent does to one loss by a step on another, and, with the
        norms, the cosines between gradients. No gradient travels.

        Returns:
            The matrix, data points in order.

        Examples:
            >>> found = session.gradient_gram()
            >>> found.gram.shape
            (60, 60)
            >>> norms = session.gradient_norms().norms
            >>> np.allclose(np.diag(found.gram), norms**2)
            True
            >>> nearest = np.argsort(-found.cosines[0])[1]  # whose gradient is like the first's
        """
        nbytes = 8 * self._info.data_points**2
        return self._queries.call(
            "GradientGram",
            options,
            lambda answer: answer.result(GradientGram),
            max_bytes=nbytes,
        )

    @asks(GradientSquaresOptions)
    def gradient_squares(
        self, options: GradientSquaresOptions
    ) -> QueryCall[GradientSquares]:
        """Sum the squared elements of the gradients of the data points' own losses.

        Divided by the normaliser they are the diagonal of the empirical Fisher, exactly,
        for little more than a gradient.

        Returns:
            The sums, and what the objective divides by.

        Examples:
            >>> found = session.gradient_squares()
            >>> fisher = session.empirical_fisher() @ np.eye(43)
            >>> np.allclose(found.squares / found.normaliser, np.diag(fisher))
            True
        """
        queries = self._queries
        return queries.call(
            "GradientSquares",
            options,
            lambda answer: answer.result(GradientSquares),
            max_bytes=queries.column_bytes,
        )
