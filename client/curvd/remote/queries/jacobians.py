"""Products with Jacobians of data points: the query and its result."""

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
    Stop,
    StoredVector,
    check_patterns,
    select,
)
from curvd.errors import InvalidVector
from curvd.remote.asking import asks_about
from curvd.remote.queries.base import Result, check_name, drawn_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["JacobianProduct", "JacobianQueries"]

_MOST_BYTES = 1 << 40
"""Of a product with outputs, whose number only the server knows."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class JacobianProduct(Result):
    """A product with the Jacobian of losses or outputs, or with its transpose."""

    result: Any
    """[N C] or [N C, K], of the first data points' rows alone if the query was stopped;
    transposed [P] or [P, K], a sum over all data points, NaN if it was stopped; None if it
    stays in the session."""
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

    @property
    def _is_cut(self) -> bool:
        """Whether it is a sum that products or time ran out for."""
        if self.result is None or self.info.stopped is Stop.CONVERGED:
            return False
        first = self.result.reshape(-1)[:1]
        return bool((first != first).any())

    def lines(self) -> Iterator[str]:
        """Say what shape it has, and how it was made."""
        held = self.stored if self.result is None else self.result
        assert held is not None
        yield f"{list(held.shape)} by {self.plan}"
        if self._is_cut:
            yield (
                "NaN, a sum over all data points, which was cut short: raise max_products "
                "or time_limit_s"
            )

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw a histogram of the values of the first column.

        Args:
            axes: Where to; None makes a figure.

        Returns:
            The axes.
        """
        axes = drawn_on(axes)
        values = np.asarray(self.result).reshape(len(self.result), -1)[:, 0]
        axes.hist(values[np.isfinite(values)], bins=50, label="values")
        axes.set(
            xlabel="value",
            ylabel="count",
            title=f"product with a Jacobian, version {self.version}",
        )
        axes.legend()
        return axes


class JacobianQueries:
    """The query for products with Jacobians."""

    _info: SessionInfo

    @property
    def _queries(self) -> Queries:
        return Queries(self._info)

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
        check_name(options.store)
        layout, names = jacobian_layout(self._info.layout, options.params)
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


def jacobian_layout(
    layout: ParameterLayout, params: Any
) -> tuple[ParameterLayout, tuple[str, ...]]:
    """Find the parameters that a Jacobian is in, and their names if they are not all.

    Args:
        layout: Of all.
        params: Globs, in order; None: all.

    Returns:
        Their layout, and the names; none of all.
    """
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
