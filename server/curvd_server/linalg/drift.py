"""How far new rows of a Lanczos basis are from orthogonal to the old ones."""

from __future__ import annotations

import math


class Drift:
    """Forecasts the largest coefficient of new rows along old ones.

    The omega recurrence (Simon, Linear Algebra Appl. 61, 1984), in norms. What drives
    it is the rounding of the operator, which nobody knows before it was met.

    Args:
        eps: Relative rounding of the vectors.
    """

    def __init__(self, eps: float) -> None:
        self._eps = eps
        self._before, self.latest = eps, eps
        self._noise = math.inf

    def of_next(
        self, left: float, *, reach: float, back: float, known: float, scale: float
    ) -> float:
        """Forecast the drift of the row that a step makes.

        Args:
            left: Length of the new direction.
            reach: Largest distance of an eigenvalue from the step's diagonal element.
            back: The step's element beside the diagonal.
            known: Largest coefficient along old rows that was not subtracted.
            scale: Norm of the map.

        Returns:
            The drift; infinite if nothing is left.
        """
        if not left > 0:
            return math.inf
        grown = reach * self.latest + abs(back) * self._before
        return (grown + known + self._noise * scale) / left

    def advance(self, drift: float) -> None:
        """Go on to the next row, which was not orthogonalised.

        Args:
            drift: As forecast.
        """
        self._before, self.latest = self.latest, drift

    def reset(self) -> None:
        """Note that all rows are orthonormal now."""
        self._before = self.latest = self._eps

    def learn(self, noise: float) -> None:
        """Note the rounding that a product of two orthonormal rows had.

        Args:
            noise: Relative to the norm of the map.
        """
        self._noise = max(8 * self._eps, 2 * noise)

    def correct(self, measured: float) -> None:
        """Compare the forecast with the drift of the rows since the last reset.

        Args:
            measured: Their largest coefficient.
        """
        self._noise *= max(1.0, measured / max(self._before, self.latest))
