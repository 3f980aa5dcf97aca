"""What the results of all queries have, and what they are drawn on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from curvd.contract import QueryInfo, Stop
from curvd.errors import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Result"]

Floats = NDArray[np.floating[Any]]


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


def drawn_on(axes: Axes | None) -> Axes:
    """Find where to draw.

    Args:
        axes: The caller's; None makes a figure.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: If a figure is to be made and matplotlib is not installed.
    """
    if axes is not None:
        return axes
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing(what="plot()", module="matplotlib", extra="plot") from error
    # Not pyplot: it keeps every figure alive and chooses a backend.
    made: Axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    return made
