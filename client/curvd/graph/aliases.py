"""In-place operators made pure.

Every tensor of the traced code is an `Alias`: a cell of memory, and the views that lead
from the cell to it. Writing to an alias makes a new value; if others look at the same
memory and are used later, the value is put back into the cell through the inverse of
the views, and the others are looked up anew. This is what torch calls
functionalisation, on a graph and without decomposing any operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from curvd.graph.tape import Tape, Value

_AXES = {"select": (0,), "slice": (0,), "diagonal": (1, 2)}
"""Which arguments of a view, after what is viewed, are axes."""
Replay = Callable[[Value], Value]
"""Emits a view of a value."""
Inverse = Callable[[Value, Value], Value]
"""Emits what a view's base becomes: (base, new value of the view)."""


@dataclass(eq=False, slots=True)
class Cell:
    """Memory that aliases share."""

    value: Value
    own: bool
    """Whether the code made it; nothing else may be written to."""
    version: int = 0
    aliases: list[Alias] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class View:
    """One step from a cell to an alias."""

    replay: Replay
    inverse: Inverse | None
    """None: unknown."""
    certain: bool = True
    """False: it may be a copy, depending on how memory is laid out."""


@dataclass(eq=False, slots=True)
class Alias:
    """A tensor: some memory, seen through views."""

    cell: Cell
    views: tuple[View, ...]
    cached: Value
    version: int
    last_use: int = -1
    """Position of the last operator that uses it."""

    @classmethod
    def of(cls, value: Value, *, own: bool = True) -> Alias:
        """Give a value memory of its own."""
        alias = cls(Cell(value, own), (), value, 0)
        alias.cell.aliases.append(alias)
        return alias

    @property
    def value(self) -> Value:
        """What it is now."""
        if self.version != self.cell.version:
            value = self.cell.value
            for view in self.views:
                value = view.replay(value)
            self.cached, self.version = value, self.cell.version
        return self.cached

    def viewed(self, view: View, value: Value | None = None) -> Alias:
        """Look at the same memory in another way.

        Args:
            view: How.
            value: What it is now, if that is known.

        Returns:
            The view.
        """
        if value is None:
            value = view.replay(self.value)
        alias = Alias(self.cell, (*self.views, view), value, self.cell.version)
        self.cell.aliases.append(alias)
        return alias

    def write(self, new: Value, position: int) -> bool:
        """Replace what it is.

        Args:
            new: The new value, of the same shape and type.
            position: The position of the operator that writes.

        Returns:
            Whether it could be done; if not, others see this memory in a way that
            cannot be followed.
        """
        others = [
            a for a in self.cell.aliases if a is not self and a.last_use > position
        ]
        if not others:
            # Nobody else looks: memory of its own will do.
            self.cell = Cell(new, True, aliases=[self])
            self.views, self.cached, self.version = (), new, 0
            return True
        if any(view.inverse is None for view in self.views) or any(
            not view.certain for alias in (self, *others) for view in alias.views
        ):
            return False
        bases = [self.cell.value]
        for view in self.views[:-1]:
            bases.append(view.replay(bases[-1]))
        value = new
        for view, base in zip(reversed(self.views), reversed(bases), strict=True):
            assert view.inverse is not None
            value = view.inverse(base, value)
        self.cell.value = value
        self.cell.version += 1
        self.cached, self.version = new, self.cell.version
        return True


def view_of(
    tape: Tape,
    operator: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    *,
    certain: bool,
    turning: bool = False,
) -> View:
    """Describe a view operator.

    Args:
        tape: Where it is emitted.
        operator: Its name.
        arguments: All but the first, which is what is viewed.
        options: Likewise by name.
        certain: Whether it never copies.
        turning: Whether the values are complex.

    Returns:
        The view.
    """

    def replay(base: Value) -> Value:
        return tape.emit(operator, base, *arguments, **options)

    name = operator.split(".")[1]
    like = {
        "select": "aten.select_scatter.default",
        "slice": "aten.slice_scatter.default",
        "diagonal": "aten.diagonal_scatter.default",
    }
    inverse: Inverse | None = None
    if name == "slice" and _is_whole(*arguments):
        inverse = _identity
    elif name in like:

        def scatter(base: Value, new: Value) -> Value:
            return tape.emit(like[name], base, new, *arguments, **options)

        def scatter_pairs(base: Value, new: Value) -> Value:
            # torch cannot differentiate these operators on complex numbers.
            pairs = (tape.emit("aten.view_as_real.default", v) for v in (base, new))
            axes = [
                a - 1 if k in _AXES[name] and a < 0 else a
                for k, a in enumerate(arguments)
            ]
            whole = tape.emit(like[name], *pairs, *axes, **options)
            return tape.emit("aten.view_as_complex.default", whole)

        inverse = scatter_pairs if turning else scatter
    elif name in ("transpose", "swapaxes", "swapdims", "t", "numpy_T"):

        def again(base: Value, new: Value) -> Value:
            return tape.emit(operator, new, *arguments, **options)

        inverse = again
    elif name == "permute" and arguments and all(type(a) is int for a in arguments[0]):
        axes = [a % len(arguments[0]) for a in arguments[0]]
        back = [axes.index(a) for a in range(len(axes))]

        def permuted(base: Value, new: Value) -> Value:
            return tape.emit(operator, new, back)

        inverse = permuted
    elif name in ("reshape", "unsqueeze", "squeeze", "unflatten"):

        def reshaped(base: Value, new: Value) -> Value:
            return tape.emit("aten.reshape_as.default", new, base)

        inverse = reshaped
    elif name == "alias":
        inverse = _identity
    return View(replay, inverse, certain)


def item_of(tape: Tape, whole: View, index: int) -> View:
    """Describe one of the views that an operator returns as a sequence.

    Args:
        tape: Where it is emitted.
        whole: The operator.
        index: Which of its results.

    Returns:
        The view.
    """

    def replay(base: Value) -> Value:
        return tape.emit("sym.item", whole.replay(base), index)

    return View(
        replay, None, whole.certain
    )  # torch lets nobody write to one of several


def _is_whole(axis: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> bool:
    """Tell whether a slice takes everything."""
    return start in (None, 0) and end in (None, 2**63 - 1) and step == 1


def _identity(base: Value, new: Value) -> Value:
    return new
