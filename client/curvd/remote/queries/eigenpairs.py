"""Extremal eigenpairs: the query and its result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from curvd._calls import OWN_TYPE, Answer, Queries, QueryCall
from curvd.contract import EigshOptions, StoredVector
from curvd.errors import InvalidSpec
from curvd.remote.asking import asks
from curvd.remote.queries.base import Floats, Result, drawn_on, ranks_only
from curvd.tensors import vector_dtype

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EigenpairQueries", "Eigenpairs"]

_SHOWN = 3
"""Eigenvalues in a line."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
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

    def brief(self) -> str:
        """Say the first eigenvalues with their residuals."""
        pairs = zip(self.values[:_SHOWN], self.residuals[:_SHOWN], strict=True)
        said = ", ".join(f"{value:.6g} ± {error:.1g}" for value, error in pairs)
        more = len(self.values) - _SHOWN
        return said + (f", … {more} more" if more > 0 else "")

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
        axes = drawn_on(axes)
        rank = np.arange(1, len(self.values) + 1)
        # An interval of this half width around each value contains an eigenvalue.
        axes.errorbar(
            rank,
            self.values,
            yerr=self.residuals,
            fmt="o",
            capsize=3,
            label="eigenvalue, ± its residual",
        )
        axes.axhline(0.0, color="0.7", linewidth=0.8, zorder=0)
        axes.set(
            xlabel="rank",
            ylabel="eigenvalue",
            title=f"{len(rank)} eigenvalues, version {self.version}",
        )
        ranks_only(axes)
        axes.legend()
        return axes


class EigenpairQueries:
    """Queries for eigenvalues and eigenvectors."""

    _queries: Queries

    @asks(EigshOptions)
    def eigsh(self, options: EigshOptions) -> QueryCall[Eigenpairs]:
        """Compute extremal eigenpairs, each eigenvalue as often as it is repeated.

        A result has `converged` if the residuals have, and if a search in the complement
        of the pairs has shown that no copy of a wanted eigenvalue is missing; it
        overlooks one with a probability below 1e-4.

        Returns:
            The pairs, largest eigenvalue first; the best so far if it was stopped.

        Examples:
            >>> found = session.hessian().eigsh(k=3, tolerance=1e-6)
            >>> found.values.round(4)
            array([1.3995, 0.6971, 0.4593])
            >>> found.converged, found.vectors.shape
            (True, (43, 3))
            >>> bool(np.all(found.residuals <= found.tolerances))
            True
        """
        if options.store == "":
            msg = "stored vectors need a name, at least one character"
            raise InvalidSpec(msg, store=options.store)
        fetch = options.vectors and options.store is None

        def read(answer: Answer) -> Eigenpairs:
            return answer.result(
                Eigenpairs,
                vectors=answer.arrays["vectors"].T if fetch else None,
                stored=_stored(options.store, self._queries, answer),
            )

        nbytes = options.k * self._queries.column_bytes
        return self._queries.call(
            "Eigsh", options, read, max_bytes=nbytes, values_only=not fetch
        )


def _stored(name: str | None, queries: Queries, answer: Answer) -> StoredVector | None:
    if name is None:
        return None
    layout, dtype = queries.session.layout, vector_dtype(queries.session.dtype)
    return StoredVector(
        name=name,
        shape=(len(answer.summary.values), layout.size),
        dtype=OWN_TYPE[dtype],
        version=answer.header.version,
        values=queries.without_scale(answer.summary.values),
    )
