"""Settings: each option of a server is declared once, and all its faces are made of that.

A frozen dataclass holds them, each field a `setting` with its default, its bounds and one
sentence of help. `check` judges the values, the command line makes flags, environment
variables and keys of a TOML file of them (`curvd_server.cli`), and the table of
docs/server.md is printed from them.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from curvd.errors import InvalidSpec

_KEY = "setting"
_MOST_BYTES = 2**62
_MOST_S = 10 * 365 * 24 * 3600
_MOST_COUNT = 2**31 - 1
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


def check(config: Any) -> None:
    """Judge the values of a configuration by what its settings say.

    Args:
        config: An instance of a dataclass.

    Raises:
        InvalidSpec: If a value is out of its range; it names setting, value and range.
    """
    for name, (known_as, known) in settings_of(config).items():
        value = getattr(config, name)
        if known.choices and value not in known.choices:
            wanted = f"one of {', '.join(known.choices)}"
        elif known.positive or known.least is not None:
            wanted = _range_missed(name, value, known, whole=known_as.type == "int")
        else:
            continue
        if wanted:
            msg = f"{name} must be {wanted}, got {value!r}"
            raise InvalidSpec(msg, limit=name, value=value)


def _range_missed(name: str, value: Any, known: Setting, *, whole: bool) -> str:
    """Say what a number should be and is not; empty if it is. NaN is in no range."""
    if whole and not isinstance(value, int):
        return "a whole number"
    if known.positive and not value > 0:
        return "more than 0"
    if known.least is not None and not value >= known.least:
        return f"at least {known.least:g}"
    most = _most(name) if known.most is None else known.most
    return "" if value <= most else f"at most {most}"


def _most(name: str) -> int:
    if name.endswith("_bytes"):
        return _MOST_BYTES
    return _MOST_S if name.endswith("_s") else _MOST_COUNT
