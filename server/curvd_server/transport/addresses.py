"""Addresses to listen on, and those of who calls."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import socket
import stat
from pathlib import Path

from curvd.errors import InvalidSpec

_BACKLOG = 128
_TRIES = 8
"""To find a port that is free at all addresses of a name, where any will do."""
_NOT_OURS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Errors of addresses that are another machine's, or of a protocol that is not there;
of several addresses of one name, such are left out."""

_NUMBERS = itertools.count(1)
"""Unix sockets do not tell their peers apart."""


async def bound(listen: str, setting: str = "") -> list[socket.socket]:
    """Take an address.

    Args:
        listen: ``host:port``, ``[ipv6]:port`` or ``unix:/path``.
        setting: Whose address it is, for errors; empty: the server's own.

    Returns:
        One listening socket for each address that a name stands for and that is ours.

    Raises:
        InvalidSpec: If the address cannot be had.
    """
    for left in reversed(range(_TRIES if listen.endswith(":0") else 1)):
        try:
            return await _bound(listen)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and left:
                continue  # a port that is free at ::1 may be taken at 127.0.0.1
            raise _taken(listen, setting, error) from error
    raise AssertionError


def _taken(listen: str, setting: str, error: OSError) -> InvalidSpec:
    where = f"{setting} {listen}" if setting else listen
    msg = (
        f"cannot listen on {where}: the address is taken, or not of this "
        f"machine ({error.strerror or error})"
    )
    return InvalidSpec(msg, listen=listen)


async def _bound(listen: str) -> list[socket.socket]:
    """Take an address: one socket for each that a name stands for and that is ours."""
    if listen.startswith(("unix:", "unix-abstract:")):
        return [_bound_unix(listen)]
    host, _, port = listen.rpartition(":")
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    for family, _, _, _, address in dict.fromkeys(found):
        if sockets and not int(port):  # the port that the first one got
            address = (address[0], sockets[0].getsockname()[1], *address[2:])
        try:
            sock = socket.create_server(
                address,
                family=family,
                backlog=_BACKLOG,
                dualstack_ipv6=host == "[::]",
            )
        except OSError as error:
            missing = error
            if error.errno in _NOT_OURS:
                continue  # localhost is ::1, too, where there is no IPv6
            for sock in sockets:
                sock.close()
            raise
        sock.setblocking(False)
        sockets.append(sock)
    if not sockets and missing is not None:
        raise missing
    return sockets


def _bound_unix(listen: str) -> socket.socket:
    abstract = listen.startswith("unix-abstract:")
    path = listen.removeprefix("unix-abstract:" if abstract else "unix:")
    sock = socket.socket(socket.AF_UNIX)
    try:
        if not abstract:
            _make_way(path)
        sock.bind(f"\0{path}" if abstract else path)
        if not abstract:
            # Only this user: a socket is as local as its permissions.
            os.chmod(path, 0o600)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _make_way(path: str) -> None:
    """Remove the socket of a server that is gone."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)


def cleared(listen: str) -> None:
    """Remove the file of a Unix socket that nobody listens on any more."""
    if listen.startswith("unix:"):
        Path(listen.removeprefix("unix:")).unlink(missing_ok=True)


def target_of(listen: str, port: int) -> str:
    """Tell where a client on this machine connects.

    Args:
        listen: The address that the server was given.
        port: The port it got.

    Returns:
        The target.
    """
    if listen.startswith("unix"):
        return listen
    host = listen.rpartition(":")[0]
    here = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    return f"{here}:{port}"


def peer_of(sock: socket.socket, address: object) -> str:
    """Name who connected, as gRPC does.

    Args:
        sock: The connection.
        address: The address, from `accept`.

    Returns:
        Scheme and address; a number for Unix sockets.
    """
    if sock.family == socket.AF_UNIX or not isinstance(address, tuple):
        return f"unix:{next(_NUMBERS)}"
    if sock.family == socket.AF_INET6:
        return f"ipv6:[{address[0]}]:{address[1]}"
    return f"ipv4:{address[0]}:{address[1]}"
