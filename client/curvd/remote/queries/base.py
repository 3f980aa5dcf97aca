"""What the results of all queries have, and what they are drawn on."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from curvd.contract import QueryInfo, Stop
from curvd.errors import InvalidSpec, missing
from curvd.tensors import to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Result"]

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
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

    def to_dict(self) -> dict[str, Any]:
        """Say everything in values that JSON has.

        Returns:
            Fields by name: numbers, texts, lists; None for what is no finite number.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        found: dict[str, Any] = {"converged": self.converged, **_plain(fields)}
        return found

    def lines(self) -> Iterator[str]:
        """Say what was found, for people; the command line prints it.

        Yields:
            The lines that `str` puts one below the other, but for what it cost.
        """
        yield from ()

    def brief(self) -> str:
        """Say the value and its error in a line.

        Returns:
            What `repr` begins with.
        """
        return next(iter(self.lines()), "")

    def __repr__(self) -> str:
        i = self.info
        return (
            f"<{type(self).__name__} {self.brief()}; {i.stopped}: {i.products} products "
            f"in {i.elapsed_s:.2g} s at version {i.version}>"
        )

    def __str__(self) -> str:
        i = self.info
        cost = f"{i.stopped}: {i.products} products in {i.elapsed_s:.2f} s at version"
        return "\n".join([*self.lines(), f"{cost} {i.version}"])


def _plain(value: Any) -> Any:
    """Make what JSON has of a value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    array = to_numpy(value)
    if array is not None:
        return _plain(array.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


NOTHING = "nothing was computed: raise max_products or time_limit_s"
"""What results say that have no numbers, as products or time ran out before any."""


def ranks_only(axes: Axes) -> None:
    """Number the horizontal axis by whole numbers.

    Args:
        axes: What is drawn on.
    """
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def check_name(store: str | None) -> None:
    """Refuse to store something under no name.

    Args:
        store: The name; None: it is not to be stored.

    Raises:
        InvalidSpec: If it is empty.
    """
    if store == "":
        msg = "stored vectors need a name, at least one character"
        raise InvalidSpec(msg, store=store)


def check_drawable() -> None:
    """Refuse to draw where there is nothing to draw with.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise missing(what="plot()", module="matplotlib", extra="plot")


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
    check_drawable()
    from matplotlib.figure import Figure

    # Not pyplot: it keeps every figure alive and chooses a backend.
    made: Axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    return made
