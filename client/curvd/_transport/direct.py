"""Channels of our own: gRPC over HTTP/2 without a copy, blocking and asyncio.

One call at a time has a connection to itself; connections that are free are used again.
On the wire it is gRPC as everybody speaks it, so any server and any proxy will do.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import select
import socket
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from typing import Any

from grpc import StatusCode

from curvd._transport.dial import Address, client_context, dial
from curvd._transport.process import current_process, keep_from_children
from curvd.config import VERSION, ClientConfig
from curvd.contract import Rpc, RpcError
from curvd.http2 import (
    BufferProvider,
    CallOptions,
    H2Connection,
    ProtocolError,
    Wait,
    joined,
    make_call,
    tune,
)

Metadata = tuple[tuple[str, str], ...]

_MOST_IDLE = 4
"""Connections that wait for the next call."""
_LONGEST_MESSAGE = 32 << 20
"""Chunks stay below 4 MiB; a session with very many parameters may not."""
_MOST_MS = 99_999_999


class _ConnectionPool:
    """The connections of one process to one server. Threads may share it."""

    def __init__(self, target: str, config: ClientConfig) -> None:
        self._home = current_process()
        self._address, self._config = Address.of(target), config
        self._context = None if config.tls is None else client_context(config.tls)
        self._metadata = config.metadata(target)
        self._idle: list[H2Connection] = []
        self._busy: set[H2Connection] = set()
        self._lock = threading.Lock()
        self._closed = False

    def options(
        self, rpc: Rpc, timeout_s: float | None, metadata: Metadata
    ) -> CallOptions:
        """Say what holds for a call.

        Args:
            rpc: Which method.
            timeout_s: Seconds that it may take.
            metadata: Further headers of it.

        Returns:
            Its options.
        """
        headers = [
            (":method", "POST"),
            (":scheme", "http" if self._context is None else "https"),
            (":path", rpc.path),
            (":authority", self._address.authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", f"curvd-python/{VERSION}"),
            *self._metadata,
            *metadata,
        ]
        if timeout_s is not None:
            if timeout_s <= 0:
                msg = "the deadline passed before the call began"
                raise RpcError(StatusCode.DEADLINE_EXCEEDED, msg)
            milliseconds = min(round(timeout_s * 1e3), _MOST_MS)
            headers.append(("grpc-timeout", f"{milliseconds}m"))
        return CallOptions(
            headers=headers,
            deadline=None if timeout_s is None else time.monotonic() + timeout_s,
            keepalive_s=self._config.keepalive_s,
            keepalive_timeout_s=self._config.keepalive_timeout_s,
            longest=_LONGEST_MESSAGE,
            clock=time.monotonic,
        )

    def take(self) -> H2Connection | None:
        """Take a connection that is free and alive."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
                self._busy.add(connection)
            try:
                connection.pull()  # the server may have gone away meanwhile
            except (ProtocolError, OSError):
                connection.is_going_away = True
            if not connection.is_going_away:
                return connection
            self.put(connection)

    def connect(self, timeout_s: float | None) -> H2Connection:
        """Make a connection, and wait for it.

        Args:
            timeout_s: Seconds.

        Returns:
            The connection.

        Raises:
            RpcError: If nobody is there, or the client is closed.
        """
        try:
            connection = self._connected(timeout_s)
        except OSError as error:
            raise self._lost(error) from error
        with self._lock:
            self._busy.add(connection)
            closed = self._closed
        if closed:
            self.put(connection)
            raise _closed()
        return connection

    def _connected(self, timeout_s: float | None) -> H2Connection:
        longest = self._config.keepalive_timeout_s
        patience_s = longest if timeout_s is None else min(timeout_s, longest)
        sock = dial(self._address, max(1e-3, patience_s))
        keep_from_children(sock)
        try:
            tune(sock, self._config.keepalive_s, self._config.keepalive_timeout_s)
            if self._context is not None:
                assert self._config.tls is not None
                name = self._config.tls.server_name or self._address.host
                sock = self._context.wrap_socket(
                    sock, server_hostname=name or "localhost"
                )
                keep_from_children(sock)
            sock.setblocking(False)
            return H2Connection(sock, client=True)
        except BaseException:
            sock.close()
            raise

    def check_process(self) -> None:
        """Leave a call whose connection is another process's.

        Raises:
            RpcError: If this process was forked since.
        """
        if self._home != current_process():
            msg = "the process was forked while the call was under way"
            raise RpcError(StatusCode.UNAVAILABLE, msg)

    @contextlib.contextmanager
    def at_work(
        self, steps: Generator[Any, None, None], connection: H2Connection
    ) -> Iterator[Generator[Any, None, None]]:
        """Give a connection back when its call is over, however that ends.

        Args:
            steps: The call.
            connection: Its connection.

        Yields:
            The call.

        Raises:
            RpcError: In place of what says that the connection is gone.
        """
        try:
            with contextlib.closing(steps):
                yield steps
        except (ProtocolError, OSError) as error:
            connection.is_going_away = True
            raise self._lost(error) from error
        finally:
            self.put(connection)

    def put(self, connection: H2Connection) -> None:
        """Give a connection back; one that is of no use any more is closed."""
        if self._home != current_process():
            return  # the parent's: not a byte, and no lock
        whole = not connection.is_going_away and (
            connection.stream is None or connection.stream.over
        )
        with self._lock:
            self._busy.discard(connection)
            whole = whole and not self._closed and len(self._idle) < _MOST_IDLE
            if whole:
                self._idle.append(connection)
        if not whole:
            with contextlib.suppress(ProtocolError, OSError):
                connection.push()  # that a call was given up
            connection.sock.close()

    def close(self) -> None:
        """Close what is idle, and break what is busy."""
        with self._lock:
            self._closed = True
            idle, busy = self._idle, list(self._busy)
            self._idle = []
        for connection in idle:
            connection.sock.close()
        for connection in busy:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _lost(self, error: Exception) -> RpcError:
        if self._closed:
            return _closed()
        return RpcError(StatusCode.UNAVAILABLE, str(error) or type(error).__name__)


def _request(
    connection: H2Connection, rpc: Rpc, first: Any, parts: Iterator[Any]
) -> Iterator[Any]:
    """Join the chunks of a request as far as the server takes that."""
    request = itertools.chain((first,), parts)
    if not rpc.request.bulk:
        return request
    return joined(request, lambda: connection.longest_chunk)


class DirectChannel:
    """Makes calls, and waits for them. Threads may share it.

    Args:
        target: Where the server is.
        config: How to reach it.
    """

    def __init__(self, target: str, config: ClientConfig) -> None:
        self._pool = _ConnectionPool(target, config)

    def call(
        self,
        rpc: Rpc,
        parts: Iterator[Any],
        buffer_for: BufferProvider,
        timeout_s: float | None,
        metadata: Metadata = (),
    ) -> Generator[Any, None, None]:
        """Make one call.

        Args:
            rpc: Which method.
            parts: The parts of the request; nothing is sent if there are none.
            buffer_for: Finds the place for chunks of the response.
            timeout_s: Seconds; None: no deadline.
            metadata: Further headers.

        Yields:
            The parts of the response.

        Raises:
            RpcError: If it fails.
        """
        first = next(parts, None)
        if first is None:
            return
        options = self._pool.options(rpc, timeout_s, metadata)
        connection = self._pool.take() or self._pool.connect(timeout_s)
        request = _request(connection, rpc, first, parts)
        with self._pool.at_work(
            make_call(connection, rpc, request, buffer_for, options), connection
        ) as steps:
            for step in steps:
                if not isinstance(step, Wait):
                    yield step
                    self._pool.check_process()
                elif not connection.more:
                    _wait(connection.sock, step)

    def close(self) -> None:
        """Close all connections; calls under way are cancelled."""
        self._pool.close()


class AsyncDirectChannel:
    """The same for asyncio. It belongs to the event loop of its first call.

    Args:
        target: Where the server is.
        config: How to reach it.
    """

    def __init__(self, target: str, config: ClientConfig) -> None:
        self._pool = _ConnectionPool(target, config)

    async def call(
        self,
        rpc: Rpc,
        parts: Iterator[Any],
        buffer_for: BufferProvider,
        timeout_s: float | None,
        metadata: Metadata = (),
    ) -> AsyncGenerator[Any, None]:
        """Make one call.

        Args:
            rpc: Which method.
            parts: The parts of the request; nothing is sent if there are none.
            buffer_for: Finds the place for chunks of the response.
            timeout_s: Seconds; None: no deadline.
            metadata: Further headers.

        Yields:
            The parts of the response.

        Raises:
            RpcError: If it fails.
        """
        first = next(parts, None)
        if first is None:
            return
        options = self._pool.options(rpc, timeout_s, metadata)
        connection = self._pool.take()
        if connection is None:
            connection = await asyncio.to_thread(self._pool.connect, timeout_s)
        request = _request(connection, rpc, first, parts)
        with self._pool.at_work(
            make_call(connection, rpc, request, buffer_for, options), connection
        ) as steps:
            for step in steps:
                if not isinstance(step, Wait):
                    yield step
                    self._pool.check_process()
                elif not connection.more:
                    await _ready(connection.sock, step)

    async def close(self) -> None:
        """Close all connections; calls under way are cancelled."""
        self._pool.close()


def _wait(sock: socket.socket, step: Wait) -> None:
    poll = select.poll()
    poll.register(sock, select.POLLIN | (select.POLLOUT if step.write else 0))
    poll.poll(math.ceil(step.seconds * 1e3))


async def _ready(sock: socket.socket, step: Wait) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    loop.add_reader(sock, wake)
    if step.write:
        loop.add_writer(sock, wake)
    try:
        await asyncio.wait([future], timeout=step.seconds)
    finally:
        loop.remove_reader(sock)
        if step.write:
            loop.remove_writer(sock)


def _closed() -> RpcError:
    msg = "this client is closed"
    return RpcError(StatusCode.CANCELLED, msg)
