"""Options of a query <-> its request: fields by their names, whichever query it is."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message

from curvd.contract.convert_enums import enum_from
from curvd.contract.infos import StoredVector
from curvd.contract.query_spec import QueryOptions, choices_of
from curvd.contract.rpcs import RPCS
from curvd.contract.settings import settings_of
from curvd.errors import InvalidSpec

O = TypeVar("O", bound=QueryOptions)  # noqa: E741 - options

_TEXT = FieldDescriptor.TYPE_STRING

Path = tuple[FieldDescriptor, ...]
"""The fields that lead to a value, from the request down."""


def request_type(rpc: str) -> Any:
    """Find the message that carries a query's options.

    Args:
        rpc: The name of the query's method.

    Returns:
        The class of the request, or of the header of its stream.
    """
    message: Any = RPCS[rpc].request.message
    return type(message().header) if RPCS[rpc].client_streams else message


def write(options: QueryOptions, message: Message) -> None:
    """Write options into a request.

    Args:
        options: What to ask for; None is left out.
        message: The request, or the header of its stream.

    Raises:
        InvalidSpec: If an option has another type than its field.
    """
    for name, (*parts, last) in carried(type(options), message.DESCRIPTOR).items():
        value = getattr(options, name)
        if value is None:
            continue
        if last.enum_type is not None:
            member = f"{_prefix(last)}_{value.name}"
            value = last.enum_type.values_by_name[member].number
        elif isinstance(value, StoredVector):
            value = value.name
        place: Any = message
        for part in parts:
            place = getattr(place, part.name)
        try:
            setattr(place, last.name, value)
        except TypeError as error:
            what = "a name, or what is stored under one" if last.type == _TEXT else ""
            msg = (
                f"{name} cannot be a {type(value).__name__}: it is "
                f"{what or settings_of(type(options))[name][1].help}"
            )
            raise InvalidSpec(msg, option=name) from error


def read(options: type[O], message: Message) -> O:
    """Read options off a request, defaults filled in.

    What is unset stands for the default, and so does 0 where the contract cannot tell it
    from that.

    Args:
        options: The options of a query.
        message: The message that a caller gave, not checked yet.

    Returns:
        The options.

    Raises:
        InvalidSpec: If a value is out of its range.
    """
    values: dict[str, Any] = {}
    settings = settings_of(options)
    for name, (*parts, last) in carried(options, message.DESCRIPTOR).items():
        place: Any = message
        for part in parts:
            place = getattr(place, part.name)
        if last.has_presence and not place.HasField(last.name):
            continue
        value = getattr(place, last.name)
        if not value and not last.has_presence:
            value = settings[name][1].unset
        if value is None:
            continue
        if last.enum_type is not None:
            kind = choices_of(options)[name]
            value = enum_from(EnumTypeWrapper(last.enum_type), _prefix(last), kind)(
                value
            )
        values[name] = value
    return options(**values)


def find(name: str, message: Message) -> tuple[Any, FieldDescriptor]:
    """Look a value up in a message, or in one of the messages that it consists of.

    Args:
        name: The name of the field.
        message: Where to look.

    Returns:
        The value, and its field.

    Raises:
        LookupError: If there is no such field.
    """
    *parts, last = _path(name, message.DESCRIPTOR)
    place: Any = message
    for part in parts:
        place = getattr(place, part.name)
    return getattr(place, last.name), last


def carried(options: type[QueryOptions], message: Any) -> Mapping[str, Path]:
    """Find the fields of a request that carry options.

    Args:
        options: The options of a query.
        message: Descriptor of its request, or of the header of its stream.

    Returns:
        The way to each field, by option; options that do not travel have none.
    """
    kind: Any = options  # a class is hashable, whatever mypy thinks of its instances
    return _carried(kind, message)


@functools.cache
def _carried(options: Any, message: Any) -> Mapping[str, Path]:
    found = {}
    for name, (_, known) in settings_of(options).items():
        wire = name if known.wire is None else known.wire
        if wire:
            found[name] = _path(wire, message)
    return found


def _path(name: str, message: Any) -> Path:
    """Look a field up in a message, then in the messages that it consists of."""
    if name in message.fields_by_name:
        return (message.fields_by_name[name],)
    for part in message.fields:
        if part.message_type is not None and name in part.message_type.fields_by_name:
            return part, part.message_type.fields_by_name[name]
    msg = (
        f"{message.full_name} has no field {name!r}: add it, or say wire= in the option"
    )
    raise LookupError(msg)


def _prefix(field: FieldDescriptor) -> str:
    """Spell the prefix of an enumeration's values: ``OperatorKind`` is OPERATOR_KIND."""
    assert field.enum_type is not None
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", field.enum_type.name).upper()
