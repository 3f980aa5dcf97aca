"""Fields of messages that are converted alike; see `curvd.contract.convert`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.message import Message

D = TypeVar("D")


def same_names(kind: type[D], message: Message) -> D:
    """Read a dataclass whose fields are scalars named as the message's."""
    return kind(**{f.name: getattr(message, f.name) for f in fields(kind)})  # type: ignore[arg-type]


def optional(message: Message, name: str) -> Any:
    """Read a field that may be unset; None then."""
    return getattr(message, name) if message.HasField(name) else None
