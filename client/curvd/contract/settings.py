"""Settings: each option is declared once, and all its faces are made of that.

A frozen dataclass holds them, each field a `setting` with its default, its bounds and one
sentence of help. `check_settings` judges the values. Of a server's settings the command line makes
flags, environment variables and keys of a TOML file (`curvd_server.cli`), and the table of
docs/server.md is printed from them; `curvd.contract.query_options` says what becomes of a
query's.
"""

from __future__ import annotations

import operator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from curvd.errors import InvalidSpec

_KEY = "setting"
_MOST_BYTES = 2**62
_MOST_S = 10 * 365 * 24 * 3600
_MOST_COUNT = 2**31 - 1
_MOST_NUMBER = 1e300
"""Largest values, by the unit in the name: what the contract can carry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is known of a setting beside its name, type and default."""

    help: str
    """One sentence or more, for the command line and the documents."""
    least: float | None
    """Smallest value that is accepted."""
    positive: bool
    """Whether it must be more than 0."""
    most: float | None
    """Largest value that is accepted; None: what its unit allows."""
    choices: tuple[str, ...]
    """All values that are accepted; empty: any."""
    shown: str
    """The default in words; empty: the default says it."""
    option: str
    """Name of the option, if it is not that of the field."""
    metavar: str
    """What the option's value looks like; empty: the type says it."""
    wire: str | None
    """Field of a message that carries it; None: that of its name; empty: none."""
    unset: Any
    """What the contract means by a field that is unset; None: the default."""

    def range_of(self, field: Field[Any]) -> tuple[float, float] | None:
        """Name the smallest and the largest value of a number.

        Args:
            field: What it is the setting of; the name says the unit.

        Returns:
            Both ends; the lower one is excluded if the number is `positive`. None if
            any value is accepted.
        """
        if self.positive:
            low = 0.0
        elif self.least is not None:
            low = self.least
        elif _is(field, float):
            low = -_MOST_NUMBER  # it need only be finite
        else:
            return None
        return low, _most(field) if self.most is None else self.most


def setting(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    positive: bool = False,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    shown: str = "",
    option: str = "",
    metavar: str = "",
    secret: bool = False,
    wire: str | None = None,
    unset: Any = None,
) -> Any:
    """Declare a setting, as a field of a frozen dataclass.

    Args:
        default: Its value where nobody sets it; a type or function makes it anew;
            `MISSING`: it has to be set.
        help: One sentence or more, units included.
        least: Smallest value that is accepted.
        positive: Whether it must be more than 0.
        most: Largest value that is accepted, if it is less than its unit allows.
        choices: All values that are accepted.
        shown: The default in words.
        option: Name of the option, if it is not that of the field.
        metavar: What the option's value looks like.
        secret: Whether it must not be printed.
        wire: Field of a message that carries it, if its name is another; empty: none
            does.
        unset: What the contract means by a field that is unset, if not the default.

    Returns:
        The field.
    """
    known = Setting(
        help=help,
        least=least,
        positive=positive,
        most=most,
        choices=choices,
        shown=shown,
        option=option,
        metavar=metavar,
        wire=wire,
        unset=unset,
    )
    made: dict[str, Any] = {"metadata": {_KEY: known}, "repr": not secret}
    if default is not MISSING:
        made["default_factory" if callable(default) else "default"] = default
    found: Any = field(**made)
    return found


def settings_of(config: Any) -> dict[str, tuple[Field[Any], Setting]]:
    """List the settings of a dataclass or one of its instances.

    Args:
        config: The class, or an instance.

    Returns:
        Field and setting by name, in order.
    """
    return {f.name: (f, f.metadata[_KEY]) for f in fields(config) if _KEY in f.metadata}


def check_settings(config: Any) -> None:
    """Judge the values of a configuration by what its settings say.

    Args:
        config: An instance of a dataclass; a value that may be left out is None then.

    Raises:
        InvalidSpec: If a value is out of its range; it names setting, value and range.
    """
    for name, (known_as, known) in settings_of(config).items():
        value = getattr(config, name)
        if known.choices and value not in known.choices:
            wanted = f"one of {', '.join(known.choices)}"
        elif value is None or known.range_of(known_as) is None:
            continue
        else:
            wanted = _range_missed(value, known, known_as)
        if wanted:
            msg = f"{name} must be {wanted}, got {value!r}"
            raise InvalidSpec(msg, limit=name, value=value)


def _range_missed(value: Any, known: Setting, field: Field[Any]) -> str:
    """Say what a number should be and is not; empty if it is. NaN is in no range."""
    ends = known.range_of(field)
    assert ends is not None
    if _is(field, int):
        try:
            operator.index(value)
        except TypeError:
            return "a whole number"
        if isinstance(value, bool):
            return "a whole number"
    elif not hasattr(value, "__float__"):
        return "a number"
    else:
        value = float(value)  # of NumPy's narrow ones the ends would overflow
    if known.positive and not value > 0:
        return "more than 0"
    if not value >= ends[0]:
        return "finite" if known.least is None else f"at least {known.least:g}"
    if value <= ends[1]:
        return ""
    return f"at most {ends[1]}" if ends[1] < _MOST_NUMBER else "finite"


def _is(field: Field[Any], kind: type) -> bool:
    """Tell whether a field holds a number of a type, or nothing."""
    return field.type in (kind.__name__, f"{kind.__name__} | None")


def _most(field: Field[Any]) -> float:
    if field.name.endswith("_bytes"):
        return _MOST_BYTES
    if field.name.endswith("_s"):
        return _MOST_S
    return _MOST_NUMBER if _is(field, float) else _MOST_COUNT
