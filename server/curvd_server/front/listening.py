"""The port: takes connections, finds out who calls, and finds who answers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from curvd.errors import InvalidSpec
from curvd.http2.sockets import tune
from curvd.http2.stream import Stream
from curvd_server.front.link import Link
from curvd_server.front.readiness import readable, writable
from curvd_server.front.recognise import ENOUGH_BYTES, is_ours
from curvd_server.front.relay import relay
from curvd_server.front.turns import Turns
from curvd_server.logs import logger

_GREETING_S = 10.0
"""How long a connection may be silent before it says who calls."""
_LOOK_S = 0.01
"""Pause before looking again at a greeting that is cut."""
_BACKLOG = 128
_RELAYED_BYTES = 1 << 20
"""On their way to grpcio; the kernel takes less if its limit is lower."""
_NOT_OURS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Of several addresses of one name, those of other machines or protocols."""

_NUMBERS = itertools.count(1)
"""Unix sockets do not tell their peers apart."""

Begin = Callable[[Link, Stream], asyncio.Task[None]]


class Front:
    """Takes connections.

    Args:
        begin: Starts a call of one of our clients.
        backend: Path of the Unix socket where grpcio serves all others.
        tls: Encryption; None: plain text.
    """

    def __init__(self, begin: Begin, backend: str, tls: ssl.SSLContext | None) -> None:
        self._begin, self._backend, self._tls = begin, backend, tls
        self._links: set[Link] = set()
        self._turns = Turns()
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def listening(self, listen: str) -> AsyncIterator[str]:
        """Take connections until the end of the context.

        Args:
            listen: ``host:port``, ``[ipv6]:port`` or ``unix:/path``.

        Yields:
            The target for clients on this machine.

        Raises:
            InvalidSpec: If the address cannot be had.
        """
        try:
            sockets = await _bound(listen)
        except OSError as error:
            msg = (
                f"cannot listen on {listen}: the address is taken, or not of this "
                f"machine ({error.strerror or error})"
            )
            raise InvalidSpec(msg, listen=listen) from error
        takers = [asyncio.create_task(self._take(sock)) for sock in sockets]
        try:
            yield _target(listen, sockets[0])
        finally:
            for taker in takers:
                taker.cancel()
            await asyncio.gather(*takers, return_exceptions=True)
            for sock in sockets:
                sock.close()
            _cleared(listen)

    async def stop(self, grace_s: float) -> None:
        """Send our clients away, and close all connections.

        Args:
            grace_s: Time for what is on its way.
        """
        for link in list(self._links):
            link.leave()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await asyncio.gather(*(link.gone.wait() for link in self._links))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _take(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listener)
            except OSError as error:  # for example no file descriptors are left
                logger().error("accept", error=str(error))
                await asyncio.sleep(_LOOK_S)
                continue
            task = asyncio.create_task(self._serve(sock, _peer(sock, address)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: socket.socket, peer: str) -> None:
        try:
            sock.setblocking(False)
            tune(sock)
            async with asyncio.timeout(_GREETING_S):
                ours = await self._recognised(sock)
                if ours and self._tls is not None:
                    sock = await _encrypted(sock, self._tls)
        except (OSError, TimeoutError) as error:
            logger().debug("greeting", peer=peer, error=str(error))
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        if ours:
            await self._link(sock, peer)
        else:
            await self._relay(sock)

    async def _recognised(self, sock: socket.socket) -> bool:
        while True:
            await readable(sock)
            beginning = sock.recv(ENOUGH_BYTES, socket.MSG_PEEK)
            if not beginning:
                msg = "the connection was closed"
                raise ConnectionError(msg)
            ours = is_ours(beginning, tls=self._tls is not None)
            if ours is not None:
                return ours
            await asyncio.sleep(_LOOK_S)

    async def _link(self, sock: socket.socket, peer: str) -> None:
        link = Link(sock, peer, self._begin, self._turns)
        self._links.add(link)
        try:
            await link.gone.wait()
        finally:
            link.close()
            self._links.discard(link)

    async def _relay(self, near: socket.socket) -> None:
        far = socket.socket(socket.AF_UNIX)
        far.setblocking(False)
        # The default, 200 kB, wakes both ends ten times as often: 40 MB in 104 ms, not 92.
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _RELAYED_BYTES)
        try:
            await asyncio.get_running_loop().sock_connect(far, self._backend)
        except OSError:
            near.close()
            far.close()
            return
        await relay(near, far)


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


def _cleared(listen: str) -> None:
    if listen.startswith("unix:"):
        Path(listen.removeprefix("unix:")).unlink(missing_ok=True)


def _target(listen: str, sock: socket.socket) -> str:
    if listen.startswith("unix"):
        return listen
    host = listen.rpartition(":")[0]
    here = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    return f"{here}:{sock.getsockname()[1]}"


def _peer(sock: socket.socket, address: object) -> str:
    if sock.family == socket.AF_UNIX or not isinstance(address, tuple):
        return f"unix:{next(_NUMBERS)}"
    if sock.family == socket.AF_INET6:
        return f"ipv6:[{address[0]}]:{address[1]}"
    return f"ipv4:{address[0]}:{address[1]}"


async def _encrypted(sock: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
    tls = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
    while True:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            await readable(tls)
        except ssl.SSLWantWriteError:
            await writable(tls)
        except BaseException:
            tls.close()
            raise
        else:
            return tls
