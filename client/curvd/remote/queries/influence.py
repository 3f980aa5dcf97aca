"""What data points have to do with the losses of others: the query and its result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from curvd._calls import Answer, Queries, QueryCall
from curvd.contract import InfluenceOptions, SessionInfo, Stop, StoredVector
from curvd.errors import InvalidSpec, InvalidVector
from curvd.remote.asking import asks_about
from curvd.remote.queries.base import NOTHING, Floats, Result, drawn_on
from curvd.tensors import not_dense, to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Influence", "InfluenceQueries"]

_SHOWN = 3
"""Queries, and data points of either end, that are named on a terminal."""
_MOST_BYTES = 1 << 40
"""Of scores for queries that are known by name alone."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Influence(Result):
    """Scores ``g_q^T (A + damping * I)^-1 g_n`` of queries q and data points n.

    To first order, a weight of 1 + e of data point n moves the loss of query q by
    ``-e * score / normaliser``: the largest scores are those of the most helpful points.
    """

    scores: Floats | None
    """[M, N], or sums over groups [M, G]; None if `top` or `self_only` was asked for."""
    indices: NDArray[np.int64] | None
    """[M, 2, k] With `top`: the data points with the largest scores, and the smallest."""
    top_scores: Floats | None
    """[M, 2, k] Their scores."""
    self_influence: Floats
    """[M] ``g_q^T (A + damping * I)^-1 g_q``; NaN of one not begun."""
    residuals: Floats
    """[M] Norms of what the systems miss, in the units of gradients, from products, true
    to a percent; NaN of one not begun."""
    relative_residuals: Floats
    """[M] The same relative to the norms of the queries' gradients: these are what
    `tolerance` bounds."""
    column_stops: tuple[Stop, ...]
    """[M] Why each query's solution ended."""
    normaliser: float
    """What the objective divides by."""
    data_points: int
    """How many the operator was made of."""

    def ends(self, query: int = 0, k: int = 10) -> tuple[NDArray[Any], NDArray[Any]]:
        """Name the data points with the largest and the smallest scores.

        Args:
            query: Index of the query.
            k: How many of either, at most.

        Returns:
            Indices of the most helpful, and of the most harmful, the extreme ones first; -1
            of a query that was not begun.

        Raises:
            InvalidSpec: If there is no such query, or no scores were fetched.
        """
        count = len(self.residuals)
        if not -count <= query < count:
            msg = f"query must be an index of the {count} queries, from 0, got {query}"
            raise InvalidSpec(msg, query=query)
        if self.indices is not None:
            return self.indices[query, 0, :k], self.indices[query, 1, :k]
        if self.scores is None:
            msg = "no scores were fetched: ask without self_only"
            raise InvalidSpec(msg, self_only=True)
        if np.isnan(self.scores[query]).all():
            none = np.full(min(k, self.scores.shape[1]), -1)
            return none, none.copy()
        order = np.argsort(-self.scores[query], kind="stable")
        return order[:k], order[::-1][:k]

    def lines(self) -> Iterator[str]:
        """Say which data points have the most to do with the first queries."""
        begun = np.flatnonzero(~np.isnan(self.relative_residuals))
        if not len(begun):
            yield NOTHING
            return
        count, worst = len(self.residuals), np.nanmax(self.relative_residuals)
        yield f"{count} queries, relative residual at most {worst:.1e}"
        if len(begun) < count:
            yield f"{count - len(begun)} of them not begun: their scores are NaN"
        if self.scores is None and self.indices is None:
            order = np.argsort(-self.self_influence, kind="stable")  # NaN at its end
            for query in order[: min(_SHOWN, len(begun))]:
                yield f"query {query}: {self.self_influence[query]:.3e} on itself"
            return
        for query in begun[:_SHOWN]:
            good, bad = (", ".join(map(str, end)) for end in self.ends(query, _SHOWN))
            yield f"query {query}: most helpful {good}; most harmful {bad}"

    def plot(self, axes: Axes | None = None, *, query: int = 0, k: int = 10) -> Axes:
        """Draw the scores of the data points that matter most to a query.

        Args:
            axes: Where to; None makes a figure.
            query: Index of the query.
            k: Data points of either end, at most.

        Returns:
            The axes.
        """
        axes = drawn_on(axes)
        if self.scores is None and self.indices is None:
            axes.bar(
                range(len(self.self_influence)), self.self_influence, label="on itself"
            )
            axes.set(xlabel="query", ylabel="self-influence")
        else:
            # From the top: the most helpful first, the most harmful last.
            (good, highs), (bad, lows) = (self._end(query, side, k) for side in (0, 1))
            axes.barh(range(len(good)), highs, label="most helpful")
            places = range(len(good), len(good) + len(bad))
            axes.barh(places, lows[::-1], label="most harmful")
            axes.set_yticks(range(places.stop), [*map(str, [*good, *bad[::-1]])])
            axes.invert_yaxis()
            axes.set(xlabel="score", ylabel="data point")
        axes.set(title=f"influence on query {query}, version {self.version}")
        axes.legend()
        return axes

    def _end(self, query: int, side: int, k: int) -> tuple[Any, Any]:
        found = self.ends(query, k)[side]
        if self.top_scores is not None:
            return found, self.top_scores[query, side, :k]
        assert self.scores is not None
        return found, np.where(found < 0, np.nan, self.scores[query][found])


class InfluenceQueries:
    """The query for influence."""

    _queries: Queries

    @asks_about(InfluenceOptions)
    def influence(  # noqa: D417 - options say themselves what they are
        self, queries: Any, options: InfluenceOptions
    ) -> QueryCall[Influence]:
        """Compute what each data point has to do with the losses of queries.

        The gradients of queries and of data points stay on the server, and so do the
        solutions of the systems: only the scores travel, as queries are solved.

        Args:
            queries: Data points, by name as in the dataset or a tuple of inputs and
                targets, ``(x, y)``, ``(a, b, y)`` or ``((a, b), y)``; or indices of the
                session's own; or None, all of these; or all of a session with the same
                parameters (`Session.on`); or gradients that the session stores, [P] or
                [P, M], or their name.

        Returns:
            The scores, and how true the solutions are.

        Examples:
            >>> found = session.influence([0, 1, 2], damping=0.1)
            >>> found.scores.shape
            (3, 60)
            >>> helpful, harmful = found.ends(query=0, k=5)
            >>> bool(np.allclose(found.scores[[0, 1, 2], [0, 1, 2]], found.self_influence))
            True
            >>> x, y = np.ones((2, 4)), np.array([0, 2])
            >>> session.influence((x, y), damping=0.1, top=5).indices.shape
            (2, 2, 5)
        """
        fields, arrays, count = _asked(queries, self._queries.session.data_points)
        if options.groups is not None:
            arrays["groups"] = _whole_numbers(options.groups, "groups")

        def read(answer: Answer) -> Influence:
            found = {name: answer.arrays.get(name) for name in _TENSORS}
            return answer.result(Influence, **found)

        data_points = self._queries.session.data_points
        width = 24 * min(options.top, data_points) if options.top else 4 * data_points
        return self._queries.call(
            "Influence",
            options,
            read,
            arrays=arrays,
            max_bytes=_MOST_BYTES if count is None else max(1, count) * width,
            **fields,
        )


_TENSORS = ("scores", "indices", "top_scores")


def _asked(
    queries: Any, data_points: int
) -> tuple[dict[str, Any], dict[str, NDArray[Any]], int | None]:
    """Say what queries are.

    Returns:
        Fields of the request, tensors that travel, and how many queries there are, if that
        is known.
    """
    if queries is None:
        return {"all_rows": True}, {}, data_points
    other = getattr(queries, "info", None)
    if isinstance(other, SessionInfo):
        return {"other_session_id": other.id}, {}, other.data_points
    if isinstance(queries, str | StoredVector):
        name = queries if isinstance(queries, str) else queries.name
        return {"stored": name}, {}, None
    if isinstance(queries, Mapping):
        arrays = {str(name): array_of(value, name) for name, value in queries.items()}
        return {}, arrays, length_of(arrays)
    if isinstance(queries, tuple):
        queries = _flat(queries)
        arrays = {str(i): array_of(value, i) for i, value in enumerate(queries)}
        return {}, arrays, length_of(arrays)
    given = to_numpy(queries)
    if given is not None and (given.ndim > 1 or given.dtype.kind in "fc"):
        msg = (
            f"queries that are data points have targets, too, got {given.dtype} "
            f"{list(given.shape)} alone: pass (inputs, targets), or indices of the "
            "session's own"
        )
        raise InvalidVector(msg, shape=given.shape)
    rows = _whole_numbers(queries, "queries")
    return {"rows": rows.tolist()}, {}, len(rows)


def _flat(queries: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lay several inputs before their targets, as the dataset has them."""
    first, *rest = queries
    if len(rest) == 1 and isinstance(first, tuple):
        return (*first, *rest)
    if len(rest) == 1 and isinstance(first, Mapping):
        names = ", ".join(map(repr, [*first][:8]))
        msg = (
            f"data points by name have the targets by name, too; got a pair of a mapping "
            f"({names}) and targets: pass one mapping, with the name that the dataset has "
            "for its targets, or (a, b, targets)"
        )
        raise InvalidVector(msg, given=names)
    return queries


def array_of(value: Any, name: Any) -> NDArray[Any]:
    """See data points as an array.

    Args:
        value: An array or tensor.
        name: Its name or position, for the message.

    Returns:
        Its values.

    Raises:
        InvalidVector: If it is neither.
    """
    if remedy := not_dense(value):
        msg = f"{name!r} of the data points is {remedy}"
        raise InvalidVector(msg, type=type(value).__name__)
    found = to_numpy(value)
    if found is None:
        msg = (
            f"{name!r} of the data points is a {type(value).__name__}, not an array: pass "
            "a NumPy array or torch tensor [n, ...]"
        )
        raise InvalidVector(msg, type=type(value).__name__)
    return np.ascontiguousarray(found)


def length_of(arrays: Mapping[str, NDArray[Any]]) -> int:
    """Count data points.

    Args:
        arrays: Tensors by name, [n, ...].

    Returns:
        n.

    Raises:
        InvalidVector: If they differ in it, or it is 0.
    """
    lengths = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(lengths) != 1 or 0 in lengths:
        msg = f"data points need tensors of one common length above 0, got {sorted(lengths)}"
        raise InvalidVector(msg, lengths=sorted(lengths))
    return lengths.pop()


def _whole_numbers(value: Any, what: str) -> NDArray[np.int64]:
    found = to_numpy(value)
    if found is None and isinstance(value, Sequence | range):
        found = np.asarray(value)
    if (
        found is None
        or found.ndim != 1
        or found.dtype.kind not in "iu"
        or not len(found)
    ):
        msg = (
            f"{what} by index are whole numbers, at least one, in a list or an array [n]; "
            f"got {value!r:.80}"
        )
        raise InvalidVector(msg, what=what)
    return np.ascontiguousarray(found, np.int64)
