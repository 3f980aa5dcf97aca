"""Passing bytes on between two sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket

_BYTES = 1 << 18


async def relay(near: socket.socket, far: socket.socket) -> None:
    """Pass bytes on in both directions until both have ended, then close both.

    Args:
        near: Non-blocking.
        far: Non-blocking.
    """
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_pass(near, far))
            group.create_task(_pass(far, near))
    except* OSError:
        pass  # one of them broke: so does the other
    finally:
        near.close()
        far.close()


async def _pass(source: socket.socket, sink: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    memory = memoryview(bytearray(_BYTES))
    while count := await loop.sock_recv_into(source, memory):
        await loop.sock_sendall(sink, memory[:count])
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
