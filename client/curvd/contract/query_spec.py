"""What is known of every query: the options that all take, and its names."""

from __future__ import annotations

import enum
import functools
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from curvd.contract.enums import OperatorKind, member
from curvd.contract.progress import QueryProgress
from curvd.contract.settings import check_settings, setting, settings_of


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryOptions:
    """What every query takes; values are judged when it is made, on either side."""

    max_products: int | None = setting(
        None,
        "Stop after so many columns; None: the server's limit.",
        least=1,
        most=2**62,
    )
    time_limit_s: float | None = setting(
        None,
        "Start no product after so long; the result is the best so far.",
        positive=True,
    )
    progress: Callable[[QueryProgress], None] | bool = setting(
        False,
        "Called with a `QueryProgress`; True draws a line on a terminal.",
        wire="",
    )

    def __post_init__(self) -> None:
        for name, kind in choices_of(type(self)).items():
            chosen = member(kind, getattr(self, name), name)
            object.__setattr__(self, name, chosen)
        check_settings(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuerySpec:
    """A query by its names."""

    method: str
    """The method of both clients' operators, or sessions."""
    options: type[QueryOptions]
    of_session: bool = False
    """Whether it asks about the data points of a session, not about an operator."""
    command: str = ""
    """Of the command line; empty: it has none."""
    terminal: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of the command, where they are others: there somebody waits and reads."""
    operands: tuple[Any, ...] = ()
    """Of the command, by position."""
    operator: OperatorKind = OperatorKind.HESSIAN
    """Of the command, if it does not say."""


def own_first(options: type[Any], common: type[Any] | None = None) -> list[str]:
    """Order options for people.

    Args:
        options: The options of a query, or of something else.
        common: What all of its kind take; None: what every query takes.

    Returns:
        Their names: its own, then what all take.
    """
    others = settings_of(common or QueryOptions)
    return sorted(settings_of(options), key=lambda name: name in others)


def choices_of(options: type[QueryOptions]) -> Mapping[str, type[enum.StrEnum]]:
    """Name the options that choose a member of an enumeration.

    Args:
        options: The options of a query.

    Returns:
        The enumeration by option.
    """
    kind: Any = options  # a class is hashable, whatever mypy thinks of its instances
    return _choices(kind)


@functools.cache
def _choices(options: Any) -> Mapping[str, type[enum.StrEnum]]:
    hints = typing.get_type_hints(options)
    parts = {name: (hint, *typing.get_args(hint)) for name, hint in hints.items()}
    return {
        name: kind
        for name, found in parts.items()
        for kind in found
        if isinstance(kind, type) and issubclass(kind, enum.StrEnum)
    }
