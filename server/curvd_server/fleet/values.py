"""Frozen values as JSON and back, by the types of their fields.

What comes back is checked against these types, so nothing is made that is not declared,
and no class is named by whoever sends.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

from curvd.errors import Internal


def plain(value: Any) -> Any:
    """Write a value with what JSON has.

    Args:
        value: A dataclass, an enumeration's member, bytes, tuples, mappings, or less.

    Returns:
        The same; floats may be infinite, which Python's JSON allows.
    """
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | frozenset):
        return [plain(item) for item in value]
    return value


def typed(kind: Any, value: Any) -> Any:
    """Make a value of a type of what `plain` wrote.

    Args:
        kind: The type, as it is annotated.
        value: What JSON had.

    Returns:
        The value.

    Raises:
        Internal: If it is none of that type.
    """
    origin = typing.get_origin(kind)
    if origin is not None:
        return _generic(origin, typing.get_args(kind), value)
    if kind in (Any, object):
        return value
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value)
    try:
        if issubclass(kind, enum.Enum):
            return kind(value)
        if issubclass(kind, bytes):
            return kind(base64.b64decode(value, validate=True))
        if kind is float and type(value) is int:
            return float(value)
    except (TypeError, ValueError) as error:
        raise _refused(kind, value) from error
    if type(value) is not kind:
        raise _refused(kind, value)
    return value


def _generic(origin: Any, inner: tuple[Any, ...], value: Any) -> Any:
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inner:
            return None
        (rest,) = (kind for kind in inner if kind is not type(None))
        return typed(rest, value)
    if origin is typing.Literal:
        if value not in inner:
            raise _refused(origin, value)
        return value
    if issubclass(origin, Mapping) and isinstance(value, dict):
        return {typed(inner[0], k): typed(inner[1], v) for k, v in value.items()}
    if not isinstance(value, list):
        raise _refused(origin, value)
    if origin is frozenset or inner[1:] == (...,):
        return origin(typed(inner[0], item) for item in value)
    if origin is not tuple or len(inner) != len(value):
        raise _refused(origin, value)
    return tuple(map(typed, inner, value))


def _dataclass(kind: Any, value: Any) -> Any:
    types_of = _types_of(kind)
    if not isinstance(value, dict) or not value.keys() <= types_of.keys():
        raise _refused(kind, value)
    try:
        return kind(**{n: typed(types_of[n], item) for n, item in value.items()})
    except TypeError as error:
        raise _refused(kind, value) from error


@functools.cache
def _types_of(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _refused(kind: Any, value: Any) -> Internal:
    name = getattr(kind, "__name__", str(kind))
    msg = f"a message between front and worker has no {name} where it should: {value!r:.80}"
    return Internal(msg)
