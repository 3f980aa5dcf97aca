"""Addresses as operators write them, and which of them other machines reach."""

from __future__ import annotations

import ipaddress

from curvd.errors import InvalidSpec

_MOST_PORT = 65535
_UNIX = ("unix:", "unix-abstract:")


def is_local(listen: str) -> bool:
    """Tell whether an address can be reached from this machine only.

    Args:
        listen: ``host:port``, ``[ipv6]:port`` or ``unix:/path``.

    Returns:
        True for Unix sockets and loopback addresses.

    Raises:
        InvalidSpec: If it is no address.
    """
    if listen.startswith(_UNIX):
        return True
    host, _ = address_of(listen, "listen", or_else=" or unix:/path")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address_of(text: str, name: str, *, or_else: str = "") -> tuple[str, int]:
    """Read an address of TCP.

    Args:
        text: ``host:port`` or ``[ipv6]:port``.
        name: The setting, for errors.
        or_else: What else it may be, likewise.

    Returns:
        The host without brackets, and the port.

    Raises:
        InvalidSpec: If it is no address.
    """
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or not port.isdecimal() or (":" in host and not bracketed):
        ways = f"host:port{',' if or_else else ' or'} [ipv6]:port{or_else}"
        msg = f"{name} must be {ways}, got {text!r}"
        raise InvalidSpec(msg, address=text)
    if int(port) > _MOST_PORT:  # the system would take the rest of a division
        msg = f"the port of {name} must be at most {_MOST_PORT}, got {text!r}"
        raise InvalidSpec(msg, address=text)
    return host.strip("[]"), int(port)
