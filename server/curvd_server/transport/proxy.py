"""Passing bytes on between two sockets, without looking at them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

from curvd_server.transport.allowance import Allowance
from curvd_server.transport.readiness import readable, writable

_BYTES = 1 << 18
"""Bytes that are passed on in one go, and all that is held of one direction."""
_scratch = memoryview(bytearray(_BYTES))
"""Where bytes are between two calls of the system. Nobody waits while they are there."""
_BUFFER_BYTES = 1 << 20
"""What the kernel holds on the way to grpcio; it takes less if its limit is lower.
The default, 200 kB, wakes both ends several times as often."""


async def connected(path: str) -> socket.socket:
    """Connect to grpcio.

    Args:
        path: The path of its Unix socket.

    Returns:
        The connection, non-blocking.

    Raises:
        OSError: If grpcio is gone.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        await asyncio.get_running_loop().sock_connect(sock, path)
    except BaseException:
        sock.close()
        raise
    return sock


async def relay(near: socket.socket, far: socket.socket, allowance: Allowance) -> None:
    """Pass bytes on in both directions until both have ended, or one is broken.

    Args:
        near: Where the client is; non-blocking.
        far: Where grpcio is; non-blocking.
        allowance: Says when the client's bytes are taken.
    """
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_pass(near, far, allowance))
            group.create_task(_pass(far, near, None))
    except* OSError:
        pass  # one of them broke: so does the other


async def _pass(
    source: socket.socket, sink: socket.socket, allowance: Allowance | None
) -> None:
    while True:
        start_s = time.perf_counter()
        try:
            count = source.recv_into(_scratch)
        except BlockingIOError:
            await readable(source)
            continue
        if not count:
            break
        sent = _sent(sink, _scratch[:count])
        rest = memoryview(bytes(_scratch[sent:count]))
        if allowance is None:
            await asyncio.sleep(0)  # others may have something to do
        else:
            allowance.spend(time.perf_counter() - start_s)
            await allowance.turn()
        while rest.nbytes:
            await writable(sink)
            rest = rest[_sent(sink, rest) :]
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _sent(sink: socket.socket, data: memoryview) -> int:
    try:
        return sink.send(data)
    except BlockingIOError:
        return 0
