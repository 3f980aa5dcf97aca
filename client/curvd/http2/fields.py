"""Lists of header fields, and which of them are malformed (RFC 9113, section 8)."""

from __future__ import annotations

import re
from collections.abc import Iterable

Pairs = Iterable[tuple[bytes, bytes]]

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
"""Tokens without capital letters (section 8.2.1)."""
_VALUE = re.compile(rb"[\t -~]*")
"""What gRPC allows as a value: ASCII. Binary metadata is written in base64."""
_PADDED = re.compile(rb"[\t ].*|.*[\t ]", re.DOTALL)
_OF_CONNECTIONS = frozenset({
    b"connection",
    b"keep-alive",
    b"proxy-connection",
    b"transfer-encoding",
    b"upgrade",
})
"""Fields of HTTP/1.1 that say something about one connection (section 8.2.2)."""
_REQUEST = frozenset({b":method", b":scheme", b":path", b":authority"})
_RESPONSE = frozenset({b":status"})


class Malformed(Exception):
    """A list of fields that HTTP/2 does not allow. It ends its stream, nothing more."""


def request(pairs: Pairs) -> dict[str, str]:
    """Read the fields with which a request begins.

    Args:
        pairs: Names and values.

    Returns:
        The fields; several of one name are joined as gRPC joins them.

    Raises:
        Malformed: If they make no request.
    """
    found = _read(pairs, _REQUEST)
    for name in (":method", ":scheme", ":path"):
        if not found.get(name):
            msg = f"a request without {name}"
            raise Malformed(msg)
    path = found[":path"]
    if path[0] != "/" and (path, found[":method"]) != ("*", "OPTIONS"):
        msg = f"the path {path!r} does not begin with a slash"
        raise Malformed(msg)
    host = found.get("host")
    if host is not None and found.get(":authority", host) != host:
        msg = f"the host {host!r} is not the authority {found[':authority']!r}"
        raise Malformed(msg)
    return found


def response(pairs: Pairs) -> dict[str, str]:
    """Read the fields with which a response begins.

    Args:
        pairs: Names and values.

    Returns:
        The fields.

    Raises:
        Malformed: If they make no response.
    """
    found = _read(pairs, _RESPONSE, lenient=True)
    status = found.get(":status", "")
    if len(status) != 3 or not status.isdigit():
        msg = f"a response with the status {status!r}" if status else "no :status"
        raise Malformed(msg)
    if status == "101":
        msg = "status 101, which HTTP/2 does not have"
        raise Malformed(msg)
    return found


def trailers(pairs: Pairs) -> dict[str, str]:
    """Read the fields that end a message.

    Args:
        pairs: Names and values.

    Returns:
        The fields.

    Raises:
        Malformed: If one of them may not be there.
    """
    return _read(pairs, frozenset(), lenient=True)


def content_length(found: dict[str, str]) -> int | None:
    """Read how many bytes of data are announced.

    Args:
        found: Fields of a message.

    Returns:
        The number; None if nothing is announced.

    Raises:
        Malformed: If it is no number.
    """
    text = found.get("content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 20:
        msg = f"a content-length of {text[:30]!r}"
        raise Malformed(msg)
    return int(text)


def _read(
    pairs: Pairs, pseudo: frozenset[bytes], *, lenient: bool = False
) -> dict[str, str]:
    """Check each field, and the order of all.

    Args:
        pairs: Names and values.
        pseudo: Pseudo-header fields that may be there.
        lenient: Whether values may have blanks around them: gRPC writes the blanks of
            an error message as they are.
    """
    found: dict[str, str] = {}
    regular = False
    for name, value in pairs:
        if name[:1] == b":":
            _check_pseudo(
                name, pseudo, late=regular, twice=name.decode("latin-1") in found
            )
        else:
            regular = True
            _check_regular(name, value)
        if not _VALUE.fullmatch(value) or (not lenient and _PADDED.fullmatch(value)):
            msg = f"the value {value[:50]!r} of {_shown(name)}"
            raise Malformed(msg)
        key, text = name.decode("ascii"), value.decode("ascii")
        found[key] = f"{found[key]},{text}" if key in found else text
    content_length(found)
    return found


def _check_pseudo(
    name: bytes, allowed: frozenset[bytes], *, late: bool, twice: bool
) -> None:
    if name not in allowed:
        msg = f"the pseudo-header field {_shown(name)}, which has no place here"
        raise Malformed(msg)
    if late or twice:
        how = "after a regular field" if late else "twice"
        msg = f"the pseudo-header field {_shown(name)} {how}"
        raise Malformed(msg)


def _check_regular(name: bytes, value: bytes) -> None:
    if not _NAME.fullmatch(name):
        msg = f"a field of the name {_shown(name)}"
        raise Malformed(msg)
    if name in _OF_CONNECTIONS or (name == b"te" and value.lower() != b"trailers"):
        msg = f"the field {_shown(name)} ({value[:50]!r}), which HTTP/2 does not have"
        raise Malformed(msg)


def _shown(name: bytes) -> str:
    return repr(name[:50].decode("latin-1"))
