"""Passing bytes on between two sockets, without looking at them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket

from curvd_server.front.readiness import readable, writable

_BYTES = 1 << 20
"""What the kernel holds between two sockets; one direction has as much at most."""


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
    # Through a pipe the kernel moves pages; no byte comes to this process.
    here, there = os.pipe2(os.O_NONBLOCK)
    try:
        fcntl.fcntl(there, fcntl.F_SETPIPE_SZ, _BYTES)
        while count := await _spliced(source.fileno(), there, source, None):
            while count:
                count -= await _spliced(here, sink.fileno(), None, sink, count)
    finally:
        os.close(here)
        os.close(there)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


async def _spliced(
    source: int,
    sink: int,
    reads: socket.socket | None,
    writes: socket.socket | None,
    count: int = _BYTES,
) -> int:
    """Move up to so many bytes, when the socket among the two is ready."""
    while True:
        try:
            return os.splice(source, sink, count, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            if reads is not None:
                await readable(reads)
            if writes is not None:
                await writable(writes)
