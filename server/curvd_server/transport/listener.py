"""The port: takes connections, finds out who calls, and finds who answers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from curvd.http2 import Code, Stream, tune
from curvd_server.system import logger
from curvd_server.transport.addresses import bound, cleared, peer_of, target_of
from curvd_server.transport.admission import (
    OWN_DESCRIPTORS,
    Admission,
    Refused,
    descriptors_for_connections,
)
from curvd_server.transport.allowance import Allowance
from curvd_server.transport.connection import ServerConnection
from curvd_server.transport.drops import Drops
from curvd_server.transport.greeting import encrypted, recognised
from curvd_server.transport.limits import ConnectionLimits
from curvd_server.transport.proxy import connected, relay
from curvd_server.transport.upload_scheduler import UploadScheduler

_SWEEP_S = 0.5
"""How often connections are looked at that should have done something."""
_PAUSE_S = 0.1
"""Pause when the system has no descriptor left for a connection."""
_CONNECTION_S = 4e-4
"""What a connection costs the event loop until its first call."""

_HANDSHAKE_S = 1.5e-3
"""What a handshake costs this machine that grpcio does for us."""

Begin = Callable[[ServerConnection, Stream], asyncio.Task[None]]


class _Visit:
    """One connection, from its beginning to its end.

    Args:
        sock: The connection.
        peer: Who calls, as gRPC writes it.
    """

    descriptors = OWN_DESCRIPTORS

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.sock, self.peer = sock, peer
        self.host = "" if peer.startswith("unix") else peer.rpartition(":")[0]
        self.task: asyncio.Task[None] | None = None
        self.connection: ServerConnection | None = None
        self.relayed = False
        self.dropped: str | None = None
        """Why it was sent away."""

    @property
    def known(self) -> bool:
        """Whether a call of it was ever let through."""
        return self.connection is not None and self.connection.vouched

    @property
    def busy(self) -> bool:
        """Whether a call that was let through is under way, or nobody knows."""
        return self.relayed or (
            self.connection is not None
            and self.connection.vouched
            and self.connection.busy
        )

    def send_away(self, reason: str) -> None:
        """End it; politely, if it speaks HTTP/2 already."""
        self.dropped = reason
        if self.connection is not None:
            self.connection.goaway()
            self.connection.close()
        elif self.task is not None:
            self.task.cancel()


class Front:
    """Takes connections.

    Args:
        begin: Starts a call of one of our clients.
        backend: Path of the Unix socket where grpcio serves all others.
        tls: Encryption; None: plain text.
        limits: What connections may take.
        drops: Is told of those that are turned away.
    """

    def __init__(
        self,
        begin: Begin,
        backend: str,
        tls: ssl.SSLContext | None,
        limits: ConnectionLimits,
        drops: Drops,
    ) -> None:
        self._begin, self._backend, self._tls = begin, backend, tls
        self._limits, self._drops = limits, drops
        self._admission = Admission(limits, descriptors_for_connections())
        self._allowance, self._relaying = Allowance(), Allowance()
        self._uploads = UploadScheduler()
        self._visits: set[_Visit] = set()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="curvd-tls")

    @property
    def usage(self) -> dict[str, int]:
        """What connections take at present; see `Admission.usage`."""
        return self._admission.usage

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
        sockets = await bound(listen)
        tasks = [asyncio.create_task(self._take(sock)) for sock in sockets]
        tasks.append(asyncio.create_task(self._sweep()))
        port = 0 if listen.startswith("unix") else sockets[0].getsockname()[1]
        try:
            yield target_of(listen, port)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for sock in sockets:
                sock.close()
            cleared(listen)
            self._worker.shutdown(wait=False)

    async def stop(self, grace_s: float) -> None:
        """Send our clients away, and close all connections.

        Args:
            grace_s: Time for what is on its way.
        """
        connections = [
            visit.connection for visit in self._visits if visit.connection is not None
        ]
        for connection in connections:
            connection.goaway()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await asyncio.gather(
                    *(connection.gone.wait() for connection in connections)
                )
        tasks = [visit.task for visit in self._visits if visit.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _take(self, listener: socket.socket) -> None:
        while True:
            await self._allowance.turn()
            try:
                sock, address = await _accepted(listener)
            except OSError as error:  # for example no file descriptors are left
                self._drops.add("accept", "unknown", error=str(error))
                await asyncio.sleep(_PAUSE_S)
                continue
            self._allowance.spend(_CONNECTION_S)
            self._admit(_Visit(sock, peer_of(sock, address)))

    def _admit(self, visit: _Visit) -> None:
        try:
            self._admission.enter(visit)
        except Refused as refused:
            self._drops.add(refused.reason, visit.peer)
            visit.sock.close()
            return
        self._visits.add(visit)
        visit.task = asyncio.create_task(self._serve(visit))
        # Not at the end of the task: one that is cancelled at once never begins.
        visit.task.add_done_callback(lambda task: self._leave(visit))

    def _leave(self, visit: _Visit) -> None:
        visit.sock.close()
        self._admission.leave(visit)
        self._visits.discard(visit)
        if visit.dropped is not None:
            self._drops.add(visit.dropped, visit.peer)

    async def _serve(self, visit: _Visit) -> None:
        try:
            ours = await self._greeted(visit)
            await (self._answer(visit) if ours else self._relay(visit))
        except Refused as refused:
            self._drops.add(refused.reason, visit.peer)
        except TimeoutError:
            self._drops.add("greeting", visit.peer, seconds=self._limits.greeting_s)
        except ssl.SSLError as error:
            self._drops.add("handshake", visit.peer, error=str(error))
        except OSError as error:  # the other side left
            logger().debug("left", peer=visit.peer, error=str(error))

    async def _greeted(self, visit: _Visit) -> bool:
        """Find out who calls, and encrypt what we answer ourselves."""
        visit.sock.setblocking(False)
        tune(visit.sock)
        async with asyncio.timeout(self._limits.greeting_s):
            ours = await recognised(visit.sock, tls=self._tls is not None)
            if ours and self._tls is not None:
                visit.sock = await encrypted(
                    visit.sock, self._tls, self._allowance, self._worker
                )
        return ours

    async def _answer(self, visit: _Visit) -> None:
        connection = ServerConnection(
            visit.sock,
            visit.peer,
            self._begin,
            self._uploads,
            self._allowance,
            self._limits.header_bytes,
        )
        visit.connection = connection
        try:
            await connection.gone.wait()
        finally:
            connection.close()
        if connection.failure is not None:
            calm = connection.failure.code is Code.ENHANCE_YOUR_CALM
            reason = "flood" if calm else "protocol"
            self._drops.add(reason, visit.peer, error=str(connection.failure))

    async def _relay(self, visit: _Visit) -> None:
        self._admission.relay(visit)
        visit.relayed = True
        if self._tls is not None:
            self._allowance.spend(_HANDSHAKE_S)
        with await connected(self._backend) as far:
            await relay(visit.sock, far, self._relaying)

    async def _sweep(self) -> None:
        """End connections that do nothing, and say how many there are."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = loop.time()
            for visit in list(self._visits):
                connection = visit.connection
                reason = (
                    None
                    if connection is None
                    else connection.overdue(now, self._limits)
                )
                if reason is not None:
                    visit.send_away(reason)
            self._drops.summarise()
            self._drops.report(self._admission.usage)


async def _accepted(listener: socket.socket) -> tuple[socket.socket, Any]:
    """Take the next connection; whoever is cancelled meanwhile has taken none.

    ``loop.sock_accept`` may have, and loses it.
    """
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    while True:
        with contextlib.suppress(BlockingIOError, InterruptedError):
            return listener.accept()
        ready.clear()
        loop.add_reader(listener, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(listener)
