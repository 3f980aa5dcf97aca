"""Right-hand sides of any size, and the solutions that belong to them.

A linear system knows no size: ``A x = b`` is ``A (x / u) = b / u``. Iterations do, because
they square what they have: so each column is divided by a power of two, which is exact, and
what is found is multiplied by it.
"""

from __future__ import annotations

from torch import Tensor

from curvd.errors import ScaleOutOfRange
from curvd_server.linalg.scales import multiply_by_powers, units_of
from curvd_server.linalg.space import Space


class RightHandSides:
    """Columns, each with its unit: the power of two just above its largest element.

    Args:
        space: Where they live.
        B: [K, own] The columns, as they came.
    """

    def __init__(self, space: Space, B: Tensor) -> None:
        self._space, self._B = space, B
        peaks = space.peaks(B)
        self.are_zero = peaks == 0
        """[K] Whether all elements are, so that the solution is known."""
        self._units = units_of(peaks, B.dtype)

    def __len__(self) -> int:
        return len(self._B)

    def scaled(self, columns: Tensor | slice = slice(None)) -> Tensor:
        """Copy columns, in their units.

        Args:
            columns: Which of them.

        Returns:
            [k, own], elements of at most one.
        """
        return self._B[columns] / self._units[columns][:, None].to(self._B)

    def guesses(self, X: Tensor, most: float) -> Tensor:
        """Copy first guesses, in the units of the columns.

        Args:
            X: [K, own].
            most: The largest element whose squares can be added.

        Returns:
            [K, own].

        Raises:
            ScaleOutOfRange: If a guess is so large beside its column that nothing of the
                column would be left of the residual.
        """
        scaled = X.to(self._B) / self._units[:, None].to(self._B)
        large = (self._space.peaks(scaled) > most) & ~self.are_zero
        if large.any():
            column = int(large.nonzero()[0])
            peak = float(self._space.peaks(X[column : column + 1]))
            unit = float(self._units[column])
            msg = (
                f"the first guess of column {column} has elements of about {peak:.1e}, its "
                f"right-hand side of about {unit:.1e}: no digit of that would be left in a "
                f"residual of {self._B.dtype}, which takes guesses up to {most:.1e} times "
                "as large; leave x0 out, or give one of the size of the solution"
            )
            raise ScaleOutOfRange(msg, column=column, scale=peak)
        return scaled

    def solutions(self, X: Tensor) -> Tensor:
        """Return solutions to the size of what they belong to, in place.

        Args:
            X: [K, own] In the units of the columns.

        Returns:
            The same.

        Raises:
            ScaleOutOfRange: If they are no numbers of their type.
        """
        multiply_by_powers(
            X,
            self._units,
            self._space.peaks(X),
            what="the solution of column {row}",
            remedy="solve for ({factor} * b)",
        )
        return X

    def lengths(self, lengths: Tensor) -> Tensor:
        """Return lengths of scaled vectors to their size: [K] -> [K], float64."""
        return lengths * self._units
