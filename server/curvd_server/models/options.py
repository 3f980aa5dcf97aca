"""Options of a library's model: known names, and values that are data alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Set
from typing import Any

from curvd.errors import InvalidSpec

Config = Mapping[str, Any]

_LARGEST = 2**20
_MOST_ITEMS = 4_096
_WORD = re.compile(r"[A-Za-z0-9_.+\-]{0,64}")
_NESTED = ("rope_parameters", "rope_scaling")
"""Options of transformers that are mappings of numbers and words."""


def checked(name: str, config: Config, known: Set[str]) -> dict[str, Any]:
    """Let options through that are known, and values that are plain.

    Args:
        name: The name of the builder, for messages.
        config: The config that a caller gave, not checked yet.
        known: The options.

    Returns:
        The options, with tuples for lists, which libraries use as constants.

    Raises:
        InvalidSpec: If an option is unknown, or a value is not plain.
    """
    for key, value in config.items():
        if key not in known:
            msg = f"{name}: unknown key {key!r}; known keys: {', '.join(sorted(known))}"
            raise InvalidSpec(msg, builder=name, key=key)
        nested = key in _NESTED and isinstance(value, dict)
        if not (_is_mapping(value) if nested else _is_plain(value, depth=2)):
            msg = (
                f"{name}: {key} must be a number, at most {_LARGEST} if whole, true, "
                f"false, a word, or a list of these, got {str(value)[:80]!r}"
            )
            raise InvalidSpec(msg, builder=name, key=key)
    return {k: _tuples(v) for k, v in config.items()}


def _is_plain(value: object, *, depth: int, largest: float = _LARGEST) -> bool:
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int):
        return abs(value) <= largest
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    return (
        isinstance(value, list)
        and depth > 0
        and len(value) <= _MOST_ITEMS
        and all(_is_plain(v, depth=depth - 1, largest=largest) for v in value)
    )


def _is_mapping(value: dict[str, Any]) -> bool:
    """Tell whether these are a few frequencies and factors, of any size."""
    return (
        len(value) <= _MOST_ITEMS
        and all(map(_WORD.fullmatch, value))
        and all(_is_plain(v, depth=1, largest=2**53) for v in value.values())
    )


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
