"""What a session's data points are like, one by one: the queries and their results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from curvd._calls import Answer, Queries, QueryCall
from curvd.contract import (
    JacobianOf,
    JacobianProductOptions,
    ParameterLayout,
    SessionInfo,
    StoredVector,
    check_patterns,
    query_options,
    select,
)
from curvd.errors import InvalidSpec, InvalidVector
from curvd.remote.asking import asks, asks_about
from curvd.remote.queries.base import Floats, Result, drawn_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "DataPointQueries",
    "GradientGram",
    "GradientNorms",
    "GradientSquares",
    "JacobianProduct",
]

_MOST_BYTES = 1 << 40
"""Of a product with outputs, whose number only the server knows."""
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


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class JacobianProduct(Result):
    """A product with the Jacobian of losses or outputs, or with its transpose."""

    result: Any
    """[N C] or [N C, K]; transposed [P] or [P, K]. Of the first data points' rows alone if
    the query was stopped; None if it stays in the session."""
    stored: StoredVector | None
    """The product, if it stays in the session."""
    row_shape: tuple[int, ...]
    """Shape of one data point's outputs, whose product is C; empty for losses."""
    plan: str
    """The way that was the fastest: ``forward``, ``transposed``, ``vectorised``,
    ``reverse`` or ``rows``."""

    @property
    def by_point(self) -> Any:
        """[N, *row_shape] or [N, *row_shape, K]: `result` of what is not transposed."""
        columns = self.result.shape[1:]
        return self.result.reshape(-1, *self.row_shape, *columns)

    def lines(self) -> Iterator[str]:
        """Say what shape it has, and how it was made."""
        held = self.stored if self.result is None else self.result
        assert held is not None
        yield f"{list(held.shape)} by {self.plan}"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw a histogram of the values of the first column.

        Args:
            axes: Where to; None makes a figure.

        Returns:
            The axes.
        """
        axes = drawn_on(axes)
        values = np.asarray(self.result).reshape(len(self.result), -1)[:, 0]
        axes.hist(values, bins=50, label="values")
        axes.set(
            xlabel="value",
            ylabel="count",
            title=f"product with a Jacobian, version {self.version}",
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

    @asks(query_options.GradientGramOptions)
    def gradient_gram(
        self, options: query_options.GradientGramOptions
    ) -> QueryCall[GradientGram]:
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

    @asks(query_options.GradientSquaresOptions)
    def gradient_squares(
        self, options: query_options.GradientSquaresOptions
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

    @asks_about(JacobianProductOptions)
    def jacobian_product(  # noqa: D417 - options say themselves what they are
        self, v: Any, options: JacobianProductOptions
    ) -> QueryCall[JacobianProduct]:
        """Multiply with the Jacobian of the data points' losses, or of the outputs.

        Row n of the losses' Jacobian is the gradient of data point n's own loss, the sum of
        its terms without weight decay. The rows stay on the server.

        Args:
            v: [P] or [P, K], or per parameter, or what the session stores, or its name;
                transposed [N C] or [N C, K].

        Returns:
            The product, in the type of v.

        Examples:
            >>> loss, gradient = session.gradient()
            >>> alike = session.jacobian_product(gradient).result  # of each data point
            >>> alike.shape
            (60,)
            >>> ones = np.ones(session.info.data_points)
            >>> total = session.jacobian_product(ones, transposed=True).result
            >>> np.allclose(total / 60, gradient)
            True
            >>> moved = session.jacobian_product(gradient, of="outputs")
            >>> moved.result.shape, moved.by_point.shape
            ((180,), (60, 3))
        """
        if options.store == "":
            msg = "stored vectors need a name, at least one character"
            raise InvalidSpec(msg, store=options.store)
        layout, names = _jacobian_layout(self._info.layout, options.params)
        queries, fields = self._queries, dict[str, Any]()
        sent = None
        if isinstance(v, str | StoredVector):
            fields["operand"] = v if isinstance(v, str) else v.name
        else:
            length = self._info.data_points
            if options.transposed:
                layout = _rows_layout(v, length, of=JacobianOf(options.of))
            sent = queries.operand(v, layout)
        columns = None if sent is None else sent.columns

        def read(answer: Answer) -> JacobianProduct:
            row_shape = tuple(answer.summary.row_shape)
            if options.store is not None:
                size = self._info.layout.size
                shape = (size,) if columns is None else (columns, size)
                stored = queries.stored(options.store, shape, answer)
                return answer.result(
                    JacobianProduct, result=None, stored=stored, row_shape=row_shape
                )
            found: Any = answer.arrays["result"]
            if sent is not None and len(sent.leaves) == 1:
                found = sent.restore(found)
            elif found.ndim > 1:
                found = np.ascontiguousarray(found.T)
            return answer.result(
                JacobianProduct, result=found, stored=None, row_shape=row_shape
            )

        return queries.call(
            "JacobianProduct",
            options,
            read,
            operands={} if sent is None else {"v": (sent, sent.shape)},
            max_bytes=_MOST_BYTES,
            parameters=names,
            **fields,
        )


def _jacobian_layout(
    layout: ParameterLayout, params: Any
) -> tuple[ParameterLayout, tuple[str, ...]]:
    """Find the parameters that a Jacobian is in, and their names if they are not all."""
    if params is None:
        return layout, ()
    patterns = [params] if isinstance(params, str) else params
    names = select(layout.names, check_patterns(patterns), aliases={})
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    return ParameterLayout.of({name: shapes[name] for name in names}), names


def _rows_layout(v: Any, data_points: int, *, of: JacobianOf) -> ParameterLayout:
    """Say what the rows of a Jacobian are: of outputs the server knows how many."""
    shape = getattr(v, "shape", ())
    count = shape[0] if shape else 0
    right = (
        count == data_points if of is JacobianOf.LOSSES else count % data_points == 0
    )
    if not count or not right:
        many = "" if of is JacobianOf.LOSSES else " times the outputs of each"
        msg = (
            f"v has shape {list(shape)}; a transposed product takes a row for each of the "
            f"{data_points} data points{many}, columns last"
        )
        raise InvalidVector(msg, given=tuple(shape), data_points=data_points)
    return ParameterLayout.of({"rows": (count,)})
