"""Arguments and results of algorithms as text, with their arrays beside it.

A tensor is a vector, [..., P], of which each worker has its elements; an array of NumPy is
small and the same for all. What may be in it is read off the annotations of the algorithms:
no other class is made, and none is named that they do not name.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from curvd.errors import Internal
from curvd_server.linalg import ALGORITHMS


class Packed(NamedTuple):
    """A value, taken apart."""

    text: str
    vectors: list[Tensor]
    """Each [..., P], or [..., own]."""
    small: list[NDArray[Any]]


def pack(value: Any) -> Packed:
    """Take a value apart.

    Args:
        value: Made of numbers, texts, enumerations, tuples, lists, mappings, dataclasses,
            tensors and arrays.

    Returns:
        Its parts.

    Raises:
        TypeError: If something else is in it.
    """
    found = Packed("", [], [])
    return found._replace(text=json.dumps(_written(value, found)))


def unpack(text: str, vectors: Sequence[Tensor], small: Sequence[NDArray[Any]]) -> Any:
    """Put a value together.

    Args:
        text: As `pack` wrote it.
        vectors: Its vectors, or their elements that are here.
        small: Its arrays.

    Returns:
        The value; lists have become tuples.

    Raises:
        Internal: If the text is no such value.
    """
    try:
        return _read(json.loads(text), vectors, small)
    except (ValueError, TypeError, LookupError) as error:
        msg = f"an algorithm's arguments or result cannot be read: {error}"
        raise Internal(msg) from error


def _written(value: Any, found: Packed) -> Any:
    if isinstance(value, enum.Enum):  # which may be texts or numbers as well
        return {"of": type(value).__name__, "value": value.value}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value)
    if isinstance(value, Tensor):
        found.vectors.append(value)
        return {"vector": len(found.vectors) - 1}
    if isinstance(value, np.ndarray):
        found.small.append(value)
        return {"small": len(found.small) - 1}
    if isinstance(value, list | tuple):
        return [_written(item, found) for item in value]
    if isinstance(value, Mapping):
        return {"items": {key: _written(item, found) for key, item in value.items()}}
    if dataclasses.is_dataclass(value):
        fields = {
            field.name: _written(getattr(value, field.name), found)
            for field in dataclasses.fields(value)
        }
        return {"of": type(value).__name__, "fields": fields}
    msg = f"an algorithm has no {type(value).__name__} among its arguments or results"
    raise TypeError(msg)


def _read(value: Any, vectors: Sequence[Tensor], small: Sequence[NDArray[Any]]) -> Any:
    if isinstance(value, list):
        return tuple(_read(item, vectors, small) for item in value)
    if not isinstance(value, dict):
        return value
    if "vector" in value:
        return vectors[value["vector"]]
    if "small" in value:
        return small[value["small"]]
    if "items" in value:
        return {k: _read(item, vectors, small) for k, item in value["items"].items()}
    kind = _kinds()[value["of"]]
    if "value" in value:
        return kind(value["value"])
    fields = {k: _read(item, vectors, small) for k, item in value["fields"].items()}
    return kind(**fields)


@functools.cache
def _kinds() -> Mapping[str, type[Any]]:
    """Collect the enumerations and dataclasses that algorithms take and return."""
    found = dict[str, type[Any]]()
    open_ = list[Any]()
    for algorithm in ALGORITHMS.values():
        open_ += typing.get_type_hints(algorithm).values()
    while open_:
        kind = open_.pop()
        open_ += typing.get_args(kind)
        if not isinstance(kind, type) or isinstance(kind, types.GenericAlias):
            continue
        if found.get(kind.__name__) is kind:
            continue
        if issubclass(kind, enum.Enum):
            found[kind.__name__] = kind
        elif dataclasses.is_dataclass(kind):
            found[kind.__name__] = kind
            open_ += typing.get_type_hints(kind).values()
    return found
